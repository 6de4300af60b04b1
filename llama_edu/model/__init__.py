"""The network: normalisation, rotation, attention, feed-forward layer, transformer, and its file formats.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.model.attention import (
        Attention,
        Cache,
        FlexAttention,
        ManualAttention,
        ScaledDotProduct,
        causal_mask,
        document_mask,
    )
    from llama_edu.model.checkpoint import load_pretrained, save_pretrained
    from llama_edu.model.feedforward import FeedForward
    from llama_edu.model.manual import is_manual, manual_backward
    from llama_edu.model.norm import RMSNorm
    from llama_edu.model.rope import apply_rope, half_to_interleaved, interleaved_to_half, rope_frequencies, rope_table
    from llama_edu.model.transformer import Transformer, TransformerBlock, first_nonfinite, residual_stream

__all__ = [
    "Attention",
    "Cache",
    "FeedForward",
    "FlexAttention",
    "ManualAttention",
    "RMSNorm",
    "ScaledDotProduct",
    "Transformer",
    "TransformerBlock",
    "apply_rope",
    "causal_mask",
    "document_mask",
    "first_nonfinite",
    "half_to_interleaved",
    "interleaved_to_half",
    "is_manual",
    "load_pretrained",
    "manual_backward",
    "residual_stream",
    "rope_frequencies",
    "rope_table",
    "save_pretrained",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "attention": (
            "Attention",
            "Cache",
            "FlexAttention",
            "ManualAttention",
            "ScaledDotProduct",
            "causal_mask",
            "document_mask",
        ),
        "checkpoint": ("load_pretrained", "save_pretrained"),
        "feedforward": ("FeedForward",),
        "manual": ("is_manual", "manual_backward"),
        "norm": ("RMSNorm",),
        "rope": ("apply_rope", "half_to_interleaved", "interleaved_to_half", "rope_frequencies", "rope_table"),
        "transformer": ("Transformer", "TransformerBlock", "first_nonfinite", "residual_stream"),
    },
)
