"""RMSNorm as machine code: reads each vector once and writes it once; lesson 20 derives it."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llama_edu.native import atomic_add, compiled, in_threads, narrow, numbers, widen

__all__ = ["normalize"]

_ROWS = 16  # that a thread takes at a time


@compiled
def _normalize(taken, x, weight, eps, out, inv_rms):
    """Rows of x, by threads that take some in turn."""
    rows, d = x.shape
    while True:
        first = atomic_add(taken, 0, 1) * _ROWS
        if first >= rows:
            return
        for i in range(first, min(first + _ROWS, rows)):
            row, to, total = x[i], out[i], np.float32(0)
            for j in range(d):
                total += widen(row[j]) * widen(row[j])
            inv_rms[i] = np.float32(1 / np.sqrt(np.float64(total) / d + eps))
            for j in range(d):
                to[j] = narrow(widen(row[j]) * inv_rms[i] * widen(weight[j]), to)


def normalize(
    x: Float[Tensor, "... dim"], weight: Float[Tensor, " dim"], eps: float
) -> tuple[Float[Tensor, "... dim"], Float[Tensor, "... 1"]]:
    """RMSNorm of float32 or bfloat16, computed in float32, and 1 / rms of each vector in float32."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a weight {tuple(weight.shape)} does not scale vectors {tuple(x.shape)}")
    x, weight = x.detach().contiguous(), weight.detach().contiguous()
    out, inv_rms = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rows, to, inverse = (numbers(t) for t in (x.flatten(0, -2), out.flatten(0, -2), inv_rms.flatten()))
    in_threads(_normalize, -(-len(rows) // _ROWS), rows, numbers(weight), eps, to, inverse)
    return out, inv_rms
