"""What a run takes from its process and gives back: signals, the lock of its folder, random generators, a voice."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llama_edu.errors import UserError
from llama_edu.training.checkpoint import rng_state, set_rng_state

__all__ = ["alone", "own_randomness", "say", "stop_on_signal"]


def say(sentence: str) -> None:
    """A line for the person at the terminal, beside a progress bar."""
    from tqdm import tqdm

    tqdm.write(sentence, file=sys.stderr)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
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
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second run. The lock ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"{folder} cannot be the folder of a run: {error.strerror or error}") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no POSIX locks here
            pass
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {folder}: wait for it, or choose another out_dir") from error
        yield


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
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
