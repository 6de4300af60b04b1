"""`llama-edu lab`: the lessons in JupyterLab."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from llama_edu.errors import UserError


def lab(port: int = 8888, browser: bool = True) -> int:
    """Open the lessons in JupyterLab, on this machine only.

    Args:
        port: first port to try.
        browser: open a browser window.
    """
    notebooks = Path(__file__).resolve().parents[2] / "notebooks"
    if not notebooks.is_dir():
        raise UserError("the lessons are not beside the package: clone the repository and run `make lab` there")
    if importlib.util.find_spec("jupyterlab") is None:
        raise UserError("JupyterLab is not installed: pip install 'llama-edu[notebooks]', or run `make lab`")
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={port}", f"--notebook-dir={notebooks}"]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # as in most containers; Jupyter would refuse to start
        command.append("--allow-root")
    return subprocess.run(command).returncode
