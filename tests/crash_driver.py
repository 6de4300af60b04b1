"""Runs a training in child processes and kills them. Started by test_training.py as `crash_driver.py CASE FOLDER`.

The driver imports torch once and computes nothing itself: a fork after that is safe and costs milliseconds.
"""

import hashlib
import json
import math
import os
import random
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from llama_edu.config import LlamaConfig
from llama_edu.data import open_stream
from llama_edu.errors import UserError
from llama_edu.training.checkpoint import checkpoints, newest_checkpoint
from llama_edu.training.engine import Engine
from llama_edu.training.loop import TrainConfig, train

STEPS = 60


def config(folder: Path, name: str, **changes) -> TrainConfig:
    model = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 258, "max_seq_len": 32}
    fields = {
        "model": LlamaConfig(**model, tie_embeddings=True),
        "train_data": str(folder / "train"),
        "val_data": str(folder / "val"),
        "out_dir": str(folder / name),
        "steps": STEPS,
        "batch_size": 4,
        "seq_len": 16,
        "lr": 1e-2,
        "warmup": 5,
        "eval_every": 20,
        "eval_batches": 2,
        "checkpoint_every": 2,
        "progress": False,
    }
    return TrainConfig(**fields | changes)


class Poisoned(Engine):
    """Where all sequences of a batch are bad, loss and gradient are not finite."""

    def __init__(self, bad: set[bytes]) -> None:
        self.bad = bad

    def backward(self, model, batch, count, config, **kwargs):
        loss = super().backward(model, batch, count, config, **kwargs)
        if all(row.numpy().tobytes() in self.bad for row in batch.tokens):
            for p in model.parameters():
                p.grad.fill_(math.nan)
            loss = loss * math.nan
        return loss


def run(cfg: TrainConfig, on_step=None, outcome: Path | None = None, engine: Engine | None = None) -> None:
    """Train, and write what came out: a hash of the weights, and every loss."""
    try:
        result = train(cfg, on_step=on_step, engine=engine)
    except UserError as error:
        outcome.write_text(json.dumps({"error": str(error)}))
        return
    digest = hashlib.sha256()
    for name, tensor in sorted(result.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    steps = [(h["step"], h["loss"], h["grad_norm"], h["lr"], h.get("val_loss")) for h in result.history]
    found = {"weights": digest.hexdigest(), "steps": steps, "interrupted": result.interrupted, "step": result.step}
    found |= {"skipped": result.skipped, "rewinds": result.rewinds}
    outcome.write_text(json.dumps(found))


def fork(function, *args) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            function(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def complete(cfg: TrainConfig, folder: Path, engine: Engine | None = None) -> dict:
    assert wait(fork(run, cfg, None, folder / "outcome.json", engine)) == 0
    return json.loads((folder / "outcome.json").read_text())


def lines(cfg: TrainConfig) -> list[int]:
    text = (Path(cfg.out_dir) / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def kill_again_and_again(cfg: TrainConfig, folder: Path, kills: int, engine: Engine | None = None) -> int:
    """kill -9 at random moments, and every second time as soon as a save has begun. Returns how many fell into one."""
    dice, saves, cut = random.Random(0), Path(cfg.out_dir) / "checkpoints", 0
    for number in range(kills):
        before = newest_checkpoint(saves)[0]
        other = replace(cfg, data_workers=number % 4)
        pid = fork(run, other, None, folder / "outcome.json", engine)
        if number % 2:
            while not list(saves.glob(".step_*")) and newest_checkpoint(saves)[0] == before:
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.02))
        else:
            time.sleep(dice.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL, "the run ended before it was killed: give it more steps"
        cut += bool(list(saves.glob(".step_*")))
        assert not newest_checkpoint(saves)[1], "what has the name of a checkpoint is whole"
    return cut


def ends_as_in_peace(cfg: TrainConfig, folder: Path, expected: dict, engine: Engine | None = None) -> None:
    assert complete(cfg, folder, engine) == expected
    assert lines(cfg) == list(range(1, cfg.steps + 1))
    assert not list((Path(cfg.out_dir) / "checkpoints").glob(".step_*"))


def kill(folder: Path) -> None:
    """kill -9 twenty times, with another number of data workers each time."""
    expected = complete(config(folder, "left_in_peace", checkpoint_every=0), folder)
    cfg = config(folder, "killed")
    cut = kill_again_and_again(cfg, folder, 20)
    assert cut >= 3, f"only {cut} of 20 kills fell into a save"
    ends_as_in_peace(cfg, folder, expected)


def kill_async(folder: Path) -> None:
    """The same while checkpoints are written in the background, the batch grows, and a mixture changes."""
    mixture = {
        "sources": {"one": str(folder / "train"), "two": str(folder / "val")},
        "weights": {"one": 0.9, "two": 0.1},
        "changes": [{"at": 4096, "weights": {"one": 0.4, "two": 0.6}}],
    }
    more = {"steps": 150, "train_data": mixture, "batch_ramp": ((2000, 6), (5000, 8)), "eval_every": 50}
    expected = complete(config(folder, "left_in_peace", checkpoint_every=0, **more), folder)
    cfg = config(folder, "killed", async_checkpoint=True, checkpoint_every=3, keep_every=30, **more)
    cut = kill_again_and_again(cfg, folder, 20)
    assert cut >= 3, f"only {cut} of 20 kills fell into a save"
    ends_as_in_peace(cfg, folder, expected)
    kept = [path.name for path in checkpoints(Path(cfg.out_dir) / "checkpoints")]
    assert {f"step_{n:08d}" for n in (30, 60, 90, 120, 150)} <= set(kept), kept


def rewind(folder: Path) -> None:
    """Bad data: the run goes back to a checkpoint and on past it; killed at any moment, it takes the same way."""
    rows = open_stream(str(folder / "train"), seq_len=16, seed=0).rows(88, 12).tokens
    engine = Poisoned({row.numpy().tobytes() for row in rows})
    more = {"checkpoint_every": 5, "max_skipped": 3, "async_checkpoint": True}
    peace = config(folder, "left_in_peace", **more)
    expected = complete(peace, folder, engine)
    assert expected["rewinds"] == 1 and expected["skipped"] == 3, expected
    cfg = config(folder, "killed", **more)
    kill_again_and_again(cfg, folder, 12, engine)
    ends_as_in_peace(cfg, folder, expected, engine)
    told = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "checkpoint_seconds")}
            for line in text
        ]
        for text in ((Path(c.out_dir) / "discarded.jsonl").read_text().splitlines() for c in (peace, cfg))
    ]
    assert told[0] == told[1] and [line["step"] for line in told[0]] == [21, 22, 23, 24, 25], told
    assert [line["skipped"] for line in told[0]] == [False, False, True, True, True]
    entry = json.loads((Path(cfg.out_dir) / "metrics.jsonl").read_text().splitlines()[20])
    assert (entry["rewound_from"], entry["sequences_passed_over"], entry["rewinds"]) == (25, 20, 1), entry


