"""Machine code that is kept on disk: never that of another source, and a disk that fails costs time only."""

import os
import shutil
import subprocess
import sys

import pytest

from llama_edu import jit

FILES = {
    "__init__.py": "",
    "part.py": "from .jit import compiled\n@compiled\ndef more(x):\n    return x + 1\n",
    "whole.py": "from .jit import compiled\nfrom .part import more\n@compiled\ndef twice(x):\n    return 2 * more(x)\n",
}
LOOK = "from llama_edu.whole import twice; print(twice(1), sum(twice.stats.cache_hits.values()))"


def run(code, folder, **env):
    env = {**os.environ, "PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "kept"), **env}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.fixture
def package(tmp_path):
    """A small package of this name: a kernel in one file, a part of it in another."""
    home = tmp_path / "llama_edu"
    home.mkdir()
    shutil.copy(jit.__file__, home)
    for name, text in FILES.items():
        (home / name).write_text(text)
    return tmp_path


def test_code_is_kept_until_any_of_its_files_changes(package):
    assert [run(LOOK, package) for _ in range(2)] == [["4", "0"], ["4", "1"]]
    part = package / "llama_edu" / "part.py"
    part.write_text(FILES["part.py"].replace("1", "5"))
    assert [run(LOOK, package) for _ in range(2)] == [["12", "0"], ["12", "1"]]


def test_a_full_disk_costs_time_only(package):
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)); "
    assert [run(code + LOOK, package) for code in (full, full, "", full)] == [["4", n] for n in ("0", "0", "0", "1")]


def test_an_unreadable_file_costs_time_only(package):
    run(LOOK, package)
    for file in (package / "kept").rglob("*.nbi"):
        file.unlink()
        file.mkdir()
    assert run(LOOK, package) == ["4", "0"]


def test_no_folder_to_write_costs_time_only(package):
    """A read-only installation, and no home: numba finds no place for machine code."""
    none = "import numba.core.caching as c; c.CacheImpl._locator_classes = []; "
    assert [run(none + LOOK, package) for _ in range(2)] == [["4", "0"]] * 2


def test_without_compilation_pytorch_serves():
    """NUMBA_DISABLE_JIT, by which people debug kernels of their own: ours exist as machine code only."""
    code = """
import torch
from llama_edu.model.attention import ScaledDotProduct
from llama_edu.training.loss import chunked_cross_entropy
for dtype in (torch.float32, torch.bfloat16):
    q, k, v = (torch.randn(1, 2, 140, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    x = ScaledDotProduct()(q, k, v).transpose(1, 2).reshape(140, 64)
    chunked_cross_entropy(x, torch.randn(50, 64, dtype=dtype), torch.arange(140) % 50).backward()
    assert q.grad.isfinite().all() and q.grad.any()
"""
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
