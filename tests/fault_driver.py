"""Trains on real ranks under torch's elastic agent and breaks them. Started once by test_parallel_faults.py.

Reads lines of JSON (what to run), answers each with a line of JSON (what came out). It imports torch once and computes
nothing itself: the agent is a fork of it, and the ranks are forks of the agent.
"""

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import llama_edu.training.checkpoint as saving
from llama_edu.config import LlamaConfig
from llama_edu.parallel.compat import takes
from llama_edu.parallel.dims import ParallelPlan
from llama_edu.parallel.engine import ParallelEngine
from llama_edu.parallel.resilience import attempt_store, last_words, limit_waiting
from llama_edu.training.config import TrainConfig
from llama_edu.training.loop import train


def config(job: dict) -> TrainConfig:
    model = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 258, "max_seq_len": 32}
    fields = {
        "model": LlamaConfig(**model),
        "train_data": job["data"],
        "out_dir": job["out"],
        "steps": 12,
        "batch_size": 4,
        "seq_len": 16,
        "lr": 1e-2,
        "warmup": 3,
        "precision": "float32",
        "device": "cpu",
        "checkpoint_every": 2,
        "progress": False,
    }
    return TrainConfig(**fields | job.get("changes", {}))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_saving(fault: dict) -> None:
    """Die in the `count`-th save: before this rank's tensors, or with all tensors written and no name given."""
    name = {"tensors": "_dcp", "name": "_publish"}[fault["where"]]
    original, seen = getattr(saving, name), []

    def broken(*args):
        if args[0] != "load":
            seen.append(None)
            if len(seen) == fault["count"]:
                die()
        return original(*args)

    setattr(saving, name, broken)


class Faulty(ParallelEngine):
    """On one rank, the model's scores are not numbers in one step, or every step takes longer."""

    fault: ClassVar[dict] = {}
    seconds = 60.0
    steps = 0

    def prepare(self, model, config):
        model = super().prepare(model, config)
        limit_waiting(self.seconds)
        return model

    def backward(self, model, batch, count, config, **kwargs):
        self.steps += 1
        if self.fault.get("kind") == "slow":
            time.sleep(0.3)
        hook = None
        if self.fault.get("kind") == "nan" and 0 <= self.steps - self.fault["step"] < self.fault.get("times", 1):
            hook = model.register_forward_hook(lambda module, args, out: out * math.nan)
        try:
            return super().backward(model, batch, count, config, **kwargs)
        finally:
            if hook is not None:
                hook.remove()


@record
def work(job: dict) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the one of the agent
    cfg, rank = config(job), int(os.environ["RANK"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    fault = job.get("fault", {})
    if rank != fault.get("rank") or (attempt and not fault.get("always")):
        fault = {}

    def on_step(entry, model):
        if entry["step"] != fault.get("step"):
            return
        if fault["kind"] == "kill":
            die()
        if fault["kind"] == "raise":
            raise RuntimeError("the memory of this rank is broken")
        if fault["kind"] == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher waits 30 s for one that does not hear
            threading.Event().wait()

    if fault.get("kind") == "save":
        break_saving(fault)
    if job.get("flight"):
        os.environ["LLAMA_EDU_FLIGHT"] = job["flight"]
    with last_words():
        seconds = job.get("timeout", 60.0)
        dist.init_process_group(
            "gloo",
            store=attempt_store(seconds),
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=seconds),
        )
        engine = Faulty(ParallelPlan(**job["plan"]))
        engine.fault, engine.seconds = fault, seconds
        result = train(cfg, engine=engine, on_step=on_step)
        model = engine.whole(result.model, cfg)
        found = {"resumed_from": result.resumed_from, "attempt": attempt, "skipped": result.skipped}
        found["steps"] = [[h["step"], h["loss"], h["skipped"]] for h in result.history]
        if model is not None:
            digest = hashlib.sha256()
            for name, tensor in sorted(model.state_dict().items()):
                assert tensor.isfinite().all(), name
                digest.update(name.encode() + tensor.numpy().tobytes())
            found["weights"] = digest.hexdigest()
        Path(job["answer"], f"{rank}.json").write_text(json.dumps(found))
        engine.barrier()
    dist.barrier()
    dist.destroy_process_group()


def launch(job: dict) -> dict:
    """Run the job under the agent. Returns what each rank said, or how it ended."""
    patience = {"shutdown_timeout": 2} if takes(LaunchConfig, "shutdown_timeout") else {}  # torch 2.11 waits 30 s
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=math.prod(job["plan"].values()),
        run_id=f"job{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=job.get("restarts", 1),
        monitor_interval=0.05,
        start_method="fork",
        **patience,
    )
    try:
        elastic_launch(settings, work)(job)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        message = failure.message
        return {"failed": message["message"] if isinstance(message, dict) else message}
    return {"ranks": [json.loads(p.read_text()) for p in sorted(Path(job["answer"]).glob("*.json"))]}


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["answer"])
        folder.mkdir(parents=True)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with contextlib.ExitStack():
                    spoken = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
                    os.dup2(spoken, 2)
                    os.dup2(spoken, 1)
                    found = launch(job)
                    (folder / "found").write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.waitpid(pid, 0)
        spoken = (folder / "stderr").read_text(errors="replace")
        found = json.loads((folder / "found").read_text()) if (folder / "found").exists() else {}
        print(json.dumps(found | {"stderr": spoken}), flush=True)


if __name__ == "__main__":
    serve()
