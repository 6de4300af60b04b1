"""Several ranks on this machine's CPU, forked from a running program: for tests and lessons."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tqdm import tqdm

from llama_edu.errors import UserError

__all__ = ["RankError", "run_ranks"]

_GRACE = 1.0  # seconds in which other ranks may still say what they died of


class RankError(RuntimeError):
    """A rank failed. `rank` is the first that did, `detail` its traceback."""

    def __init__(self, rank: int, sentence: str, detail: str = "") -> None:
        super().__init__(f"rank {rank}: {sentence}")
        self.rank, self.detail = rank, detail


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `fn(*args)` on every rank of a new gloo process group. Returns what each returned, by rank.

    The ranks are forks of this process: they start in a tenth of a second, `fn` may be a closure or a function of a
    notebook, and large arguments are shared, not copied. Each computes with one thread. What they print appears here
    when all are done, rank after rank. Results travel by pickle.

    Args:
        fn: uses `torch.distributed` as a program under torchrun would; RANK, LOCAL_RANK and WORLD_SIZE are set.
        timeout: seconds, for all of it and for each collective.

    Raises:
        RankError: a rank raised, died or did not finish; the others are ended. It names the rank that failed first.
        UserError: this process cannot fork ranks.
    """
    if not hasattr(os, "fork"):
        raise UserError("this system cannot fork processes: start ranks with torchrun instead of run_ranks")
    if torch.cuda.is_initialized():
        raise UserError("CUDA is in use in this process, and a fork could not use it: start ranks with torchrun")

    folder = Path(tempfile.mkdtemp(prefix="llama_edu_ranks_"))
    pids: dict[int, int] = {}
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _live(fn, args, rank, world_size, folder, timeout)  # does not return
            pids[pid] = rank
        _wait(pids, folder, time.monotonic() + timeout, timeout)
        answers = [pickle.loads((folder / f"{rank}").read_bytes()) for rank in range(world_size)]
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)
    for _, printed in answers:
        print(printed, end="")
    return [value for value, _ in answers]


def _live(fn: Callable, args: tuple, rank: int, world_size: int, folder: Path, timeout: float) -> None:
    """The life of one rank, from fork to exit."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)  # the threads of the parent's pool do not live in a fork
        tqdm.set_lock(threading.RLock())  # the old one is every fork's: a killed rank or a thread may have it
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                torch.distributed.init_process_group(
                    "gloo",
                    init_method=f"file://{folder}/store",
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout),
                )
                value = fn(*args)
                torch.distributed.barrier()  # a rank that leaves early takes messages of others with it
            _write(folder / f"{rank}", (value, printed.getvalue()))
            torch.distributed.destroy_process_group()
            code = 0
        except BaseException as error:
            sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _write(folder / f"{rank}.error", (time.monotonic(), sentence, traceback.format_exc()))
    finally:
        os._exit(code)


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(pickle.dumps(value))
    os.replace(partial, path)


def _wait(pids: dict[int, int], folder: Path, deadline: float, timeout: float) -> None:
    """Wait for all ranks. At the first that fails, hear the others for a moment, and raise the first cause."""
    ended: dict[int, int] = {}
    late, deadline = deadline, deadline + _GRACE  # a collective that gives up after `timeout` may still say so
    while len(ended) < len(pids):
        for pid, rank in pids.items():
            if rank not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[rank] = status
        failed = [rank for rank, status in ended.items() if status != 0]
        if failed and deadline > time.monotonic() + _GRACE:
            deadline = time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    for rank, status in ended.items():
        # Killed by a signal, a rank leaves no sentence, and all others only tell that they lost it.
        if os.WIFSIGNALED(status):
            raise RankError(rank, f"was killed by {signal.Signals(os.WTERMSIG(status)).name}")
    silent = sorted(set(pids.values()) - set(ended))
    if silent and time.monotonic() >= late:
        raise RankError(silent[0], f"did not finish in {timeout:g} s")
    errors = [(*pickle.loads(file.read_bytes()), int(file.stem)) for file in folder.glob("*.error")]
    if errors:
        _, sentence, detail, rank = min(errors)
        error = RankError(rank, sentence, detail)
        error.add_note(detail)
        raise error
    for rank, status in ended.items():
        if status != 0:
            raise RankError(rank, f"ended with exit code {os.waitstatus_to_exitcode(status)} and said nothing")
