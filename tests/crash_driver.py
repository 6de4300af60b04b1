"""Runs a training in child processes and kills them. Started by test_training.py as `crash_driver.py CASE FOLDER`.

The driver imports torch once and computes nothing itself: a fork after that is safe and costs milliseconds.
"""

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from llama_edu.config import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.training.checkpoint import checkpoints, newest_checkpoint
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


def run(cfg: TrainConfig, on_step=None, outcome: Path | None = None) -> None:
    """Train, and write what came out: a hash of the weights, and every loss."""
    try:
        result = train(cfg, on_step=on_step)
    except UserError as error:
        outcome.write_text(json.dumps({"error": str(error)}))
        return
    digest = hashlib.sha256()
    for name, tensor in sorted(result.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    steps = [(h["step"], h["loss"], h["grad_norm"], h["lr"], h.get("val_loss")) for h in result.history]
    found = {"weights": digest.hexdigest(), "steps": steps, "interrupted": result.interrupted, "step": result.step}
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


def complete(cfg: TrainConfig, folder: Path) -> dict:
    assert wait(fork(run, cfg, None, folder / "outcome.json")) == 0
    return json.loads((folder / "outcome.json").read_text())


def lines(cfg: TrainConfig) -> list[int]:
    text = (Path(cfg.out_dir) / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def kill(folder: Path) -> None:
    """kill -9 twenty times: at random moments, and every second time as soon as a save has begun."""
    expected = complete(config(folder, "left_in_peace", checkpoint_every=0), folder)
    cfg, dice = config(folder, "killed"), random.Random(0)
    saves = Path(cfg.out_dir) / "checkpoints"
    cut = 0
    for number in range(20):
        before = newest_checkpoint(saves)[0]
        pid = fork(run, cfg, None, folder / "outcome.json")
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
    assert cut >= 3, f"only {cut} of 20 kills fell into a save"
    assert complete(cfg, folder) == expected
    assert lines(cfg) == list(range(1, cfg.steps + 1))
    assert not list(saves.glob(".step_*"))


def signals(folder: Path) -> None:
    """SIGINT and SIGTERM: saved, one line, exit 0; then to the end."""
    expected = complete(config(folder, "left_in_peace", checkpoint_every=0), folder)
    cfg = config(folder, "stopped", checkpoint_every=0)
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
    cfg = config(folder, "full", checkpoint_every=10)

    def limit(entry, model):
        if entry["step"] == 25:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    assert wait(fork(run, cfg, limit, folder / "outcome.json")) == 0
    error = json.loads((folder / "outcome.json").read_text())["error"]
    assert "step 30 could not be written" in error and "too large" in error and "\n" not in error, error
    kept = Path(cfg.out_dir) / "checkpoints"
    assert sorted(p.name for p in kept.iterdir()) == ["step_00000010", "step_00000020"]
    assert newest_checkpoint(kept)[0].name == "step_00000020"
    assert complete(cfg, folder) == expected


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
