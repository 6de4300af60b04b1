"""Text to ids and back: byte-level BPE, the tokenizers of every Llama, and the chat formats.

The names load on first use: `BPETokenizer` needs neither SentencePiece nor a compiler.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.tokenizer.bpe import LLAMA3_PATTERN, BPETokenizer
    from llama_edu.tokenizer.chat import ChatFormat, Llama2ChatFormat
    from llama_edu.tokenizer.llama3 import Llama3Tokenizer
    from llama_edu.tokenizer.sentencepiece import SentencePieceTokenizer

__all__ = [
    "LLAMA3_PATTERN",
    "BPETokenizer",
    "ChatFormat",
    "Llama2ChatFormat",
    "Llama3Tokenizer",
    "SentencePieceTokenizer",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "bpe": ("BPETokenizer", "LLAMA3_PATTERN"),
        "chat": ("ChatFormat", "Llama2ChatFormat"),
        "llama3": ("Llama3Tokenizer",),
        "sentencepiece": ("SentencePieceTokenizer",),
    },
)
