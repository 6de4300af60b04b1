"""Writing text: the cache of keys and values, and decoding.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.generation.batching import ContinuousBatcher
    from llama_edu.generation.beam import Beam, beam_search
    from llama_edu.generation.cache import KVCache
    from llama_edu.generation.decode import NonFiniteLogits, generate
    from llama_edu.generation.fast import FastDecoder, fast_generate
    from llama_edu.generation.grammar import JSONConstraint
    from llama_edu.generation.paged import BlockPool, OutOfBlocks, PagedCache
    from llama_edu.generation.sampling import (
        Choose,
        Constraint,
        Sampler,
        TokenLogProb,
        draw,
        keep_min_p,
        keep_top_k,
        keep_top_p,
        log_probabilities,
        penalise_repetition,
        temper,
    )
    from llama_edu.generation.speculative import PromptLookup, Speculation, speculate
    from llama_edu.generation.text import StopText, cut_at_stop, stream_text

__all__ = [
    "Beam",
    "BlockPool",
    "Choose",
    "Constraint",
    "ContinuousBatcher",
    "FastDecoder",
    "JSONConstraint",
    "KVCache",
    "NonFiniteLogits",
    "OutOfBlocks",
    "PagedCache",
    "PromptLookup",
    "Sampler",
    "Speculation",
    "StopText",
    "TokenLogProb",
    "beam_search",
    "cut_at_stop",
    "draw",
    "fast_generate",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "log_probabilities",
    "penalise_repetition",
    "speculate",
    "stream_text",
    "temper",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "batching": ("ContinuousBatcher",),
        "beam": ("Beam", "beam_search"),
        "cache": ("KVCache",),
        "decode": ("NonFiniteLogits", "generate"),
        "fast": ("FastDecoder", "fast_generate"),
        "grammar": ("JSONConstraint",),
        "paged": ("BlockPool", "OutOfBlocks", "PagedCache"),
        "sampling": (
            "Choose",
            "Constraint",
            "Sampler",
            "TokenLogProb",
            "draw",
            "keep_min_p",
            "keep_top_k",
            "keep_top_p",
            "log_probabilities",
            "penalise_repetition",
            "temper",
        ),
        "text": ("StopText", "cut_at_stop", "stream_text"),
        "speculative": ("PromptLookup", "Speculation", "speculate"),
    },
)
