"""Make .venv with the pinned versions, once. Runs on the bare interpreter, before anything is installed.

    python3 tools/setup_venv.py [EXTRA ...]       EXTRA: notebooks, test, docs, dev, bench, hub, track

Repeating it does nothing until pyproject.toml or constraints.txt change or another extra is asked for.
TORCH_INDEX in the environment names a package index to take torch from.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.json"
OLDEST, NEWEST = (3, 11), (3, 13)


def stop(sentence: str) -> None:
    sys.exit(f"setup: {sentence}")


def suitable_python() -> str:
    """This interpreter, or another of a supported version on the PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    stop(
        f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed and {sys.executable} is {sys.version.split()[0]}; "
        "install one, or name it: make PYTHON=/path/to/python3.11 ..."
    )


def has_pinned_torch() -> bool:
    """Whether the interpreter already has the pinned torch, so that the environment can use it where it is."""
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    try:
        return importlib.metadata.version("torch").split("+")[0] == pinned
    except importlib.metadata.PackageNotFoundError:
        return False


def main(extras: "list[str]") -> None:
    wanted = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        wanted.update((ROOT / name).read_bytes())
    done = json.loads(STAMP.read_text()) if STAMP.exists() else {"pins": "", "extras": []}
    if done["pins"] == wanted.hexdigest() and set(extras) <= set(done["extras"]):
        return
    python = suitable_python()
    if subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode:
        stop(f"{python} has no venv module; install it (Debian and Ubuntu: apt install python3-venv)")
    if not (VENV / "pyvenv.cfg").exists():
        shared = ["--system-site-packages"] if python == sys.executable and has_pinned_torch() else []
        print("setup: making .venv", flush=True)
        subprocess.run([python, "-m", "venv", *shared, str(VENV)], check=True)
    extras = sorted({*extras, *done["extras"]})
    package = ".[" + ",".join(extras) + "]" if extras else "."
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    print(f"setup: installing {package} at the versions of constraints.txt (a few minutes the first time)", flush=True)
    binary = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [str(binary), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *index]
    if subprocess.run([*pip, "-c", "constraints.txt", "-e", package], cwd=ROOT).returncode:
        stop("pip could not install the packages; its message is above (is the package index reachable?)")
    STAMP.write_text(json.dumps({"pins": wanted.hexdigest(), "extras": extras}))


if __name__ == "__main__":
    main(sys.argv[1:])
