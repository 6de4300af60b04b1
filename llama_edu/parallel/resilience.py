"""When a rank fails: which one, why, in one sentence; and a flight recorder of collectives that outlives its process.

A job of many ranks dies of one of them, and all others only tell that they lost it. `last_words` around a rank's work
finds the first cause; restarting is the launcher's part (`torchrun --max-restarts`), going on from the newest whole
checkpoint that of `train`.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import re
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama_edu.errors import UserError
from llama_edu.parallel.launch import RankError

__all__ = [
    "FlightRecorder",
    "FlightReport",
    "attempt_store",
    "first_cause",
    "last_words",
    "limit_waiting",
    "read_flight_records",
]

FLIGHT = "LLAMA_EDU_FLIGHT"  # environment variable: the folder of flight records; they are off without it


def attempt_store(timeout: float = 600.0) -> dist.Store:
    """The store at which the ranks of this attempt meet, for `init_process_group(store=...)`.

    The agent of torch 2.13 keeps one store for all attempts. In it a restarted rank may find the address of a process
    that is dead, and call there in vain; under a name of its own, an attempt finds only its own addresses.

    Args:
        timeout: seconds to wait for the store and for what is looked up in it.
    """
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def limit_waiting(timeout: float) -> None:
    """Let every collective of this rank, in any group that exists, fail after so many seconds.

    `init_process_group` limits the default group alone: groups made later, those of a mesh too, wait half an hour for a
    rank that hangs.
    """
    c10d = dist.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=timeout), group)


# --- the first cause ----------------------------------------------------------------------------------------------


@contextmanager
def last_words(folder: str | Path | None = None, *, grace: float = 3.0) -> Iterator[None]:
    """Around all that a rank does: when it fails, the first cause is found, told once on stderr, and raised.

    A rank that raises says why before its connections close, so its words are there when the others notice. One that
    has none was killed, or hangs. Where LLAMA_EDU_FLIGHT names a folder, collectives are recorded in it; under torchrun
    in its folder attempt_N, so that a restart leaves the records of the attempt that failed.

    Args:
        folder: where the ranks of this attempt leave their words, a new one for each attempt; of several hosts, on a
            disk they share. None: beside the error files of torchrun; without it, nothing is done.
        grace: seconds that a rank waits for words of others that still live; and that one which gets SIGTERM has to
            fail by itself and say why, before it is ended.

    Raises:
        RankError: on every rank that can still speak, the same.
    """
    folder = _attempt_folder() if folder is None else Path(folder)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with ExitStack() as stack:
        if os.environ.get(FLIGHT):
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
            records = Path(os.environ[FLIGHT], *([] if attempt is None else [f"attempt_{attempt}"]))
            stack.enter_context(FlightRecorder(records, rank))
        if folder is None:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"rank_{rank}.alive", {"pid": os.getpid(), "host": socket.gethostname(), "world": world_size})
        # The launcher ends all ranks when it has seen one fail, perhaps before this one has noticed: first tell why.
        end = threading.Timer(grace, os._exit, (128 + signal.SIGTERM,))
        end.daemon = True
        before = _on_sigterm(lambda *_: end.is_alive() or end.start())
        try:
            yield
            _on_sigterm(before)
            end.cancel()
        except Exception as error:
            _on_sigterm(signal.SIG_IGN)
            end.cancel()
            words = {"time": time.time(), "sentence": _sentence(error), "lost": _lost(error)}
            _write(folder / f"rank_{rank}.words", words | {"detail": traceback.format_exc()})
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline and _awaited(folder, world_size):
                time.sleep(0.02)
            guilty, sentence = first_cause(folder) or (rank, words["sentence"])
            with suppress(FileExistsError):
                (folder / "told").touch(exist_ok=False)
                print(f"llama-edu: rank {guilty}: {sentence}", file=sys.stderr, flush=True)
            raise RankError(guilty, sentence, words["sentence"]) from error


def _on_sigterm(handler: Any) -> Any:
    """Set the handler and return the one before; only the main thread may."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)


