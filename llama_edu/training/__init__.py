"""Pretraining: optimiser, schedule, checkpoints, and the loop that survives what happens to a run.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_edu.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, verify_checkpoint
    from llama_edu.training.loop import (
        TrainConfig,
        TrainResult,
        backward_batch,
        bits_per_byte,
        evaluate,
        next_token_loss,
        train,
    )
    from llama_edu.training.optimizer import decay_groups, make_optimizer
    from llama_edu.training.schedule import learning_rate

_HOME = {
    "TrainConfig": "loop",
    "TrainResult": "loop",
    "backward_batch": "loop",
    "bits_per_byte": "loop",
    "decay_groups": "optimizer",
    "evaluate": "loop",
    "learning_rate": "schedule",
    "load_checkpoint": "checkpoint",
    "make_optimizer": "optimizer",
    "newest_checkpoint": "checkpoint",
    "next_token_loss": "loop",
    "save_checkpoint": "checkpoint",
    "train": "loop",
    "verify_checkpoint": "checkpoint",
}

__all__ = [
    "TrainConfig",
    "TrainResult",
    "backward_batch",
    "bits_per_byte",
    "decay_groups",
    "evaluate",
    "learning_rate",
    "load_checkpoint",
    "make_optimizer",
    "newest_checkpoint",
    "next_token_loss",
    "save_checkpoint",
    "train",
    "verify_checkpoint",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"llama_edu.training.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
