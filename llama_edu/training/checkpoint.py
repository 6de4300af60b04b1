"""Checkpoints that are whole or absent: a folder a step, a manifest of hashes last, then one rename."""

import errno
import hashlib
import json
import operator
import os
import platform
import random
import shutil
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llama_edu.errors import UserError
from llama_edu.training.engine import Engine, agreed

__all__ = ["Saver", "checkpoints", "load_checkpoint", "newest_checkpoint", "save_checkpoint", "verify_checkpoint"]

_MANIFEST = "manifest.json"
_FORMAT = 2
_RNG_BYTES = 1 << 15  # the generators of Python and numpy take half of this


def _checkpoint_name(step: int) -> str:
    """Folder of a step; names sort as steps do."""
    return f"step_{step:08d}"


def write_json(path: Path, value: Any) -> None:
    """Write a file whole: it has its old content or its new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync_folder(path: Path) -> None:
    """Bring renames inside a folder to the disk."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def rng_state(device: torch.device | str = "cpu") -> dict[str, Any]:
    """States of all random generators a training run may draw from: tensors, and plain values for JSON."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss], "numpy": numpy}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Put the generators back to what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: dict[str, Any],
    progress: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    keep_last: int = 2,
) -> Path:
    """Save all that a run needs to go on, as `folder/step_NNNNNNNN`. Returns that path. See `Saver`."""
    saver = Saver(folder, Engine(), device=device, keep_last=keep_last)
    saver.save(step, model, optimizer, config=config, progress=progress)
    return Path(folder) / _checkpoint_name(step)


class Saver:
    """Writes the checkpoints of a run, in the foreground or behind its back, never two at once.

    A new folder is built under another name, its manifest of sha256 sums is written last, and it gets its name when all
    of it is on the disk: whenever the program dies, what has a checkpoint's name is whole. Then older checkpoints are
    removed, all but the last `keep_last`, every `keep_every`-th step, and the newest good one.

    Every rank saves and waits at the same steps. Rank 0 writes all files but the tensors.

    Args:
        engine: knows the ranks, and what of model and optimiser this one has.
        device: whose random generator is saved.
        keep_every: steps; 0: none is kept beyond the last ones.
    """

    def __init__(
        self,
        folder: str | Path,
        engine: Engine,
        *,
        device: torch.device | str = "cpu",
        keep_last: int = 2,
        keep_every: int = 0,
    ) -> None:
        self.folder, self.engine, self.device = Path(folder), engine, device
        self.keep_last, self.keep_every = keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        config: dict[str, Any],
        progress: dict[str, Any] | None = None,
        good: bool = True,
        background: bool = False,
    ) -> None:
        """Save step `step`; first wait until an earlier save has come to its end.

        Args:
            config: what identifies the run; kept as config.json.
            progress: plain values beside step and generators; kept in state.json.
            good: a run in trouble may come back to this one.
            background: copy everything into host memory and return; a thread writes the copy. What goes wrong there
                sets `failed` and is raised by `wait`, or by the next save.

        Raises:
            UserError: the disk is full, or writing fails; earlier checkpoints are as they were.
        """
        self.wait()
        state = self.engine.state(model, optimizer)
        rng = _rng_tensors(self.device)
        with agreed(self.engine), _told(step, self.folder):
            if self.engine.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                _remove_partial(self.folder)
                _need_space(self.folder, state)
                self._partial(step).mkdir()
        state["rng"] = {f"{self.engine.rank}.{name}": tensor for name, tensor in rng.items()}
        facts = {"step": step, **(progress or {}), "good": good, "rng": sorted(rng)}
        facts |= {"world_size": self.engine.world_size, "format": _FORMAT, "versions": _versions()}
        if not background:
            # The tensors' writers tell each other what fails; agreement is needed on what rank 0 does after them.
            with agreed(self.engine):
                self._write(step, state, config, facts)
            return
        copy = {part: self._snapshot(part, tensors) for part, tensors in state.items()}
        self._thread = threading.Thread(target=self._write_behind, args=(step, copy, config, facts), name="checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """A save in the background has failed on this rank; `wait` raises its sentence."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for a save in the background. Raises, on all ranks, what went wrong in it on one."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        with agreed(self.engine):
            if error is not None:
                raise error

    def close(self) -> None:
        """Wait for a save in the background without telling anybody: for a run that ends with an error already."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _partial(self, step: int) -> Path:
        return self.folder / f".{_checkpoint_name(step)}.partial"

    def _snapshot(self, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            self._buffers[part, name] = self.engine.snapshot(tensor, self._buffers.get((part, name)))
        return {name: self._buffers[part, name] for name in tensors}

    def _write_behind(self, step: int, *what: Any) -> None:
        try:
            self._write(step, *what)
        except Exception as error:
            self._error = error

    def _write(self, step: int, state: dict[str, Any], config: dict[str, Any], facts: dict[str, Any]) -> None:
        partial, target = self._partial(step), self.folder / _checkpoint_name(step)
        try:
            with _told(step, self.folder):
                _dcp("save", state, partial / "tensors", self.engine.saving_group)
                if self.engine.rank == 0:
                    write_json(partial / "config.json", config)
                    write_json(partial / "state.json", facts)
                    _publish(partial, target)
        except BaseException:
            if self.engine.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.engine.rank == 0:
            _remove_partial(self.folder)
            self._prune(target)

    def _prune(self, newest: Path) -> None:
        found = [path for path in checkpoints(self.folder) if path.name <= newest.name]
        kept = {*found[-self.keep_last :], *[path for path in found if _is_good(path)][-1:]}
        for path in found:
            if path not in kept and not (self.keep_every and int(path.name[5:]) % self.keep_every == 0):
                shutil.rmtree(path, ignore_errors=True)


def _publish(partial: Path, target: Path) -> None:
    """The manifest, and then the name."""
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    manifest = {p.relative_to(partial).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    write_json(partial / _MANIFEST, manifest)
    _sync_folder(partial)
    if target.exists():  # one that was skipped as damaged, or that a run left which was then rewound
        os.replace(target, target.with_name(f".{target.name}.old.partial"))
    os.replace(partial, target)
    _sync_folder(target.parent)


@contextmanager
def _told(step: int, folder: Path) -> Iterator[None]:
    """What the operating system refuses, in a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {error.strerror or error}; "
            "earlier checkpoints are untouched"
        ) from error


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device | str = "cpu",
    engine: Engine | None = None,
    verified: bool = False,
    progress: Sequence[str] = (),
) -> dict[str, Any]:
    """Load a checkpoint into model, optimiser and random generators. Returns its state.json: `step` and progress.

    A rank that the saving run did not have keeps its random generators.

    The checkpoint is one of the user's own: PyTorch's format holds its index as a pickle, so load none from a stranger.

    Args:
        verified: `verify_checkpoint` has just found it whole, so that not every file is read twice.
        progress: fields of state.json that must be there.

    Raises:
        UserError: it is absent, damaged or of another format, or its tensors are not those of model and optimiser, in
            name or shape. Nothing has been changed then.
    """
    path, engine = Path(path), Engine() if engine is None else engine
    with agreed(engine):
        saved = read_state(path, progress)
        fault = verify_checkpoint(path) if engine.rank == 0 and not verified else None
        if fault is not None:
            raise UserError(f"{path} cannot be loaded: {fault}; take another checkpoint")
    state, rng = engine.state(model, optimizer), _rng_tensors(device)
    known = set(saved["rng"]) if engine.rank < saved["world_size"] else set()
    state["rng"] = {f"{engine.rank}.{name}": tensor for name, tensor in rng.items() if name in known}
    _refuse_other_tensors(path, state, engine)
    _dcp("load", state, path / "tensors", None)
    engine.load_state(model, optimizer, {name: state[name] for name in ("model", "optimizer")})
    _set_rng_tensors(rng, device)
    return saved


