"""Writing text: the cache of keys and values, and decoding.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.generation.batching import ContinuousBatcher
    from llama_edu.generation.cache import KVCache
    from llama_edu.generation.decode import NonFiniteLogits, generate
    from llama_edu.generation.paged import BlockPool, OutOfBlocks, PagedCache
    from llama_edu.generation.sampling import Choose, Sampler, draw, keep_min_p, keep_top_k, keep_top_p

__all__ = [
    "BlockPool",
    "Choose",
    "ContinuousBatcher",
    "KVCache",
    "NonFiniteLogits",
    "OutOfBlocks",
    "PagedCache",
    "Sampler",
    "draw",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "batching": ("ContinuousBatcher",),
        "cache": ("KVCache",),
        "decode": ("NonFiniteLogits", "generate"),
        "paged": ("BlockPool", "OutOfBlocks", "PagedCache"),
        "sampling": ("Choose", "Sampler", "draw", "keep_min_p", "keep_top_k", "keep_top_p"),
    },
)
