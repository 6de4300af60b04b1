"""Text in, batches out: where documents come from, and how they become token shards."""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.data.build import write_shards
    from llama_edu.data.mixture import Mixture
    from llama_edu.data.packing import PackedSequences, best_fit
    from llama_edu.data.sources import BUILTIN, Document, Split, held_out, put_aside, read_documents
    from llama_edu.data.stream import TokenStream, open_stream, open_tokens, read_ahead
    from llama_edu.data.tokens import (
        Batch,
        Batches,
        TokenFile,
        TokenShards,
        document_positions,
        sequential_batches,
        tokenizer_hash,
        write_tokens,
    )

__all__ = [
    "BUILTIN",
    "Batch",
    "Batches",
    "Document",
    "Mixture",
    "PackedSequences",
    "Split",
    "TokenFile",
    "TokenShards",
    "TokenStream",
    "best_fit",
    "document_positions",
    "held_out",
    "open_stream",
    "open_tokens",
    "put_aside",
    "read_ahead",
    "read_documents",
    "sequential_batches",
    "tokenizer_hash",
    "write_shards",
    "write_tokens",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "build": ("write_shards",),
        "mixture": ("Mixture",),
        "packing": ("PackedSequences", "best_fit"),
        "sources": ("BUILTIN", "Document", "Split", "held_out", "put_aside", "read_documents"),
        "stream": ("TokenStream", "open_stream", "open_tokens", "read_ahead"),
        "tokens": (
            "Batch",
            "Batches",
            "TokenFile",
            "TokenShards",
            "document_positions",
            "sequential_batches",
            "tokenizer_hash",
            "write_tokens",
        ),
    },
)
