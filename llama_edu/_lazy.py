"""Names of a package that load their module on first use, so that importing one part does not import the others."""

from collections.abc import Callable
from importlib import import_module


def lazy(package: str, homes: dict[str, tuple[str, ...]]) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: its `__name__`.
        homes: module inside the package -> the public names it defines.
    """
    home = {name: f"{package}.{module}" for module, names in homes.items() for name in names}

    def __getattr__(name: str):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return __getattr__, lambda: sorted({*home, *vars(import_module(package))})
