"""Who differentiates the layers: PyTorch, or the backward passes that lessons 20 to 23 write by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["SavedBytes", "is_manual", "manual_backward"]

_choice: bool | None = None


def is_manual(default: bool = False) -> bool:
    """Whether a layer shall use its hand-written backward pass; `default` is what it does when nobody asked."""
    return default if _choice is None else _choice


@contextmanager
def manual_backward(on: bool = True) -> Iterator[None]:
    """Run the forward passes inside with the backward passes written by hand, or with none of them (`on=False`).

    The forward pass decides: what ran inside is differentiated by hand, wherever `backward()` is called later. Only
    under activation checkpointing, which runs the forward pass a second time, must `backward()` stand inside as well.
    Outside, each layer does what is fastest. A pass by hand can be differentiated once, and by `backward()` only:
    `manual_backward(False)` gives `grad` and `vmap` of torch.func and, where PyTorch's attention runs inside
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, second derivatives and `jvp`.

    Example:
        >>> with manual_backward():
        ...     loss = model(tokens).sum()
        >>> loss.backward()
    """
    global _choice
    before, _choice = _choice, on
    try:
        yield
    finally:
        _choice = before


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that a forward pass keeps for its backward pass; memory shared by several tensors counts once.

    Args:
        besides: tensors that are there anyway, such as parameters and tables, and do not count.

    Example:
        >>> with SavedBytes(besides=model.parameters()) as kept:
        ...     loss = model(x).sum()
        >>> kept.total
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        self._sizes: dict[int, int] = {}
        self._besides = {t.untyped_storage().data_ptr() for t in besides}
        super().__init__(self._count, lambda t: t)

    def _count(self, t: Tensor) -> Tensor:
        memory = t.untyped_storage()
        if memory.data_ptr() not in self._besides:
            self._sizes[memory.data_ptr()] = memory.nbytes()
        return t

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    @property
    def total(self) -> int:
        """Bytes kept so far."""
        return sum(self._sizes.values())