def first_cause(folder: str | Path) -> tuple[int, str] | None:
    """Which rank failed first, and how, from what the ranks of one attempt left in a folder; None: nobody failed.

    A rank that failed by itself comes before those without words, and these before ranks that lost somebody.
    """
    folder = Path(folder)
    words = {int(file.stem[5:]): json.loads(file.read_text()) for file in folder.glob("rank_*.words")}
    if not words:
        return None
    own = {rank: word for rank, word in words.items() if not word["lost"]}
    if own:
        rank = min(own, key=lambda r: (_hearsay(own[r]["sentence"]) is not None, own[r]["time"]))
        sentence = own[rank]["sentence"]
        return (rank, sentence) if _hearsay(sentence) is None else _hearsay(sentence)
    alive = {int(file.stem[5:]): json.loads(file.read_text()) for file in folder.glob("rank_*.alive")}
    world = max(entry["world"] for entry in alive.values())
    silent = sorted(set(range(world)) - set(words))
    first = min(words, key=lambda r: words[r]["time"])
    seen = f"rank {first} noticed: {words[first]['sentence']}"
    ended = [rank for rank in silent if rank not in alive or not _lives(alive[rank])]
    if ended:
        more = f", and so {_ranks(ended[1:], 'was', 'were')}" if ended[1:] else ""
        return ended[0], f"was killed without a word (by signal, or out of memory){more}; {seen}"
    if silent:
        more = f", nor {_ranks(silent[1:], 'does', 'do')}" if silent[1:] else ""
        return silent[0], f"does not answer{more}; {seen}"
    return first, words[first]["sentence"]


