"""The softmax of scores in bfloat16, less the target, as machine code: a row is in the cache from first to last."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import BFloat16, Float32, Int64
from torch import Tensor

from llama_edu.native import atomic_add, compiled, exp, in_threads, largest, narrow, widen

__all__ = ["softmax_minus_target"]


@compiled
def _rows(taken, scores, targets, losses, log_sums, z_loss):
    """Bits of bfloat16 (rows, vocab) in place, by threads that take rows in turn."""
    rows, vocab = scores.shape
    one, e = np.float32(1), np.empty(vocab, np.float32)
    while True:
        i = atomic_add(taken, 0, 1)
        if i >= rows:
            return
        row, target = scores[i], targets[i]
        top, total = largest(row), np.float32(0)
        for j in range(vocab):
            x = exp(widen(row[j]) - top)
            e[j] = x
            total += x
        log_sum = top + np.log(total)
        losses[i], log_sums[i] = log_sum - widen(row[target]), log_sum
        factor = (one + np.float32(2) * z_loss * log_sum) / total
        for j in range(vocab):
            row[j] = narrow(e[j] * factor, row)
        row[target] = narrow(e[target] * factor - one, row)


def softmax_minus_target(
    scores: BFloat16[Tensor, "rows vocab"],
    targets: Int64[Tensor, "rows 1"],
    losses: Float32[Tensor, "rows 1"],
    log_sums: Float32[Tensor, "rows 1"],
    z_loss: float,
) -> None:
    """Turn scores into their gradient, in place; note the cross-entropy and log Z of each row. The sums are float32.

    Args:
        targets: tokens; those of a row that does not count may be any.
        z_loss: times log Z squared is added to what is differentiated, not to `losses`.
    """
    flat = (x[:, 0].numpy() for x in (targets, losses, log_sums))
    in_threads(_rows, len(scores), scores.view(torch.uint16).numpy(), *flat, np.float32(z_loss))
