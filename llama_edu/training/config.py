"""One frozen dataclass for everything that decides a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

from llama_edu.config import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.training.schema import Schema, brief, convert_fields, merge, read_layer

__all__ = ["FREE", "Arguments", "TrainConfig", "load_config", "parse_arguments"]

# Fields that leave every weight as it is: they may differ between a run and its continuation.
FREE = {"val_data", "out_dir", "eval_every", "eval_batches", "sample_every", "sample_prompts", "checkpoint_every"}
FREE |= {"keep_last", "keep_every", "async_checkpoint", "max_skipped", "max_rewinds", "recompute", "data_workers"}
FREE |= {"device", "progress", "mfu", "tensorboard", "wandb"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run.

    Args:
        model: shape of the model.
        train_data: folder of tokens, list of folders, or a mixture of several; see `llama_edu.data.open_stream`.
        out_dir: folder of the run: `metrics.jsonl`, `config.json` and `checkpoints/`.
        steps: optimiser steps.
        val_data: folder of tokens; without it nothing is evaluated.
        batch_size: sequences a step, over all devices.
        batch_ramp: larger batches later on: pairs (tokens seen, batch_size from then on).
        seq_len: tokens a sequence.
        packing: how documents fill sequences: "concat" cuts where a sequence is full, "best-fit" keeps documents whole
            where they fit.
        accumulate: parts a batch is worked off in; saves memory, changes only rounding.
        lr: highest learning rate.
        min_lr_ratio: learning rate at the end, as a share of the highest.
        warmup: steps until the highest learning rate is reached.
        schedule: what follows the warm-up; see `learning_rate`.
        betas, eps, weight_decay: of AdamW; see `make_optimizer`.
        clip: largest norm of the gradient; a longer one is scaled down to it.
        z_loss: weight of the penalty on log Z that keeps the logits small; 0: none.
        loss_chunk: tokens whose logits are in memory at a time; 0: those of the whole part.
        document_mask: tokens attend only inside their document, as in Llama 3 (arXiv 2407.21783, section 3.2).
        precision: "bf16" runs the matrix products in bfloat16 beside float32 weights (torch.autocast); "auto" does so
            where the device has instructions for it; "bf16_copies" keeps bfloat16 copies of the weights and the
            residual stream in bfloat16, on one device (see `bf16_products`).
        seed: of weights, data order and every random generator.
        device: "auto" is CUDA where there is one, else the CPU.
        compile: run each layer of the model through torch.compile.
        recompute: which activations are computed again in the backward pass instead of kept: "none", "selective",
            "full".
        data_workers: threads that read batches ahead; 0: none. They change no batch.
        eval_every: steps between evaluations on a part of val_data; 0: none. The last step evaluates on all of it.
        eval_batches: batches of that part.
        sample_every: steps between texts that the model writes; 0: none.
        sample_prompts: what these texts begin with.
        checkpoint_every: steps between checkpoints; 0: only at the end or when interrupted.
        keep_last: checkpoints that are kept.
        keep_every: checkpoints of these steps are kept for good; 0: none.
        async_checkpoint: write checkpoints behind the run's back; takes host memory for one more copy.
        max_skipped: steps in a row without a finite loss and gradient before the run goes back to the last good
            checkpoint, and on with the data after the bad steps.
        max_rewinds: how often it does that before it gives up.
        progress: show a progress bar.
        mfu: measure the peak of the device before the run, and say which share of it is used.
        tensorboard: write `tensorboard/` in `out_dir`.
        wandb: project of Weights & Biases to report to; empty: none.

    Raises:
        UserError: a value is of the wrong type or out of range, or two do not fit together.
    """

    model: LlamaConfig
    train_data: str | list[str] | dict[str, Any]
    out_dir: str
    steps: int
    val_data: str | None = None
    batch_size: int = 16
    batch_ramp: tuple[tuple[int, int], ...] = ()
    seq_len: int = 256
    packing: Literal["concat", "best-fit"] = "concat"
    accumulate: int = 1
    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    warmup: int = 100
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    z_loss: float = 0.0
    loss_chunk: int = 0
    document_mask: bool = False
    precision: Literal["auto", "float32", "bf16", "bf16_copies"] = "auto"
    seed: int = 0
    device: str = "auto"
    compile: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    data_workers: int = 1
    eval_every: int = 0
    eval_batches: int = 20
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    checkpoint_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    async_checkpoint: bool = False
    max_skipped: int = 10
    max_rewinds: int = 2
    progress: bool = True
    mfu: bool = False
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self) -> None:
        convert_fields(self)
        for name in ("steps", "batch_size", "seq_len", "accumulate", "eval_batches", "keep_last", "max_skipped"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "seed", "eval_every", "sample_every", "checkpoint_every", "keep_every", "max_rewinds"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("weight_decay", "eps", "z_loss", "loss_chunk", "data_workers"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in ("lr", "clip"):
            _check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a positive number")
        _check("min_lr_ratio", self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1, "between 0 and 1")
        _check("betas", self.betas, all(0 <= b < 1 for b in self.betas), "two numbers from 0 up to, not including, 1")
        starts = [at for at, _ in self.batch_ramp]
        rising = all(a < b for a, b in zip([0, *starts], starts)) and all(size >= 1 for _, size in self.batch_ramp)
        _check("batch_ramp", self.batch_ramp, rising, "pairs (tokens, batch_size) with rising tokens above 0")
        for size in (self.batch_size, *(size for _, size in self.batch_ramp)):
            if size % self.accumulate:
                raise UserError(f"batch_size {size} does not divide by accumulate {self.accumulate}: change one")
        if self.seq_len > self.model.max_seq_len:
            raise UserError(
                f"seq_len is {self.seq_len}, the model's max_seq_len is {self.model.max_seq_len}: lower the first, or "
                "raise the second"
            )
        if self.warmup > self.steps:
            raise UserError(f"warmup is {self.warmup} steps, the run has only {self.steps}: lower it")
        if self.sample_every and not self.sample_prompts:
            raise UserError(f"sample_every is {self.sample_every} without sample_prompts: give at least one")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all fields, for JSON. `from_dict` reads it back."""
        lists = {"betas": list(self.betas), "sample_prompts": list(self.sample_prompts)}
        return {**asdict(self), **lists, "batch_ramp": [list(pair) for pair in self.batch_ramp]}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> TrainConfig:
        """From `to_dict`, or a table as in a file. Raises UserError for unknown fields and wrong types."""
        given = {**d, "model": d["model"].to_dict()} if isinstance(d.get("model"), LlamaConfig) else d
        return _construct(cls, Schema([cls]).check(given, ""))


def load_config(path: str | Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> TrainConfig:
    """The configuration in a .yaml, .toml or .json file: a table of the fields; `model` is a table or a preset's name.

    Args:
        overrides: nested dict that wins over the file.

    Raises:
        UserError: the file is missing or no table, a field is unknown, missing, given twice or of the wrong type.

    Example:
        A file `run.yaml` of five lines:

            model: {dim: 256, n_layers: 6, n_heads: 8, vocab_size: 4096}
            train_data: tokens/train
            out_dir: runs/first
            steps: 1000
            lr: 1e-3
    """
    schema = Schema([TrainConfig])
    layer = merge(schema.check(read_layer(path), f"{path}: "), schema.check(overrides, ""))
    return _construct(TrainConfig, layer)


@dataclass(frozen=True)
class Arguments:
    """What files and command line say, not yet completed by defaults.

    Attributes:
        values: nested dict of the fields that were given.
        sections: name -> dataclass, filled.
        in_files: top-level names that a file gave.
    """

    values: dict[str, Any]
    sections: dict[str, Any]
    in_files: frozenset[str] = frozenset()

    def config(self, low: Mapping[str, Any] = MappingProxyType({})) -> TrainConfig:
        """The configuration; `low` holds what was not given, before the defaults of `TrainConfig`."""
        known = {f.name for f in fields(TrainConfig)}
        return _construct(TrainConfig, {k: v for k, v in merge(low, self.values).items() if k in known})

    def fill(self, cls: type) -> Any:
        """A dataclass of top-level options, filled."""
        return _construct(cls, {f.name: self.values[f.name] for f in fields(cls) if f.name in self.values})


def parse_arguments(
    argv: Sequence[str],
    *,
    sections: Mapping[str, type] = MappingProxyType({}),
    options: Sequence[type] = (),
    short: Mapping[str, str] = MappingProxyType({}),
    prog: str = "llama-edu train",
    about: str = "",
) -> Arguments:
    """A command line: `--config run.yaml`, then options that win over it, `--lr 1e-3 --model.dim 256 --no-compile`.

    Args:
        sections: further dataclasses, such as {"parallel": ParallelPlan}: `--parallel.tp 2`, a table `parallel` in the
            file.
        options: dataclasses whose fields stand beside those of `TrainConfig`.
        short: further names for fields, such as {"dim": "model.dim"}.
        prog, about: for `--help`, which prints all options and raises SystemExit.

    Raises:
        UserError: a name is unknown (with the nearest that exists), a value has the wrong type, a file is no table.
    """
    schema = Schema([*options, TrainConfig], sections, short)
    if {"--help", "-h"} & set(argv):
        print(schema.usage(prog, about))
        raise SystemExit(0)
    line, files = schema.parse(argv)
    layer: dict[str, Any] = {}
    for file in files:
        layer = merge(layer, schema.check(read_layer(file), f"{file}: "))
    in_files, layer = frozenset(layer), merge(layer, line)
    filled = {name: _construct(cls, layer.get(name) or {}, f"{name}.") for name, cls in sections.items()}
    return Arguments(layer, filled, in_files)


def _construct(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass with these values. Raises UserError for one that is missing."""
    values, hints = dict(values), get_type_hints(cls)
    for field in fields(cls):
        nested = next((h for h in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(h)), None)
        if nested is LlamaConfig and field.name in values:
            values[field.name] = _model(values[field.name], f"{prefix}{field.name}.")
        elif nested is not None and isinstance(values.get(field.name), Mapping):
            values[field.name] = _construct(nested, values[field.name], f"{prefix}{field.name}.")
        elif field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{prefix}{field.name} is not given, and it has no default")
    return cls(**values)


def _model(values: Mapping[str, Any], prefix: str) -> LlamaConfig:
    """A preset with changes, or all fields. Widths that follow from a changed one follow it."""
    if "preset" not in values:
        return _construct(LlamaConfig, values, prefix)
    changes = {name: value for name, value in values.items() if name != "preset"}
    given = LlamaConfig.preset(values["preset"]).to_dict()
    if {"dim", "n_heads"} & set(changes):
        given |= {"head_dim": None}
    if "dim" in changes:
        given |= {"ffn_dim": None}
    return LlamaConfig.from_dict({**given, **changes})


def _check(name: str, value: Any, good: bool, what: str) -> None:
    if not good:
        raise UserError(f"{name} is {brief(value)}; it must be {what}")
