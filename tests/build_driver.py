"""Builds shards in child processes and kills them. Started by test_data_build.py as `build_driver.py FOLDER WORKERS`.

The driver imports torch once and computes nothing with it: a fork after that is safe and costs milliseconds.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from slow_tokenizer import SlowTokenizer

from llama_edu.data.build import write_shards

TEXTS = [f"document {i} " * (i % 9 + 1) for i in range(300)]


def build(folder: Path, workers: int, seconds: float = 0.001) -> None:
    write_shards(TEXTS, SlowTokenizer(seconds), folder, workers=workers, shard_bytes=600)


def fork(*args) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)  # its workers are in this group too
            build(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def group_lives(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    return True


def content(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main(folder: Path, workers: int) -> None:
    peace, killed, dice = folder / "peace", folder / "killed", random.Random(workers)
    build(peace, 0, 0.0)
    expected = content(peace)
    assert len(list(peace.glob("shard-*"))) > 20
    cut = 0
    for _ in range(3 if workers else 12):
        before = {p.name: (p / "meta.json").stat().st_mtime_ns for p in killed.glob("shard-*")}
        pid = fork(killed, workers)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("shard-*"))) == len(before) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL, "the build ended before it was killed: give it more text"
        deadline = time.monotonic() + 60
        while group_lives(pid):
            assert time.monotonic() < deadline, "a worker outlives the build that was killed"
            time.sleep(0.01)
        cut += bool(list(killed.glob(".shard-*")))
        shards = {p.name: (p / "meta.json").stat().st_mtime_ns for p in killed.glob("shard-*")}
        assert before.items() <= shards.items(), "what was whole is not written again"
        assert not (killed / "index.json").exists()
    assert workers or cut >= 3, f"only {cut} kills fell into the writing of a shard"
    build(killed, 2 if workers == 1 else 1 if workers else 0)
    assert content(killed) == expected


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
