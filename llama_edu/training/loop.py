"""The training loop: one configuration in, a trained model out, whatever interrupts it on the way."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama_edu.data.tokens import Batch, Batches, TokenFile
from llama_edu.errors import UserError
from llama_edu.model.transformer import Transformer
from llama_edu.training.checkpoint import load_checkpoint, newest_checkpoint, rng_state, save_checkpoint, set_rng_state
from llama_edu.training.config import FREE, TrainConfig
from llama_edu.training.evaluation import bits_per_byte, evaluate
from llama_edu.training.loss import backward_batch, has_bf16
from llama_edu.training.optimizer import make_optimizer
from llama_edu.training.schedule import learning_rate

__all__ = ["TrainResult", "train"]


@dataclass
class TrainResult:
    """What a run ends with.

    Attributes:
        model: the trained model, in float32.
        history: the lines of `metrics.jsonl`, one a step: step, loss, lr, grad_norm, tokens_per_second, skipped and,
            where the step was evaluated, val_loss and val_bits_per_byte.
        step: steps done.
        interrupted: a signal ended the run early; the same call goes on.
        resumed_from: the step of the checkpoint it went on from; 0 for a fresh run.
        skipped: steps left out because loss or gradient was not finite.
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
    loss: float | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; the second signal acts as usual. Only the main thread can listen."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_signal(number: int, frame: Any) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second run. The lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # no POSIX locks here
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {folder}: wait for it, or choose another out_dir") from error
        yield


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every random generator, and put them back as they were."""
    before = rng_state(device)
    _seed_all(seed)
    try:
        yield
    finally:
        set_rng_state(before, device)


def _seed_all(seed: int) -> None:
    import random

    import numpy as np

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class _Metrics:
    """`metrics.jsonl`: one line a step, each step once, however often the run was interrupted."""

    def __init__(self, path: Path, keep: int) -> None:
        """Open the file, dropping lines after step `keep` and whatever is damaged."""
        self.history = [line for line in self._read(path) if line["step"] <= keep]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(self._line(entry) for entry in self.history))
        os.replace(partial, path)
        self.file = open(path, "a")

    @staticmethod
    def _read(path: Path) -> Iterator[dict[str, Any]]:
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                entry["step"] += 0
            except (ValueError, KeyError, TypeError):  # the line that was being written when the program was killed
                return
            yield entry

    @staticmethod
    def _line(entry: dict[str, Any]) -> str:
        return json.dumps(entry, allow_nan=False) + "\n"

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line; what is not finite, and so no JSON, becomes None."""
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self.history.append(entry)
        self.file.write(self._line(entry))
        self.file.flush()

    def sync(self) -> None:
        """Bring all lines to the disk: a checkpoint never knows a step that the metrics do not."""
        os.fsync(self.file.fileno())

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()


def _identity(config: TrainConfig, train_file: TokenFile, precision: str) -> dict[str, Any]:
    """What must be equal for one run to go on where another stopped; the data by its content."""
    kept = {name: value for name, value in config.to_dict().items() if name not in FREE}
    return {**kept, "precision": precision, "train_data": train_file.tokens_sha256}


