"""The switch between PyTorch's automatic differentiation and the backward passes that the lessons write by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_manual", "manual_backward"]

_manual = False


def is_manual() -> bool:
    """Whether the layers of the model use their hand-written backward passes."""
    return _manual


@contextmanager
def manual_backward(on: bool = True) -> Iterator[None]:
    """Run the forward passes inside with the backward passes of lessons 20 to 23 instead of automatic differentiation.

    The forward pass decides: what ran inside is differentiated by hand, wherever `backward()` is called later. Only
    under activation checkpointing, which runs the forward pass a second time, must `backward()` stand inside as well.

    Example:
        >>> with manual_backward():
        ...     loss = model(tokens).sum()
        >>> loss.backward()
    """
    global _manual
    before, _manual = _manual, on
    try:
        yield
    finally:
        _manual = before
