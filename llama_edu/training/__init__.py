"""Pretraining: optimiser, schedule, checkpoints, and the loop that survives what happens to a run.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, verify_checkpoint
    from llama_edu.training.config import TrainConfig
    from llama_edu.training.evaluation import bits_per_byte, evaluate
    from llama_edu.training.loop import TrainResult, train
    from llama_edu.training.loss import backward_batch, next_token_loss
    from llama_edu.training.optimizer import decay_groups, make_optimizer
    from llama_edu.training.schedule import learning_rate

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

__getattr__, __dir__ = lazy(
    __name__,
    {
        "checkpoint": ("load_checkpoint", "newest_checkpoint", "save_checkpoint", "verify_checkpoint"),
        "config": ("TrainConfig",),
        "evaluation": ("bits_per_byte", "evaluate"),
        "loop": ("TrainResult", "train"),
        "loss": ("backward_batch", "next_token_loss"),
        "optimizer": ("decay_groups", "make_optimizer"),
        "schedule": ("learning_rate",),
    },
)