def _ranks(ranks: list[int], one: str, many: str) -> str:
    return f"{one if len(ranks) == 1 else many} rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _attempt_folder() -> Path | None:
    """torchrun gives each worker ATTEMPT/LOCAL_RANK/error.json."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parent.parent / "words" if file else None


def _sentence(error: BaseException) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    text = re.sub(r"\[/\S+:\d+\]\s*", "", " ".join(text.split()))  # gloo begins with its line of source
    if _lost(error):
        text = text.partition(". ")[0]
    return text[:300]


def _lost(error: BaseException | None) -> bool:
    """Whether it is only the loss of another rank: gloo and NCCL say so, or what was raised from it."""
    while error is not None:
        if isinstance(error, dist.DistError) or re.search(
            r"\bgloo\b|\bNCCL\b|[Cc]onnection (closed|reset)", str(error)
        ):
            return True
        error = error.__cause__
    return False


def _hearsay(sentence: str) -> tuple[int, str] | None:
    """What `agreed` raised on ranks that did not fail themselves: "rank 2: ..."."""
    found = re.match(r"rank (\d+): (.*)", sentence)
    return found and (int(found[1]), found[2])


def _awaited(folder: Path, world_size: int) -> bool:
    """Some rank has said nothing and may still."""
    for rank in range(world_size):
        if not (folder / f"rank_{rank}.words").exists():
            try:
                entry = json.loads((folder / f"rank_{rank}.alive").read_text())
            except FileNotFoundError:
                return True
            if _lives(entry):
                return True
    return False


def _lives(entry: dict[str, Any]) -> bool:
    """Whether the process runs; of another host's, nothing is known, and it is taken to run."""
    if entry["host"] != socket.gethostname():
        return True
    try:
        os.kill(entry["pid"], 0)
        return Path(f"/proc/{entry['pid']}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's, or this system has no /proc
        return not Path("/proc/self/stat").exists()


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


# --- the flight recorder ------------------------------------------------------------------------------------------

_WIDTH = 320  # bytes of a record, a line of JSON padded with blanks
_OPERATIONS = (
    "allreduce allreduce_coalesced broadcast reduce gather scatter barrier monitored_barrier "
    "allgather _allgather_base all_gather_single allgather_coalesced allgather_into_tensor_coalesced "
    "all_gather_single_coalesced reduce_scatter _reduce_scatter_base reduce_scatter_single "
    "reduce_scatter_tensor_coalesced reduce_scatter_single_coalesced alltoall alltoall_base all_to_all_single"
).split()


class FlightRecorder:
    """Writes down every collective that Python starts in this process, while it is entered as a context.

    The last `size` records are lines of JSON in a file that is mapped into memory: whatever becomes of the process,
    kill -9 included, they are there for `read_flight_records`. Collectives that compiled code or DTensor start, and
    NCCL's on a device, are in NCCL's own dump (TORCH_NCCL_TRACE_BUFFER_SIZE), which the same reader takes.
    """

    def __init__(self, folder: str | Path, rank: int, *, size: int = 2000) -> None:
        self.path, self.rank, self.size = Path(folder) / f"flight_rank_{rank}.jsonl", rank, size
        self._lock = threading.Lock()
        self._count, self._numbers = 0, {}
        self._open: dict[int, tuple[int, dict[str, Any]]] = {}  # id of the Work -> position and record
        self._originals: list[tuple[type, str, Any]] = []

    def __enter__(self) -> FlightRecorder:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w+b") as file:
            file.write((b" " * (_WIDTH - 1) + b"\n") * self.size)
            file.flush()
            self._map = mmap.mmap(file.fileno(), _WIDTH * self.size)
        for name in _OPERATIONS:
            if name in vars(dist.ProcessGroup):
                self._replace(dist.ProcessGroup, name, self._started)
        self._replace(dist.Work, "wait", self._waited)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        self._originals.clear()

    def _replace(self, owner: type, name: str, wrap: Any) -> None:
        original = getattr(owner, name)
        self._originals.append((owner, name, vars(owner)[name]))  # as it was: `original` would not bind to an object
        setattr(owner, name, wraps(original)(wrap(name, original)))

    def _started(self, name: str, original: Any) -> Any:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            begun = self.begin(name.strip("_"), group.group_name, sizes=_sizes(args))
            work = original(group, *args, **kwargs)
            with self._lock:
                self._open[id(work)] = begun
                if len(self._open) > self.size:
                    del self._open[next(iter(self._open))]
            return work

        return call

    def _waited(self, name: str, original: Any) -> Any:
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            before = time.time()
            done = original(work, *args, **kwargs)
            with self._lock:
                found = self._open.pop(id(work), None)
            if found is not None:
                self.end(*found, waited=time.time() - before)
            return done

        return wait

    def begin(self, operation: str, group: str, *, sizes: Any = ()) -> tuple[int, dict[str, Any]]:
        """A collective starts. Returns what `end` takes."""
        with self._lock:
            self._numbers[group] = number = self._numbers.get(group, 0) + 1
            position, self._count = self._count, self._count + 1
            record = {"rank": self.rank, "group": group, "number": number, "operation": operation}
            record |= {"started": time.time(), "finished": None, "waited": 0.0, "sizes": str(sizes)[:80]}
            self._put(position, record)
        return position, record

    def end(self, position: int, record: dict[str, Any], *, waited: float) -> None:
        """It has ended, after the program stood still for `waited` seconds."""
        with self._lock:
            record |= {"finished": time.time(), "waited": round(waited, 6)}
            if self._count - position <= self.size:  # else its place is taken
                self._put(position, record)

    def _put(self, position: int, record: dict[str, Any]) -> None:
        slot = position % self.size
        line = json.dumps(record).encode()[: _WIDTH - 1].ljust(_WIDTH - 1) + b"\n"
        self._map[slot * _WIDTH : (slot + 1) * _WIDTH] = line


def _sizes(args: tuple) -> list[list[int]]:
    """Shapes of the tensors among the arguments of a collective."""
    found: list[list[int]] = []
    for value in args:
        if hasattr(value, "shape"):
            found.append(list(value.shape))
        elif isinstance(value, (list, tuple)):
            found += _sizes(tuple(value))
    return found


@dataclass(frozen=True)
class FlightReport:
    """What the records of all ranks say together.

    Attributes:
        late: ranks that had not begun the first collective at which others wait; none: they parted together.
        collective: that one, in words; or where ranks called different ones.
        waited: seconds that each rank stood still in collectives; empty for NCCL's dumps.
        slowest: a rank for which the others wait: its own waiting is less than half of theirs; else None.
        records: all of them, by rank.
    """

    late: tuple[int, ...]
    collective: str | None
    waited: dict[int, float]
    slowest: int | None
    records: dict[int, list[dict[str, Any]]]

    def __str__(self) -> str:
        if self.late:
            who = f"rank {self.late[0]} was" if len(self.late) == 1 else f"ranks {', '.join(map(str, self.late))} were"
            return f"{who} late: {self.collective}"
        if self.collective:
            return self.collective
        if self.slowest is not None:
            others = statistics.median(t for rank, t in self.waited.items() if rank != self.slowest)
            return (
                f"rank {self.slowest} is slow: it waited {self.waited[self.slowest]:.2f} s for others, "
                f"and they {others:.2f} s for it"
            )
        return "no rank was late"


def read_flight_records(folder: str | Path) -> FlightReport:
    """Find out from flight records which rank was late, and in which collective.

    Args:
        folder: holds files of `FlightRecorder`, or dumps of NCCL's recorder (a pickle a rank, its name ending in the
            rank; TORCH_NCCL_DEBUG_INFO_TEMP_FILE says where they go). A dump is data: a pickle that asks for anything
            but plain containers and numbers is refused.
    """
    folder = Path(folder)
    records: dict[int, list[dict[str, Any]]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        rank = re.search(r"(\d+)(\.jsonl|\.pickle|\.pkl)?$", file.name)
        if rank is None or not file.is_file() or file.name.startswith("."):
            continue
        if file.suffix == ".jsonl":
            records[int(rank[1])] = _own_records(file)
        else:
            records[int(rank[1])] = _nccl_records(file)
    if not records:
        way_out = f"set {FLIGHT} to a folder before the job starts"
        if attempts := sorted(path.name for path in folder.glob("attempt_*")):
            way_out = f"it has a folder for each attempt, {', '.join(attempts)}: name one"
        raise UserError(f"{folder} holds no flight records: {way_out}")
    late, collective = _late(records)
    timed = {rank: found for rank, found in records.items() if all("waited" in record for record in found)}
    waited = {rank: sum(record["waited"] for record in found) for rank, found in timed.items()}
    slowest = None
    if len(waited) > 1:
        rank = min(waited, key=waited.__getitem__)
        if 2 * waited[rank] < min(time for other, time in waited.items() if other != rank):
            slowest = rank
    return FlightReport(late, collective, waited, slowest, records)


def _own_records(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text(errors="replace").splitlines():
        with suppress(ValueError):  # empty, or cut by a kill
            found.append(json.loads(line))
    return sorted(found, key=lambda record: record["started"])


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it asks for {module}.{name}, and flight records are plain data")


def _nccl_records(file: Path) -> list[dict[str, Any]]:
    try:
        entries = _Plain(io.BytesIO(file.read_bytes())).load()["entries"]
        return [
            {
                "group": str(entry["process_group"][0]),
                "number": entry["collective_seq_id"],
                "operation": entry["profiling_name"].removeprefix("nccl:"),
                "started": entry["time_created_ns"] / 1e9,
                "finished": (entry.get("time_discovered_completed_ns") or 0) / 1e9
                if entry["state"] == "completed"
                else None,
                "sizes": str(entry.get("input_sizes", "")),
            }
            for entry in entries
            if not entry.get("is_p2p")
        ]
    except UserError as error:
        raise UserError(f"{file} is refused: {error}") from None
    except Exception as error:
        raise UserError(f"{file} is no flight record: {type(error).__name__}: {error}") from None


def _late(records: dict[int, list[dict[str, Any]]]) -> tuple[tuple[int, ...], str | None]:
    """Of all collectives that some ranks of a group have begun and others not, the one begun first."""
    groups: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for rank, found in records.items():
        for record in found:
            groups.setdefault(record["group"], {}).setdefault(rank, []).append(record)
    first: tuple[float, tuple[int, ...], str] | None = None
    for members in groups.values():
        last = {rank: max(r["number"] for r in found) for rank, found in members.items()}
        behind = tuple(rank for rank in sorted(last) if last[rank] == min(last.values()))
        ahead = {rank for rank in last if last[rank] > min(last.values())}
        if ahead:
            number = min(last.values()) + 1
            begun = [r for rank in ahead for r in members[rank] if r["number"] == number]
            begun = begun or [min((members[rank][0] for rank in ahead), key=lambda r: r["number"])]
            record = min(begun, key=lambda r: r["started"])
            waiting = ", ".join(map(str, sorted(ahead)))
            text = f"{'rank' if len(ahead) == 1 else 'ranks'} {waiting} began {_words(record)}, and it had not"
            if first is None or record["started"] < first[0]:
                first = record["started"], behind, text if len(behind) == 1 else text.replace("it had", "they had")
    if first is not None:
        return first[1:]
    for members in groups.values():
        by_number: dict[int, dict[int, dict[str, Any]]] = {}
        for rank, found in members.items():
            for record in found:
                by_number.setdefault(record["number"], {})[rank] = record
        for number in sorted(by_number):
            called = {rank: r["operation"] for rank, r in by_number[number].items()}
            if len(set(called.values())) > 1:
                said = ", ".join(f"rank {rank} {name}" for rank, name in sorted(called.items()))
                return (), f"ranks called different collectives as number {number}: {said}"
    return (), None


def _words(record: dict[str, Any]) -> str:
    return f"{record['operation']} number {record['number']} of group {record['group']}, sizes {record['sizes']}"
