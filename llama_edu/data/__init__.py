"""Text in, batches out: where documents come from, and how they become token shards."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_edu.data.sources import BUILTIN, Document, Split, held_out, read_documents
    from llama_edu.data.tokens import Batch, Batches, TokenFile, sequential_batches, tokenizer_hash, write_tokens

_HOME = {
    "BUILTIN": "sources",
    "Batch": "tokens",
    "Batches": "tokens",
    "Document": "sources",
    "Split": "sources",
    "TokenFile": "tokens",
    "held_out": "sources",
    "read_documents": "sources",
    "sequential_batches": "tokens",
    "tokenizer_hash": "tokens",
    "write_tokens": "tokens",
}

__all__ = [
    "BUILTIN",
    "Batch",
    "Batches",
    "Document",
    "Split",
    "TokenFile",
    "held_out",
    "read_documents",
    "sequential_batches",
    "tokenizer_hash",
    "write_tokens",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"llama_edu.data.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