def read_state(path: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises UserError where it is not to be read, or lacks a field."""
    try:
        saved = json.loads((path / "state.json").read_text())
        if saved.get("format") != _FORMAT:
            raise UserError(f"{path} is of format {saved.get('format', 1)}; this program reads format {_FORMAT}")
    except FileNotFoundError as error:
        raise UserError(f"{path} is no checkpoint: it has no state.json; give a folder step_NNNNNNNN") from error
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be loaded: its state.json is damaged ({error}); take another one") from error
    missing = [name for name in ("step", "rng", "world_size", *needs) if name not in saved]
    if missing:
        raise UserError(f"{path} cannot be loaded: its state.json lacks {', '.join(missing)}; take another checkpoint")
    return saved


def _refuse_other_tensors(path: Path, state: dict[str, dict[str, Any]], engine: Engine) -> None:
    """Raise UserError unless the tensors of a checkpoint are those of `state` on all ranks, by name and shape."""
    from torch.distributed.checkpoint import FileSystemReader

    saved: dict[str, Any] = {}
    mine = {f"{part}.{name}": t.shape for part, tensors in state.items() for name, t in tensors.items()}
    with agreed(engine):
        saved = FileSystemReader(path / "tensors").read_metadata().state_dict_metadata
        faults = [f"{name} is not in it" for name in mine if name not in saved]
        faults += [
            f"{name} is {list(saved[name].size)} in it and {list(shape)} in the model"
            for name, shape in mine.items()
            if name in saved and saved[name].size != shape
        ]
        _refuse(path, faults)
    names = sorted(name for name in saved if not name.startswith("rng."))
    # A stage of a pipeline has a part of the names. A bit each keeps the message short: which ones this rank lacks.
    lacking = sum(1 << i for i, name in enumerate(names) if name not in mine)
    nowhere = reduce(operator.and_, engine.gather(lacking))
    _refuse(path, [f"{name} is not in the model" for i, name in enumerate(names) if nowhere >> i & 1])


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more differences)" if len(faults) > 1 else ""
        raise UserError(f"{path} is of another model: {faults[0]}{more}; its config.json says which")


def _versions() -> dict[str, str]:
    from llama_edu._version import __version__

    return {
        "llama_edu": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _rng_tensors(device: torch.device | str) -> dict[str, torch.Tensor]:
    """`rng_state` as tensors of fixed size, so that each rank can save its own beside its weights."""
    state = rng_state(device)
    plain = json.dumps({name: state.pop(name) for name in ("python", "numpy")}).encode()
    return {**state, "plain": torch.tensor(list(plain.ljust(_RNG_BYTES)), dtype=torch.uint8)}


def _set_rng_tensors(tensors: dict[str, torch.Tensor], device: torch.device | str) -> None:
    plain = json.loads(bytes(tensors["plain"].tolist()))
    set_rng_state({**tensors, **plain}, device)


def _dcp(verb: str, state: dict[str, Any], path: Path, group: Any) -> None:
    """torch.distributed.checkpoint's save or load, with or without a process group."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    options = {"storage_writer": _writer(path)} if verb == "save" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            getattr(dcp, verb)(state, checkpoint_id=path, process_group=group, no_dist=alone, **options)
        except CheckpointException as error:
            for rank, (cause, _) in sorted(error.failures.items()):
                where = "" if alone else f" on rank {rank}"
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, f"{cause.strerror or cause}{where}") from error
                # PyTorch's archive writer answers a write that fell short with a failed check of its own.
                if "inline_container" in str(cause):
                    short = f"a write fell short{where}; the disk is full or files are limited in size"
                    raise OSError(errno.ENOSPC, short) from error
            raise


