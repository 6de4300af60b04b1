"""One frozen dataclass for everything that decides a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from llama_edu.config import LlamaConfig
from llama_edu.errors import UserError

__all__ = ["FREE", "TrainConfig"]

# Fields that leave every weight as it is: they may differ between a run and its continuation.
FREE = {"val_data", "out_dir", "eval_every", "eval_batches", "checkpoint_every", "keep_last", "max_skipped", "device"}
FREE |= {"progress"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run.

    Args:
        model: shape of the model.
        train_data, val_data: folders written by `write_tokens`; without `val_data` nothing is evaluated.
        out_dir: folder of the run: `metrics.jsonl` and `checkpoints/`.
        steps: optimiser steps.
        batch_size: sequences a step.
        seq_len: tokens a sequence.
        accumulate: parts a batch is worked off in; saves memory, changes only rounding.
        lr, min_lr_ratio, warmup, schedule: see `learning_rate`.
        betas, eps, weight_decay: of AdamW; see `make_optimizer`.
        clip: largest norm of the gradient; a longer one is scaled down to it.
        precision: "bf16" runs the matrix products in bfloat16 beside float32 weights; "auto" does so where the device
            has instructions for it.
        seed: of weights, data order and every random generator.
        device: "auto" is CUDA where there is one, else the CPU.
        compile: run the model through torch.compile.
        eval_every: steps between evaluations on `eval_batches` batches; 0: none. The last step evaluates on all data.
        checkpoint_every: steps between checkpoints; 0: only at the end or when interrupted.
        keep_last: checkpoints that are kept.
        document_mask: tokens attend only inside their document, as in Llama 3 (arXiv 2407.21783, section 3.2).
        max_skipped: steps in a row without a finite loss and gradient before the run gives up.
        progress: show a progress bar.

    Raises:
        UserError: a value is out of range, or two do not fit together.
    """

    model: LlamaConfig
    train_data: str
    out_dir: str
    steps: int
    val_data: str | None = None
    batch_size: int = 16
    seq_len: int = 256
    accumulate: int = 1
    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    warmup: int = 100
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    seed: int = 0
    device: str = "auto"
    compile: bool = False
    eval_every: int = 0
    eval_batches: int = 20
    checkpoint_every: int = 0
    keep_last: int = 2
    document_mask: bool = False
    max_skipped: int = 10
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "eval_batches", "keep_last", "max_skipped"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "seed", "eval_every", "checkpoint_every", "weight_decay", "eps"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("lr", "clip"):
            _check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a positive number")
        _check("min_lr_ratio", self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1, "between 0 and 1")
        _check("betas", self.betas, all(0 <= b < 1 for b in self.betas), "two numbers from 0 up to, not including, 1")
        _check(
            "schedule",
            self.schedule,
            self.schedule in ("cosine", "linear", "wsd", "constant"),
            "cosine, linear, wsd or constant",
        )
        _check("precision", self.precision, self.precision in ("auto", "float32", "bf16"), "auto, float32 or bf16")
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}: change one")
        if self.seq_len > self.model.max_seq_len:
            raise UserError(
                f"seq_len is {self.seq_len}, the model's max_seq_len is {self.model.max_seq_len}: lower the first, or "
                "raise the second"
            )
        if self.warmup > self.steps:
            raise UserError(f"warmup is {self.warmup} steps, the run has only {self.steps}: lower it")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all fields, for JSON. `from_dict` reads it back."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> TrainConfig:
        """From `to_dict`. Raises UserError for an unknown field."""
        unknown = set(d) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(f"unknown fields in a training configuration: {', '.join(sorted(unknown))}")
        model = d["model"] if isinstance(d["model"], LlamaConfig) else LlamaConfig.from_dict(d["model"])
        return cls(**{**d, "model": model, "betas": tuple(d.get("betas", cls.betas))})


def _check(name: str, value: Any, good: bool, what: str) -> None:
    if not good:
        raise UserError(f"{name} is {value!r}; it must be {what}")
