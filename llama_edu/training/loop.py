"""The training loop: one configuration in, a trained model out, whatever interrupts it on the way."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama_edu.config import LlamaConfig
from llama_edu.data.stream import TokenStream
from llama_edu.data.tokens import IGNORE, Batch, TokenFile
from llama_edu.errors import UserError
from llama_edu.training import checks
from llama_edu.training.board import open_boards
from llama_edu.training.checkpoint import (
    Saver,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    rng_state,
    set_rng_state,
    write_json,
)
from llama_edu.training.config import TrainConfig
from llama_edu.training.early import Watch, epochs_line
from llama_edu.training.engine import Engine, agreed
from llama_edu.training.evaluation import bits_per_byte
from llama_edu.training.metrics import Metrics
from llama_edu.training.process import alone, own_randomness, say, stop_on_signal
from llama_edu.training.reading import Reader
from llama_edu.training.result import Sampler, TrainResult
from llama_edu.training.schedule import batch_size_at, learning_rate
from llama_edu.training.utilisation import has_bf16, measured_peak, mfu, published_peak

__all__ = ["TrainResult", "train"]

_PROGRESS = ("tokens", "sequence", "skipped", "skipped_in_a_row", "rewinds")


class _Run:
    """A run under way: what `train` sets up, how it goes on from a checkpoint, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        model: nn.Module,
        stream: TokenStream,
        val_file: TokenFile | None,
        sampler: Sampler | None,
        inform: Callable[[str], None] | None,
    ) -> None:
        self.config, self.engine, self.model, self.stream, self.val_file = config, engine, model, stream, val_file
        self.sampler, self._inform = sampler, inform
        self.device = engine.device(config.device)
        self.optimizer = engine.optimizer(model, config)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and has_bf16(self.device))
        self.out = Path(config.out_dir)
        self.saver = Saver(
            self.out / "checkpoints",
            engine,
            device=self.device,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
        )
        self.progress = config.progress and engine.rank == 0
        # Where the run stands: steps done, tokens trained on, and the number of the next sequence to be read. The last
        # two differ once data was passed over.
        self.step = self.tokens = self.sequence = 0
        self.skipped = self.skipped_in_a_row = self.rewinds = 0
        self.broken: list[int] = []  # ranks whose own loss was not finite in the last step that was skipped
        self.saved = 0
        self.fresh = False
        self.remarks: dict[str, Any] = {}  # for the metrics of the next step
        self.peak = self.measure_peak() if config.mfu else None

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def find_checkpoint(self, *, good: bool = False) -> Path | None:
        """The newest that is whole. Rank 0 looks, and tells all."""
        found: tuple[Path | None, list[str]] = (None, [])
        with agreed(self.engine):
            if self.engine.rank == 0:
                found = newest_checkpoint(self.saver.folder, good=good)
        path, notes = self.engine.broadcast([found[0] and str(found[0]), found[1]])
        for note in notes:
            self.tell(note)
        if notes and path is None and not good:
            self.tell("no checkpoint is whole: starting again from step 0")
        return path and Path(path)

    def load(self, path: Path) -> None:
        """Put model, optimiser, generators and position to where a checkpoint has them."""
        state = load_checkpoint(
            path, self.model, self.optimizer, device=self.device, engine=self.engine, verified=True, progress=_PROGRESS
        )
        self.step = self.saved = state["step"]
        for name in _PROGRESS:
            setattr(self, name, state[name])

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is one of this run."""
        path = self.find_checkpoint()
        if path is None:
            return
        with agreed(self.engine):
            seen = read_state(path, _PROGRESS)["sequence"]
            checks.refuse_other(json.loads((path / "config.json").read_text()), self.identity(seen), path)
        self.load(path)

    def identity(self, sequence: int) -> dict[str, Any]:
        precision = self.config.precision
        if precision == "auto":
            precision = "bf16" if self.bf16 else "float32"
        return checks.identity(self.config, self.stream, precision, sequence)

    def save(self, metrics: Metrics, *, background: bool = False) -> None:
        started = time.perf_counter()
        metrics.sync()
        self.saver.save(
            self.step,
            self.model,
            self.optimizer,
            config=self.identity(self.sequence),
            progress={name: getattr(self, name) for name in _PROGRESS},
            good=self.skipped_in_a_row == 0,
            background=background,
        )
        self.saved = self.step
        self.remarks["checkpoint_seconds"] = round(time.perf_counter() - started, 4)

    def measure_peak(self) -> float:
        """FLOP/s of all devices: what the maker states for bfloat16, or what a large product reaches."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        low = self.bf16 or self.config.precision == "bf16_copies"
        peak = published_peak(name) if low else None
        if peak is None:
            before = rng_state(self.device)
            peak = measured_peak(self.device, torch.bfloat16 if low else torch.float32)
            set_rng_state(before, self.device)
        return peak * self.engine.world_size

    # --- the loop -----------------------------------------------------------------------------------------------------

    def go(self, stop: threading.Event, on_step: Callable[[dict[str, Any], nn.Module], None] | None) -> TrainResult:
        from tqdm import tqdm

        config, engine, resumed_from = self.config, self.engine, self.step
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=None if self.progress else True)
        reader = Reader(self.stream, engine, config.data_workers)
        with agreed(engine):
            boards = open_boards(config, self.step) if engine.rank == 0 else []
        folder = self.out if engine.rank == 0 else None
        with agreed(engine):
            metrics = Metrics(folder, keep=self.step, rewinds=self.rewinds, boards=boards)
        watch = Watch(config, self.inform, self.tell) if self.fresh else None
        self.inform(epochs_line(config, self.stream))
        try:
            with bar, metrics, reader:
                while self.step < config.steps:
                    started = time.perf_counter()
                    reader.fetch(self.upcoming())
                    if engine.any(stop.is_set() or reader.failed or self.saver.failed or metrics.failed):
                        self.saver.wait()
                        reader.check()
                        break
                    entry = self.train_step(reader.take(), started) | self.evaluate_if_due() | self.sample_if_due()
                    metrics.write(entry)
                    bar.set_postfix_str(_postfix(entry), refresh=False)
                    bar.update()
                    if watch is not None:
                        watch.look(entry)
                    if on_step is not None:
                        on_step(entry, self.model)
                    if (
                        self.step < config.steps
                        and config.checkpoint_every
                        and self.step % config.checkpoint_every == 0
                    ):
                        self.save(metrics, background=config.async_checkpoint)
                    if self.skipped_in_a_row >= config.max_skipped:
                        self.rewind(metrics)
                        bar.n = self.step
                if self.step > self.saved:
                    self.save(metrics)
                self.saver.wait()
                with agreed(engine):
                    metrics.check()
        finally:
            self.saver.close()
        interrupted = self.step < config.steps
        if interrupted:
            self.tell(f"interrupted after step {self.step} of {config.steps}: run it again to go on from there")
        return self.result(metrics.history, resumed_from, interrupted)

    def upcoming(self) -> list[tuple[int, int]]:
        """The batches (first sequence, count) of this step and of those that are read ahead."""
        batches, sequence, tokens = [], self.sequence, self.tokens
        for _ in range(1 + self.config.data_workers):
            count = batch_size_at(tokens, self.config.batch_size, self.config.batch_ramp)
            batches.append((sequence, count))
            sequence, tokens = sequence + count, tokens + count * self.config.seq_len
        return batches

    def train_step(self, batch: Batch, started: float) -> dict[str, Any]:
        """One step of the optimiser, or none where loss or gradient is not finite. Returns its metrics."""
        config, engine = self.config, self.engine
        size = batch_size_at(self.tokens, config.batch_size, config.batch_ramp)
        self.step, self.sequence, self.tokens = self.step + 1, self.sequence + size, self.tokens + size * config.seq_len
        lr = learning_rate(
            self.step,
            peak=config.lr,
            steps=config.steps,
            warmup=config.warmup,
            min_ratio=config.min_lr_ratio,
            schedule=config.schedule,
        )
        batch = Batch(*(t.to(self.device) for t in batch))
        count = engine.total((batch.targets != IGNORE).sum())
        part = engine.backward(self.model, batch, count, config, autocast=self.bf16)
        loss = engine.total(part)
        norm = engine.clip(self.model, config.clip, self.optimizer)
        loss, norm = torch.stack([loss, norm]).tolist()  # the one time that the host waits for the device
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite and engine.world_size > 1:  # the same decision on all ranks, so all are asked
            broken = engine.gather(not bool(part.isfinite()))
            self.broken = self.remarks["nonfinite_ranks"] = [rank for rank, found in enumerate(broken) if found]
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        entry = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "skipped": not finite,
            "tokens_per_second": round(size * config.seq_len / (time.perf_counter() - started), 1),
        }
        remarks, self.remarks = self.remarks, {}
        if self.peak is not None:
            share = mfu(config.model, entry["tokens_per_second"], seq_len=config.seq_len, peak=self.peak)
            entry["mfu"] = round(share, 4)
        return entry | remarks

    def rewind(self, metrics: Metrics) -> None:
        """Back to the last good checkpoint, and on with the data after what was read: it may be what did the harm.

        Raises UserError where there is none, or it has been tried often enough.
        """
        config, bad, at = self.config, self.skipped_in_a_row, self.step
        self.saver.wait()
        path = self.find_checkpoint(good=True) if self.rewinds < config.max_rewinds else None
        fault = f"loss or gradient was not finite in {bad} steps in a row, up to step {at}"
        if self.broken:
            fault += f", there on {'rank' if len(self.broken) == 1 else 'ranks'} {', '.join(map(str, self.broken))}"
        if path is None:
            often = f", and {self.rewinds} times before that" if self.rewinds else ""
            raise UserError(f"{fault}{often}: lower lr (now {config.lr}) or lengthen warmup (now {config.warmup})")
        reached, skipped, rewinds = self.sequence, self.skipped, self.rewinds + 1
        self.load(path)
        passed_over = reached - self.sequence
        self.sequence, self.skipped, self.rewinds, self.skipped_in_a_row = reached, skipped, rewinds, 0
        if self.engine.rank == 0:
            for newer in checkpoints(self.saver.folder):  # the run has left the way that leads to them
                if newer.name > path.name:
                    shutil.rmtree(newer, ignore_errors=True)
        self.engine.barrier()
        metrics.rewind(self.step, rewinds)
        self.remarks = {"rewound_from": at, "sequences_passed_over": passed_over, "rewinds": rewinds}
        self.tell(f"{fault}: back to step {self.step}, and on without the {passed_over} sequences read since")

    def evaluate_if_due(self) -> dict[str, Any]:
        """val_loss and val_bits_per_byte: on all of the validation text after the last step, on a part before."""
        last, every = self.step == self.config.steps, self.config.eval_every
        if self.val_file is None or not (last or (every and self.step % every == 0)):
            return {}
        loss = self.evaluate(None if last else self.config.eval_batches)
        return {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, self.val_file)}

    def evaluate(self, max_batches: int | None) -> float:
        return self.engine.evaluate(
            self.model,
            self.val_file,
            self.config,
            max_batches=max_batches,
            autocast=self.bf16,
            progress=self.progress,
        )

    def sample_if_due(self) -> dict[str, Any]:
        """Texts that the model writes. They leave the random numbers of the run as they were."""
        config = self.config
        if self.sampler is None or not config.sample_every or self.step % config.sample_every:
            return {}
        before, prompts = rng_state(self.device), list(config.sample_prompts)
        self.model.eval()
        texts = self.engine.sample(self.model, self.sampler, prompts)
        self.model.train()
        set_rng_state(before, self.device)
        return {} if texts is None else {"samples": [{"prompt": p, "text": t} for p, t in zip(prompts, texts)]}

    def inform(self, sentence: str) -> None:
        """What is good to know: to whom asked for it, or beside a progress bar."""
        if self.engine.rank != 0:
            return
        if self._inform is not None:
            self._inform(sentence)
        elif self.progress and sys.stderr.isatty():
            say(sentence)

    def tell(self, sentence: str) -> None:
        """What should be read."""
        if self.engine.rank == 0:
            say(sentence)

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
            rewinds=self.rewinds,
            loss=last.get("loss"),
            val_loss=val_loss,
            bits_per_byte=None if val_loss is None else bits_per_byte(val_loss, self.val_file),
            tokens_per_second=statistics.median(speed) if speed else None,
        )


