"""Pretraining: optimiser, schedule, checkpoints, and the loop that survives what happens to a run.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, verify_checkpoint
    from llama_edu.training.config import TrainConfig, load_config, parse_arguments
    from llama_edu.training.engine import Engine
    from llama_edu.training.evaluation import bits_per_byte, evaluate
    from llama_edu.training.loop import train
    from llama_edu.training.loss import backward_batch, chunked_cross_entropy, next_token_loss
    from llama_edu.training.optimizer import decay_groups, make_optimizer
    from llama_edu.training.recipes import RECIPES, recipe
    from llama_edu.training.report import write_report
    from llama_edu.training.result import TrainResult
    from llama_edu.training.schedule import batch_size_at, learning_rate, steps_for
    from llama_edu.training.utilisation import has_bf16, measured_peak, mfu, published_peak

__all__ = [
    "RECIPES",
    "Engine",
    "TrainConfig",
    "TrainResult",
    "backward_batch",
    "batch_size_at",
    "bits_per_byte",
    "chunked_cross_entropy",
    "decay_groups",
    "evaluate",
    "has_bf16",
    "learning_rate",
    "load_checkpoint",
    "load_config",
    "make_optimizer",
    "measured_peak",
    "mfu",
    "newest_checkpoint",
    "next_token_loss",
    "parse_arguments",
    "published_peak",
    "recipe",
    "save_checkpoint",
    "steps_for",
    "train",
    "verify_checkpoint",
    "write_report",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "checkpoint": ("load_checkpoint", "newest_checkpoint", "save_checkpoint", "verify_checkpoint"),
        "config": ("TrainConfig", "load_config", "parse_arguments"),
        "engine": ("Engine",),
        "evaluation": ("bits_per_byte", "evaluate"),
        "loop": ("train",),
        "loss": ("backward_batch", "chunked_cross_entropy", "next_token_loss"),
        "optimizer": ("decay_groups", "make_optimizer"),
        "report": ("write_report",),
        "result": ("TrainResult",),
        "recipes": ("RECIPES", "recipe"),
        "schedule": ("batch_size_at", "learning_rate", "steps_for"),
        "utilisation": ("has_bf16", "measured_peak", "mfu", "published_peak"),
    },
)
