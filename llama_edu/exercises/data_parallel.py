"""Checks for the exercises of lesson 41: the global mean, the bytes of a ZeRO stage, and a model that must be gathered
layer by layer to fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_edu.exercises import exercise
from llama_edu.parallel.simulated import Cluster

__all__ = ["check_global_loss", "check_sharded_gradients", "check_state_bytes"]


@exercise(lesson="41_data_parallel", level=1, minutes=5)
def check_global_loss(attempt) -> str | None:
    sums, counts = [6.0, 2.0, 1.0, 0.0], [3, 4, 1, 0]
    try:
        got = float(attempt(list(sums), list(counts)))
    except ZeroDivisionError:
        return "A rank without targets has no mean of its own: do not divide by its count."
    same = lambda value: math.isclose(got, value, rel_tol=1e-9)
    if same(9 / 8):
        return None
    if same((6 / 3 + 2 / 4 + 1 / 1) / 3) or same((6 / 3 + 2 / 4 + 1 / 1) / 4):
        return "That is the mean of means: a token on a rank with few targets would weigh more."
    if same(9 / 4):
        return "You divided by the number of ranks; divide by the number of targets."
    if same(6 / 3 + 2 / 4 + 1):
        return "You added the ranks' means. Add sums, add counts, divide once."
    if same(9.0):
        return "That is the sum over all tokens; divide it by the number of targets of all ranks."
    return f"For sums {sums} and counts {counts} the mean over all tokens is 1.125; yours is {got:g}."


@exercise(lesson="41_data_parallel", level=1, minutes=10)
def check_state_bytes(attempt) -> str | None:
    p, n = 1000, 8
    shares = ((1, 1, 1), (1, 1, n), (1, n, n), (n, n, n))
    right = [4 * p / a + 4 * p / b + 8 * p / c for a, b, c in shares]
    got = [float(attempt(p, n, stage)) for stage in range(4)]
    same = lambda values: all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(got, values))
    if same(right):
        return None
    if same([r - 4 * p / c for r, (_, _, c) in zip(right, shares)]):
        return "AdamW keeps two moments, a mean and a mean square: 8 bytes a parameter."
    if same([r - 4 * p / b for r, (_, b, _) in zip(right, shares)]):
        return "The gradients are missing: 4 bytes a parameter."
    if same([4 * p / c + 4 * p / b + 8 * p / a for a, b, c in shares]):
        return "The order is turned round: the moments, the largest and needed last, are cut first, the weights last."
    if same([right[0] / (n if stage else 1) for stage in range(4)]):
        return "You cut everything in every stage; stage 1 cuts the moments only, stage 2 the gradients too."
    if same([right[0], *right[:3]]):
        return "Your stages are off by one: stage 1 already cuts the moments."
    for stage in range(4):
        if not math.isclose(got[stage], right[stage], rel_tol=1e-9):
            return (
                f"Stage {stage}, 1,000 parameters, 8 ranks: {right[stage]:,.0f} bytes; yours gives {got[stage]:,.0f}."
            )
    return None


_PEAK, _SENT = 200_000, 450_000


def _puzzle() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    return [draw(64, 64) / 8 for _ in range(6)], [draw(4, 64) for _ in range(4)]


@exercise(lesson="41_data_parallel", level=3, minutes=40)
def check_sharded_gradients(attempt) -> str | None:
    weights, inputs = _puzzle()
    leaves = [w.clone().requires_grad_() for w in weights]
    y = torch.cat(inputs)
    for w in leaves:
        y = torch.tanh(y @ w.T)
    y.square().sum().backward()

    cluster = Cluster(dp=4)
    shards = [cluster.place(w, 0) for w in weights]
    xs = [x.clone() for x in inputs]
    with cluster.watch([[s[r] for s in shards] + [xs[r]] for r in range(4)]) as memory:
        try:
            out = attempt(cluster, [list(s) for s in shards], list(xs))
        except RuntimeError as error:
            if "has to be sent first" in str(error):
                return "A rank read another rank's tensor without a message: only collectives may cross."
            raise
    if len(out) != 6 or any(len(row) != 4 for row in out):
        return "Return gradients[i][r]: a list of 6 layers, each a list of 4 ranks."
    if tuple(out[0][0].shape) == (64, 64):
        return "The gradients are whole on each rank: cut them like the weights, 16x64, with a reduce-scatter."
    for i, leaf in enumerate(leaves):
        got = torch.cat([g.detach() for g in out[i]])
        if got.shape != leaf.grad.shape or not torch.allclose(got, leaf.grad, rtol=1e-9, atol=1e-12):
            if got.shape == leaf.grad.shape and torch.allclose(4 * got, leaf.grad, rtol=1e-9, atol=1e-12):
                return "You averaged over ranks; the objective is the sum of their losses."
            return f"The gradient of layer {i} is wrong. Does it hold what all four ranks contribute?"
    sent = max(cluster.ledger.by("source").values(), default=0)
    if max(memory.peak) > _PEAK:
        return (
            f"The gradients are right, but a rank held {max(memory.peak):,} bytes at its peak, and {_PEAK:,} are "
            "allowed: what is gathered must be gone before the next layer is (a graph that saves it keeps it alive)."
        )
    if sent > _SENT:
        return (
            f"The gradients are right and fit, but a rank sent {sent:,} bytes, and {_SENT:,} are allowed: two gathers "
            "and one reduce-scatter a layer are enough."
        )
    return None