def truncate(path: Path) -> None:
    file = next((path / "tensors").glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 100)


def flip(path: Path) -> None:
    file = next((path / "tensors").glob("*.distcp"))
    with open(file, "r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 1]))


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def leave_partial(path: Path) -> None:
    stale = path.with_name(f".step_{int(path.name[5:]) + 2:08d}.partial")
    stale.mkdir()
    (stale / "half").write_bytes(b"left by a killed save")


def damaged(folder: Path) -> None:
    """A run dies, its newest checkpoint is damaged, and it goes on from the one before."""
    expected = complete(config(folder, "left_in_peace", checkpoint_every=0), folder)
    for damage in (truncate, flip, lose_manifest, leave_partial):
        cfg = config(folder, damage.__name__, checkpoint_every=10)

        def die(entry, model):
            if entry["step"] == 25:
                os.kill(os.getpid(), signal.SIGKILL)

        assert wait(fork(run, cfg, die, folder / "outcome.json")) == -signal.SIGKILL
        damage(checkpoints(Path(cfg.out_dir) / "checkpoints")[-1])
        ends_as_in_peace(cfg, folder, expected)


def signals(folder: Path) -> None:
    """SIGINT and SIGTERM: saved, one line, exit 0; then to the end."""
    expected = complete(config(folder, "left_in_peace", checkpoint_every=0), folder)
    cfg = config(folder, "stopped", checkpoint_every=14, async_checkpoint=True, keep_last=9)
    for number in (signal.SIGINT, signal.SIGTERM):
        at = 15 if number == signal.SIGINT else 33

        def on_step(entry, model, number=number, at=at):
            if entry["step"] == at:
                os.kill(os.getpid(), number)

        assert wait(fork(run, cfg, on_step, folder / "outcome.json")) == 0
        found = json.loads((folder / "outcome.json").read_text())
        assert found["interrupted"] and found["step"] == at, found
        assert [p.name for p in checkpoints(Path(cfg.out_dir) / "checkpoints")][-1].endswith(str(at))
    assert complete(cfg, folder) == expected


def full_disk(folder: Path) -> None:
    """No file may grow beyond a limit: the save fails in a sentence, and what was there goes on."""
    expected = complete(config(folder, "left_in_peace", checkpoint_every=0), folder)

    for behind in (False, True):
        cfg = config(folder, f"full_{behind}", checkpoint_every=10, async_checkpoint=behind)

        def limit(entry, model, whole=Path(cfg.out_dir) / "checkpoints" / "step_00000020"):
            while entry["step"] == 25 and not whole.exists():
                time.sleep(0.01)
            if entry["step"] == 25:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        assert wait(fork(run, cfg, limit, folder / "outcome.json")) == 0
        error = json.loads((folder / "outcome.json").read_text())["error"]
        assert "step 30 could not be written" in error and "too large" in error and "\n" not in error, error
        kept = Path(cfg.out_dir) / "checkpoints"
        assert sorted(p.name for p in kept.iterdir()) == ["step_00000010", "step_00000020"]
        assert newest_checkpoint(kept)[0].name == "step_00000020"
        assert lines(cfg)[-1] in ((30,), range(30, 41))[behind]  # behind the run's back: told a few steps later
        assert complete(cfg, folder) == expected


class Pair(Engine):
    """Two processes, each with half of a batch and the whole model: the least that can disagree."""

    world_size = 2

    def __init__(self, rank: int, meeting: Path, bad: int | None = None) -> None:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        self.rank, self.bad = rank, bad
        self.saving_group = dist.new_group(backend="gloo")

    def share(self, first, count):
        if count % 2:
            raise UserError(f"batch_size {count} does not divide by the 2 ranks")
        if self.rank == 1 and self.bad is not None and first >= self.bad:
            raise UserError("the disk of the tokens is gone")
        return first + self.rank * (count // 2), count // 2

    def backward(self, model, batch, count, config, **kwargs):
        loss = super().backward(model, batch, count, config, **kwargs)
        for p in model.parameters():
            dist.all_reduce(p.grad)
        return loss

    def total(self, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    def any(self, flag):
        return bool(self.total(torch.tensor(int(flag))))

    def gather(self, value):
        values = [None] * 2
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def barrier(self):
        dist.barrier()


def pair(cfg: TrainConfig, folder: Path, on_step=(None, None), kill_after: float | None = None, **how) -> list[dict]:
    """Run on two ranks. Returns what came out on each."""
    meeting = folder / f"meeting_{time.monotonic_ns()}"

    def one(rank: int) -> None:
        engine = Pair(rank, meeting, **how)
        run(cfg, on_step[rank], folder / f"outcome_{rank}.json", engine)
        engine.barrier()
        dist.destroy_process_group()

    pids = [fork(one, rank) for rank in range(2)]
    if kill_after is not None:
        time.sleep(kill_after)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    codes = [wait(pid) for pid in pids]
    if kill_after is not None:
        assert codes == [-signal.SIGKILL] * 2, "the run ended before it was killed"
        return []
    assert codes == [0, 0], codes
    return [json.loads((folder / f"outcome_{rank}.json").read_text()) for rank in range(2)]


def ranks(folder: Path) -> None:
    """Two processes agree: on what they compute, on signals, on errors of one, and on what they go on from."""
    same = {"checkpoint_every": 0, "steps": 40, "precision": "float32"}  # bfloat16 sums of halves differ by more
    alone = complete(config(folder, "alone", **same), folder)
    cfg = config(folder, "peace", **same)
    expected = pair(cfg, folder)
    assert expected[0]["weights"] == expected[1]["weights"]
    assert expected[0]["steps"] == expected[1]["steps"]
    assert all(abs(a[1] - b[1]) < 1e-3 for a, b in zip(alone["steps"], expected[0]["steps"]))
    assert lines(cfg) == list(range(1, 41))

    cfg = config(folder, "pair", checkpoint_every=3, steps=40, async_checkpoint=True, precision="float32")

    def stop(entry, model):
        if entry["step"] == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    found = pair(cfg, folder, (None, stop))  # only rank 1 hears it
    assert all(one["interrupted"] and one["step"] == 10 for one in found), found
    for number in range(4):
        pair(cfg, folder, kill_after=0.5 + 0.1 * number)
        assert not newest_checkpoint(Path(cfg.out_dir) / "checkpoints")[1]
    found = pair(cfg, folder, bad=4 * 30)
    assert found[1] == {"error": "the disk of the tokens is gone"}, found
    assert found[0] == {"error": "rank 1: the disk of the tokens is gone"}, found
    found = pair(cfg, folder)
    assert [one["weights"] for one in found] == [one["weights"] for one in expected]
    assert found[0]["steps"] == expected[0]["steps"] and lines(cfg) == list(range(1, 41))

    found = pair(config(folder, "odd", batch_size=5), folder)
    assert all(one == {"error": "batch_size 5 does not divide by the 2 ranks"} for one in found), found

    def limit(entry, model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    found = pair(config(folder, "full", checkpoint_every=5, async_checkpoint=True), folder, (limit, None))
    assert all("step 5 could not be written" in one["error"] for one in found), found


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
