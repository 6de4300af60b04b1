"""Text in, batches out: where documents come from, and how they become token shards."""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.data.sources import BUILTIN, Document, Split, held_out, read_documents
    from llama_edu.data.stream import TokenStream, open_stream
    from llama_edu.data.tokens import (
        Batch,
        Batches,
        TokenFile,
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
    "Split",
    "TokenFile",
    "TokenStream",
    "document_positions",
    "held_out",
    "open_stream",
    "read_documents",
    "sequential_batches",
    "tokenizer_hash",
    "write_tokens",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "sources": ("BUILTIN", "Document", "Split", "held_out", "read_documents"),
        "stream": ("TokenStream", "open_stream"),
        "tokens": (
            "Batch",
            "Batches",
            "TokenFile",
            "document_positions",
            "sequential_batches",
            "tokenizer_hash",
            "write_tokens",
        ),
    },
)
