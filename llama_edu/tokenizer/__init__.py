"""Text to ids and back: byte-level BPE, the tokenizers of every Llama, and the chat formats.

The names load on first use: `BPETokenizer` needs neither SentencePiece nor a compiler.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_edu.tokenizer.bpe import LLAMA3_PATTERN, BPETokenizer
    from llama_edu.tokenizer.chat import ChatFormat, Llama2ChatFormat
    from llama_edu.tokenizer.llama3 import Llama3Tokenizer
    from llama_edu.tokenizer.sentencepiece import SentencePieceTokenizer

_HOME = {
    "BPETokenizer": "llama_edu.tokenizer.bpe",
    "LLAMA3_PATTERN": "llama_edu.tokenizer.bpe",
    "SentencePieceTokenizer": "llama_edu.tokenizer.sentencepiece",
    "Llama3Tokenizer": "llama_edu.tokenizer.llama3",
    "ChatFormat": "llama_edu.tokenizer.chat",
    "Llama2ChatFormat": "llama_edu.tokenizer.chat",
}

__all__ = [
    "LLAMA3_PATTERN",
    "BPETokenizer",
    "ChatFormat",
    "Llama2ChatFormat",
    "Llama3Tokenizer",
    "SentencePieceTokenizer",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
