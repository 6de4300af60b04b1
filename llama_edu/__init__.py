"""The Llama family rebuilt step by step: lessons you run, and the package they export.

The public names load on first use, so that `import llama_edu` costs milliseconds and `llama-edu --help` no torch.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy
from llama_edu._version import __version__

if TYPE_CHECKING:
    from llama_edu.config import LlamaConfig, RopeScaling
    from llama_edu.generation import KVCache, generate
    from llama_edu.model import Transformer

__all__ = ["KVCache", "LlamaConfig", "RopeScaling", "Transformer", "generate", "__version__"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "config": ("LlamaConfig", "RopeScaling"),
        "generation": ("KVCache", "generate"),
        "model": ("Transformer",),
    },
)
