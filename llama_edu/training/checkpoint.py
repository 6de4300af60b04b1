"""Checkpoints that are whole or absent: a folder a step, a manifest of hashes last, then one rename."""

import errno
import hashlib
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llama_edu.errors import UserError

__all__ = ["checkpoints", "load_checkpoint", "newest_checkpoint", "save_checkpoint", "verify_checkpoint"]

_MANIFEST = "manifest.json"


def _checkpoint_name(step: int) -> str:
    """Folder of a step; names sort as steps do."""
    return f"step_{step:08d}"


def _write_json(path: Path, value: Any) -> None:
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
    """Save all that a run needs to go on, as `folder/step_NNNNNNNN`. Returns that path.

    The new folder is built under another name, its manifest of sha256 sums is written last, and it gets its name when
    all of it is on the disk: whenever the program dies, what has a checkpoint's name is whole. Then older checkpoints
    beyond `keep_last` are removed.

    Args:
        config: what identifies the run; kept as config.json.
        progress: plain values beside step and generators; kept in state.json.
        device: whose random generator is saved.

    Raises:
        UserError: the disk is full, or writing fails; earlier checkpoints are as they were.
    """
    folder = Path(folder)
    target, partial = folder / _checkpoint_name(step), folder / f".{_checkpoint_name(step)}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        state, rng = _tensors(model, optimizer), rng_state(device)
        _need_space(folder, state)
        partial.mkdir()
        tensors = {name: rng.pop(name) for name in list(rng) if isinstance(rng[name], torch.Tensor)}
        _dcp("save", {**state, "rng": tensors}, partial / "tensors")
        _write_json(partial / "config.json", config)
        _write_json(partial / "state.json", {"step": step, **(progress or {}), "rng": rng, "torch": torch.__version__})
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {p.relative_to(partial).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        _write_json(partial / _MANIFEST, manifest)
        _sync_folder(partial)
        if target.exists():  # one that was skipped as damaged, or that a run left which was then rewound
            os.replace(target, folder / f".{target.name}.old.partial")
        os.replace(partial, target)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {error.strerror or error}; "
            "earlier checkpoints are untouched"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _remove_partial(folder)
    for old in [p for p in checkpoints(folder) if p.name <= target.name][:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Load a checkpoint into model, optimiser and random generators. Returns its state.json: `step` and progress.

    The checkpoint is one of the user's own: PyTorch's format holds its index as a pickle, so load none from a stranger.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_state_dict

    path = Path(path)
    saved = json.loads((path / "state.json").read_text())
    state = _tensors(model, optimizer)
    rng = rng_state(device)
    state["rng"] = {name: value for name, value in rng.items() if isinstance(value, torch.Tensor)}
    _dcp("load", state, path / "tensors")
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    moments = get_optimizer_state_dict(model, optimizer, options=options) | state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=moments, options=options)
    set_rng_state({**saved.pop("rng"), **state["rng"]}, device)
    return saved


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and moments under the names of the parameters: they fit however the model is later divided.

    The optimiser's settings are left out, the configuration has them.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": {k: v for k, v in moments.items() if isinstance(v, torch.Tensor)}}


def _dcp(verb: str, state: dict[str, Any], path: Path) -> None:
    """torch.distributed.checkpoint's save or load, with or without a process group."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            getattr(dcp, verb)(state, checkpoint_id=path, no_dist=alone)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            disk = next((cause for cause in causes if isinstance(cause, OSError)), None)
            # PyTorch's archive writer answers a write that fell short with a failed check of its own.
            if disk is None and any("inline_container" in str(cause) for cause in causes):
                disk = OSError(errno.ENOSPC, "a write fell short; the disk is full or files are limited in size")
            raise disk or error from error


def _need_space(folder: Path, state: dict[str, Any]) -> None:
    """Raise UserError where the disk has no room for the tensors of `state`."""
    tensors = [v for part in state.values() for v in part.values() if isinstance(v, torch.Tensor)]
    need = sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
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


def newest_checkpoint(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None: there is none), and a sentence for each newer one that does not."""
    skipped = []
    for path in reversed(checkpoints(folder)):
        fault = verify_checkpoint(path)
        if fault is None:
            return path, skipped
        skipped.append(f"skipped {path}: {fault}")
    return None, skipped