def _writer(path: Path) -> Any:
    """PyTorch's writer of checkpoints, which tells of a failed write in its error and nowhere else.

    Its wrapper around a file flushes it once more when it is collected. After an error the file is closed by then, and
    Python 3.13 prints what a finaliser raises.
    """
    from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

    class Files(FileSystem):
        @contextmanager
        def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
            file: Any
            with super().create_stream(path, mode) as file:
                try:
                    yield file
                except BaseException:
                    file.flush = lambda: None
                    raise

    writer = FileSystemWriter(path)
    writer.fs = Files()
    return writer


def _need_space(folder: Path, state: dict[str, Any]) -> None:
    """Raise UserError where the disk has no room for the tensors of `state`."""
    tensors = [v for part in state.values() for v in part.values() if isinstance(v, torch.Tensor)]
    place = lambda t: (t.to_local() if hasattr(t, "to_local") else t).untyped_storage().data_ptr()
    need = sum({place(t): t.numel() * t.element_size() for t in tensors}.values())  # tied matrices count once
    free = shutil.disk_usage(folder).free
    if free < 1.02 * need + 2**20:
        raise UserError(
            f"a checkpoint takes {need / 2**20:,.0f} MiB and the disk of {folder} has {free / 2**20:,.0f} MiB left: "
            "free some, or choose another out_dir"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first, whole or not."""
    return sorted(p for p in Path(folder).glob("step_*") if p.is_dir() and p.name[5:].isdigit())


def _remove_partial(folder: str | Path) -> None:
    """Clear away what a save left that did not come to its end."""
    for path in Path(folder).glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def verify_checkpoint(path: str | Path) -> str | None:
    """None when every file is as the manifest says, else what is wrong, for the end of a sentence."""
    path = Path(path)
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, expected in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has changed since it was saved"
        if not {"config.json", "state.json", "tensors/.metadata"} <= set(manifest):
            return f"{_MANIFEST} does not list all files"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{_MANIFEST} is damaged"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return None


def _is_good(path: Path) -> bool:
    try:
        return bool(json.loads((path / "state.json").read_text())["good"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def newest_checkpoint(folder: str | Path, *, good: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None: there is none), and a sentence for each newer one that does not.

    Args:
        good: leave out those that were saved while the run was in trouble.
    """
    skipped = []
    for path in reversed(checkpoints(folder)):
        fault = verify_checkpoint(path)
        if fault is not None:
            skipped.append(f"skipped {path}: {fault}")
        elif not good or _is_good(path):
            return path, skipped
    return None, skipped
