"""The Llama family rebuilt step by step: lessons you run, and the package they export.

The public names load on first use, so that `import llama_edu` costs milliseconds and `llama-edu --help` no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from llama_edu._version import __version__

if TYPE_CHECKING:
    from llama_edu.config import LlamaConfig, RopeScaling
    from llama_edu.generation import KVCache, generate
    from llama_edu.model import Transformer

_HOME = {
    "LlamaConfig": "llama_edu.config",
    "RopeScaling": "llama_edu.config",
    "Transformer": "llama_edu.model",
    "KVCache": "llama_edu.generation",
    "generate": "llama_edu.generation",
}

__all__ = ["KVCache", "LlamaConfig", "RopeScaling", "Transformer", "__version__", "generate"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
