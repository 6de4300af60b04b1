"""What goes into a run and comes out of it, beside its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Sampler", "TrainResult"]

# Writes the texts that a run shows: (model, prompts) -> what follows each prompt.
Sampler = Callable[[nn.Module, list[str]], list[str]]


@dataclass
class TrainResult:
    """What a run ends with.

    Attributes:
        model: the trained model, in float32.
        history: the lines of `metrics.jsonl`, one a step: step, tokens (seen so far), loss, lr, grad_norm, skipped,
            tokens_per_second and, where there are any, val_loss, val_bits_per_byte, samples, mfu, checkpoint_seconds
            (how long the save after the step before held this one up) and, after a rewind, rewound_from; of a skipped
            step on several ranks nonfinite_ranks, those whose own part of the loss was not finite.
        step: steps done.
        interrupted: a signal ended the run early; the same call goes on.
        resumed_from: the step of the checkpoint it went on from; 0 for a fresh run.
        skipped: steps left out because loss or gradient was not finite.
        rewinds: how often the run went back to a checkpoint because of them.
        loss, val_loss: of the last step, nats a token; None where there is none.
        bits_per_byte: of the whole validation text.
        tokens_per_second: median over the steps.
    """

    model: nn.Module = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    step: int
    interrupted: bool
    resumed_from: int
    skipped: int
    rewinds: int = 0
    loss: float | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