def _postfix(entry: dict[str, Any]) -> str:
    loss = "not finite, skipped" if entry["skipped"] else f"{entry['loss']:.3f}"
    text = (
        f"loss {loss}, lr {entry['lr']:.1e}, norm {entry['grad_norm']:.2f}, {entry['tokens_per_second']:,.0f} tokens/s"
    )
    return f"{text}, MFU {entry['mfu']:.0%}" if "mfu" in entry else text


def _fits(config: TrainConfig, model: nn.Module | None, sampler: Sampler | None) -> None:
    if config.sample_every and sampler is None:
        raise UserError(f"sample_every is {config.sample_every}, but there is no sampler: give one, or set it to 0")
    given = getattr(model, "cfg", None)
    if not isinstance(given, LlamaConfig) or given == config.model:
        return
    pairs = ((f.name, getattr(given, f.name), getattr(config.model, f.name)) for f in fields(LlamaConfig))
    differing = "; ".join(f"{name} {one} ({other} in config.model)" for name, one, other in pairs if one != other)
    raise UserError(f"the model is not of the shape config.model: {differing}; set config.model to the model's cfg")


def _computes(device: torch.device) -> None:
    try:
        torch.ones((), device=device).item()
    except Exception as error:  # torch has a type of its own for each reason
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"device is '{device}', which cannot compute here ({reason}); use 'cpu' or 'auto'") from error


