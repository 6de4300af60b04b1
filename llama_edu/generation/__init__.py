"""Writing text: the cache of keys and values, and decoding.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_edu.generation.cache import KVCache
    from llama_edu.generation.decode import NonFiniteLogits, draw, generate, keep_min_p, keep_top_k, keep_top_p

_HOME = {
    "KVCache": "cache",
    "NonFiniteLogits": "decode",
    "draw": "decode",
    "generate": "decode",
    "keep_min_p": "decode",
    "keep_top_k": "decode",
    "keep_top_p": "decode",
}

__all__ = ["KVCache", "NonFiniteLogits", "draw", "generate", "keep_min_p", "keep_top_k", "keep_top_p"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"llama_edu.generation.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
