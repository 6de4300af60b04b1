"""Who computes and differentiates the layers: PyTorch, our kernels, or the passes that lessons 20 to 23 write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["SavedBytes", "has_kernels", "is_manual", "manual_backward", "suits_kernels"]

_MANY = 128  # rows; for fewer a call of a kernel costs more than it saves

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


@torch.compiler.assume_constant_result  # a compiler need not follow how processors are told apart
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether this processor has fast vectors for such numbers; numba is not imported for others."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    from llama_edu.native import has_dots

    return has_dots(str(dtype)[6:])


def suits_kernels(x: Tensor, *others: Tensor) -> bool:
    """Whether kernels of ours take `x` and what goes with it: plain tensors on a CPU, many rows, fast numbers.

    torch.func and forward-mode differentiation look into PyTorch's operations; ours have one derivative, backward.
    """
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in (x, *others))
    if not plain or x.dim() < 2 or x.shape[-2] < _MANY or not has_kernels(x.dtype):
        return False
    return torch.compiler.is_compiling() or not any(_is_transformed(t) for t in (x, *others))


def _is_transformed(t: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or forward_ad.unpack_dual(t).tangent is not None


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
