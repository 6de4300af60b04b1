"""The network: normalisation, rotation, attention, feed-forward layer, transformer, and its file formats.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_edu.model.attention import Attention
    from llama_edu.model.checkpoint import load_pretrained, save_pretrained
    from llama_edu.model.feedforward import FeedForward
    from llama_edu.model.manual import is_manual, manual_backward
    from llama_edu.model.norm import RMSNorm
    from llama_edu.model.rope import (
        apply_rope,
        half_to_interleaved,
        interleaved_to_half,
        rope_frequencies,
        rope_table,
    )
    from llama_edu.model.transformer import Transformer, TransformerBlock

_HOME = {
    "Attention": "attention",
    "FeedForward": "feedforward",
    "RMSNorm": "norm",
    "Transformer": "transformer",
    "TransformerBlock": "transformer",
    "apply_rope": "rope",
    "half_to_interleaved": "rope",
    "interleaved_to_half": "rope",
    "is_manual": "manual",
    "load_pretrained": "checkpoint",
    "manual_backward": "manual",
    "rope_frequencies": "rope",
    "rope_table": "rope",
    "save_pretrained": "checkpoint",
}

__all__ = [
    "Attention",
    "FeedForward",
    "RMSNorm",
    "Transformer",
    "TransformerBlock",
    "apply_rope",
    "half_to_interleaved",
    "interleaved_to_half",
    "is_manual",
    "load_pretrained",
    "manual_backward",
    "rope_frequencies",
    "rope_table",
    "save_pretrained",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"llama_edu.model.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
