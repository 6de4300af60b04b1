"""Functions that numba compiles; their machine code is kept on disk."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher


def compiled(function: Callable, **options: Any) -> Callable:
    """Compile with numba, to run outside Python's lock. `options` are those of `numba.njit`."""
    function = inspect.unwrap(function)  # a type checker around it, as in tests, would hide the code from numba
    kernel = numba.njit(nogil=True, **options)(function)
    if isinstance(kernel, Dispatcher):  # with NUMBA_DISABLE_JIT it is the function itself
        with suppress(RuntimeError):  # no folder to keep machine code in: compile in each process
            kernel._cache = _Cache(function)
    return kernel


class _Cache(FunctionCache):
    """numba's own, which looks at the file of the function only, and fails with the disk."""

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        return *super()._index_key(sig, codegen), _sources(self._py_func)

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        with suppress(OSError):  # what can be neither read nor kept is compiled again
            yield


def _sources(function: Callable) -> str:
    """A digest of the files of this package that the function takes other functions from: they become part of it."""
    names = {getattr(part, "__module__", None) for part in function.__globals__.values()}
    ours = sorted(name for name in names if isinstance(name, str) and name.startswith("llama_edu."))
    return "".join(_digest(sys.modules[name].__file__) for name in ours)


@cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
