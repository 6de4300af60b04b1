"""`llama-edu doctor`: what this machine has, what will work on it and what will not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Finding(NamedTuple):
    """One line of the answer: `state` is "ok", "note" (works, but) or "fault" (does not work)."""

    state: str
    subject: str
    text: str


def doctor() -> int:
    """Check Python, packages, processor, memory, GPU and disk, and say what will work.

    Ends with exit code 1 where something has to be mended first.
    """
    found = list(examine())
    for state, subject, text in found:
        print(f"{'  ' if state == 'ok' else '! ' if state == 'note' else 'X '}{subject:12} {text}")
    faults, notes = (list(dict.fromkeys(f.subject for f in found if f.state == s)) for s in ("fault", "note"))
    print()
    if faults:
        print(f"will not work before it is mended: {', '.join(faults)}")
    else:
        print("all lessons and tests will run here" + (f", but see above: {', '.join(notes)}" if notes else ""))
    return 1 if faults else 0


def examine() -> Iterator[Finding]:
    """Look at everything, cheapest first."""
    yield _python()
    yield from _packages()
    yield _memory()
    yield _disk()
    if importlib.util.find_spec("torch") is None:
        return
    yield _processor()
    yield _compiler()
    yield _gpu()


def _python() -> Finding:
    version = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding(
            "fault", "python", f"{version}; 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.11 tour"
        )
    return Finding("ok", "python", f"{version} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """Requirements that are absent, and versions other than those that made the stored outputs."""
    metadata = importlib.metadata.requires("llama-edu") or []
    from_file = ROOT / "pyproject.toml"
    if from_file.is_file():
        metadata = tomllib.loads(from_file.read_text())["project"]["dependencies"]
    import re

    names = [re.match(r"[\w.-]+", line).group() for line in metadata if "extra ==" not in line]
    absent = [name for name in names if not _version(name)]
    for name in absent:
        yield Finding("fault", "packages", f"{name} is missing: make setup, or pip install -c constraints.txt -e .")
    if not absent:
        yield Finding("ok", "packages", f"all {len(names)} requirements are installed, torch {_version('torch')}")
    pins = ROOT / "constraints.txt"
    if pins.is_file():
        pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", pins.read_text(), re.M))
        other = [n for n in names if _version(n) and n in pinned and _version(n).split("+")[0] != pinned[n]]
        if other:
            differing = ", ".join(f"{n} {_version(n)} instead of {pinned[n]}" for n in other)
            yield Finding("note", "versions", f"{differing}: stored outputs were made with the pinned ones")
    for module, what in (("jupyterlab", "make lab"), ("nbval", "make test"), ("sphinx", "make docs")):
        if importlib.util.find_spec(module) is None:
            yield Finding("note", "packages", f"{module} is missing: `{what}` installs it")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> Finding:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Finding("note", "memory", "its size cannot be asked here; 4 GB are needed")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if gib < 3.5:
        return Finding("note", "memory", f"{gib:.1f} GiB; some lessons and the tests of many processes need 4 GiB")
    return Finding("ok", "memory", f"{gib:.1f} GiB")


def _disk() -> Finding:
    gib = shutil.disk_usage(Path.cwd()).free / 2**30
    state = "ok" if gib >= 3 else "note"
    return Finding(state, "disk", f"{gib:.1f} GiB free here" + ("" if state == "ok" else "; 3 GiB are needed for all"))


def _processor() -> Finding:
    import torch

    level = torch.backends.cpu.get_cpu_capability()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{cores} cores, {level}"
    from llama_edu.training.utilisation import has_bf16

    if has_bf16("cpu"):
        return Finding("ok", "processor", f"{text}, with bfloat16 products")
    return Finding("ok", "processor", f"{text}; no bfloat16 products, so training on it runs in float32")


def _compiler() -> Finding:
    names = ("g++", "clang++", "c++", "cl")
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        return Finding("note", "compiler", "no C++ compiler: torch.compile on the CPU will not work, all else will")
    return Finding("ok", "compiler", f"{found}: torch.compile works on the CPU")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        here = "Apple's MPS is there; lessons use the CPU" if mps else "none that torch can use"
        return Finding("ok", "gpu", f"{here}; no lesson needs one, GPU tests are skipped and say so")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    listed = ", ".join(f"{p.name} with {p.total_memory / 2**30:.0f} GiB" for p in names)
    return Finding(
        "ok",
        "gpu",
        f"{listed}; CUDA {torch.version.cuda}, NCCL {'yes' if torch.distributed.is_nccl_available() else 'no'}",
    )