def _write_config(config: TrainConfig) -> None:
    path = Path(config.out_dir) / "config.json"
    try:
        write_json(path, config.to_dict())
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror or error}; make room for it, or choose another out_dir"
        ) from error


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    engine: Engine | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    on_step: Callable[[dict[str, Any], nn.Module], None] | None = None,
    sampler: Sampler | None = None,
    inform: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a model; go on from the newest whole checkpoint in `config.out_dir` when there is one.

    Interrupted in any way and called again, the run ends with the same weights, to the last bit, as one that was left
    in peace (same device, same number of threads). On SIGINT or SIGTERM it saves and returns.

    Args:
        model: weights to start from, in the shape `config.model`; None means fresh ones from `config.seed`. A
            checkpoint replaces them.
        engine: how a step is run; None means on one device. Every rank calls `train` with an engine of its own.
        prepare: applied to the whole model before the engine's own preparation.
        on_step: called on every rank after each step with its metrics and the model; an exception ends the run.
        sampler: writes the texts of `config.sample_prompts`: (model, prompts) -> texts.
        inform: takes sentences about the beginning of the run (epochs of the data, first loss); None shows them beside
            a progress bar.

    Raises:
        UserError: model, data or sampler do not fit the configuration, `out_dir` belongs to another run or is in use,
            the disk is full, the loss diverges at once, or loss and gradient were not finite `max_skipped` times in a
            row, again and again.
    """
    engine = Engine() if engine is None else engine
    with ExitStack() as stack:
        with agreed(engine):
            _fits(config, model, sampler)
            device = engine.device(config.device)
            _computes(device)
            stream, val_file = checks.open_data(config)
            for size in {config.batch_size, *(size for _, size in config.batch_ramp)}:
                engine.share(0, size)
            if engine.rank == 0:
                stack.enter_context(alone(Path(config.out_dir)))
        stack.enter_context(own_randomness(config.seed, device))
        stop = stack.enter_context(stop_on_signal())
        fresh = model is None and getattr(engine, "weights", None) is None  # an engine may read pretrained ones
        model = engine.build(config) if model is None else model
        model = engine.prepare(model if prepare is None else prepare(model), config)
        run = _Run(config, engine, model, stream, val_file, sampler, inform)
        run.resume()
        run.fresh = fresh and run.step == 0
        with agreed(engine):
            if engine.rank == 0:
                _write_config(config)
        return run.go(stop, on_step)