def _refuse_other(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raise UserError where a checkpoint belongs to another run."""

    def flat(d: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in d.items() if k != "model"} | {f"model.{k}": v for k, v in d["model"].items()}

    saved, now = flat(saved), flat(json.loads(json.dumps(now)))
    names = [name for name in sorted(saved | now) if saved.get(name) != now.get(name)]
    if names:
        differing = [f"{name} {saved.get(name)!r} (now {now.get(name)!r})" for name in names]
        raise UserError(
            f"{checkpoint} belongs to a run with another configuration: {'; '.join(differing)}; "
            "choose another out_dir, or remove this one"
        )


class _Run:
    """A run under way: what `train` sets up, how it goes on from a checkpoint, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        model: nn.Module,
        batches: Batches,
        val_file: TokenFile | None,
    ) -> None:
        self.config, self.device, self.model, self.batches, self.val_file = config, device, model, batches, val_file
        self.optimizer = make_optimizer(
            model, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and has_bf16(device))
        self.out = Path(config.out_dir)
        self.identity = _identity(config, batches.token_file, "bf16" if self.bf16 else "float32")
        self.step = self.saved = self.skipped = self.skipped_in_a_row = 0

    def resume(self) -> None:
        """Load the newest checkpoint that is whole, if there is one of this run."""
        path, notes = newest_checkpoint(self.out / "checkpoints")
        for note in notes:
            _say(note)
        if path is None:
            if notes:
                _say("no checkpoint is whole: starting again from step 0")
            return
        _refuse_other(json.loads((path / "config.json").read_text()), self.identity, path)
        state = load_checkpoint(path, self.model, self.optimizer, device=self.device)
        self.step = self.saved = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def go(self, stop: threading.Event, on_step: Callable[[dict[str, Any], nn.Module], None] | None) -> TrainResult:
        """Run the steps that are left."""
        from tqdm import tqdm

        config, resumed_from = self.config, self.step
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=None if config.progress else True)
        with bar, _Metrics(self.out / "metrics.jsonl", keep=self.step) as metrics:
            while self.step < config.steps and not stop.is_set():
                entry = self.train_step() | self.evaluate_if_due()
                metrics.write(entry)
                bar.set_postfix_str(_postfix(entry), refresh=False)
                bar.update()
                if on_step is not None:
                    on_step(entry, self.model)
                if self.step == config.steps or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self.save(metrics)
                self.give_up_if_hopeless()
            interrupted = self.step < config.steps
            if interrupted:
                if self.step > self.saved:
                    self.save(metrics)
                _say(f"interrupted after step {self.step} of {config.steps}: run it again to go on from there")
        return self.result(metrics.history, resumed_from, interrupted)

    def train_step(self) -> dict[str, Any]:
        """One step of the optimiser, or none where loss or gradient is not finite. Returns its metrics."""
        config, started = self.config, time.perf_counter()
        batch = Batch(*(t.to(self.device) for t in self.batches.batch(self.step)))
        self.step += 1
        lr = learning_rate(
            self.step,
            peak=config.lr,
            steps=config.steps,
            warmup=config.warmup,
            min_ratio=config.min_lr_ratio,
            schedule=config.schedule,
        )
        loss = backward_batch(
            self.model,
            batch,
            accumulate=config.accumulate,
            document_mask=config.document_mask,
            autocast=self.bf16,
        )
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        loss, norm = torch.stack([loss, norm]).tolist()  # the one time that the host waits for the device
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "skipped": not finite,
            "tokens_per_second": round(batch.tokens.numel() / seconds, 1),
        }

    def evaluate_if_due(self) -> dict[str, Any]:
        """val_loss and val_bits_per_byte: on all of the validation text after the last step, on a part before."""
        last, every = self.step == self.config.steps, self.config.eval_every
        if self.val_file is None or not (last or (every and self.step % every == 0)):
            return {}
        loss = self.evaluate(None if last else self.config.eval_batches)
        return {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, self.val_file)}

    def evaluate(self, max_batches: int | None) -> float:
        return evaluate(
            self.model,
            self.val_file,
            batch_size=self.config.batch_size // self.config.accumulate,
            seq_len=self.config.seq_len,
            max_batches=max_batches,
            document_mask=self.config.document_mask,
            autocast=self.bf16,
            progress=self.config.progress,
        )

    def save(self, metrics: _Metrics) -> None:
        metrics.sync()
        save_checkpoint(
            self.out / "checkpoints",
            self.step,
            self.model,
            self.optimizer,
            config=self.identity,
            progress={"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row},
            device=self.device,
            keep_last=self.config.keep_last,
        )
        self.saved = self.step

    def give_up_if_hopeless(self) -> None:
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise UserError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {self.step}: "
                f"lower lr (now {self.config.lr}) or lengthen warmup (now {self.config.warmup})"
            )

    def result(self, history: list[dict[str, Any]], resumed_from: int, interrupted: bool) -> TrainResult:
        """What `train` returns. A run that was complete before is evaluated anew."""
        last = history[-1] if history else {}
        val_loss = last.get("val_loss")
        if self.val_file is not None and not interrupted and resumed_from == self.config.steps:
            val_loss = self.evaluate(None)
        speed = [entry["tokens_per_second"] for entry in history]
        return TrainResult(
            model=self.model,
            history=history,
            step=self.step,
            interrupted=interrupted,
            resumed_from=resumed_from,
            skipped=self.skipped,
            loss=last.get("loss"),
            val_loss=val_loss,
            bits_per_byte=None if val_loss is None else bits_per_byte(val_loss, self.val_file),
            tokens_per_second=statistics.median(speed) if speed else None,
        )


def _postfix(entry: dict[str, Any]) -> str:
    loss = "not finite, skipped" if entry["skipped"] else f"{entry['loss']:.3f}"
    return f"loss {loss}, lr {entry['lr']:.2e}, {entry['tokens_per_second']:,.0f} tokens/s"


def _say(sentence: str) -> None:
    """A line for the person at the terminal, beside a progress bar."""
    from tqdm import tqdm

    tqdm.write(sentence, file=sys.stderr)


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    on_step: Callable[[dict[str, Any], nn.Module], None] | None = None,
) -> TrainResult:
    """Train a model; go on from the newest whole checkpoint in `config.out_dir` when there is one.

    Interrupted in any way and called again, the run ends with the same weights, to the last bit, as one that was left
    in peace (same device, same number of threads). On SIGINT or SIGTERM it saves and returns.

    Args:
        model: weights to start from; None means fresh ones from `config.seed`. A checkpoint replaces them.
        prepare: applied to the model on its device before the optimiser is made: parallelism, activation checkpointing.
        on_step: called after each step with its metrics and the model; an exception ends the run.

    Raises:
        UserError: the data does not fit the configuration, `out_dir` belongs to another run or is in use, the disk is
            full, or loss and gradient were not finite `max_skipped` times in a row.
    """
    device = _device(config.device)
    train_file = _open_tokens(config.train_data, config)
    val_file = _open_tokens(config.val_data, config) if config.val_data else None
    batches = Batches(train_file, config.batch_size, config.seq_len, config.seed)
    out = Path(config.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise UserError(f"{out} cannot be the folder of a run: {error.strerror or error}") from error
    with _alone(out), _own_randomness(config.seed, device), _stop_on_signal() as stop:
        model = Transformer(config.model) if model is None else model
        model = model.to(device, torch.float32).train()
        model = model if prepare is None else prepare(model)
        if config.compile:
            model.compile(dynamic=False)
        run = _Run(config, device, model, batches, val_file)
        run.resume()
        return run.go(stop, on_step)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but this machine or this torch has no CUDA; use 'cpu' or 'auto'")
    return torch.device(name)


def _open_tokens(path: str, config: TrainConfig) -> TokenFile:
    file = TokenFile(path)
    if file.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{path} has ids up to {file.vocab_size - 1}, the model's vocab_size is {config.model.vocab_size}: "
            f"make it at least {file.vocab_size}"
        )
    return file
