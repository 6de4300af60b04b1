"""Checks for the exercises of lesson 40: the time of a ring, the backward of an all-gather, and a quick all-reduce."""

from __future__ import annotations

import math

import torch

from llama_edu.exercises import exercise
from llama_edu.parallel.simulated import Cluster

__all__ = ["check_all_gather_backward", "check_all_reduce_fast", "check_all_reduce_seconds"]


@exercise(lesson="40_collectives", level=1, minutes=5)
def check_all_reduce_seconds(attempt) -> str | None:
    nbytes, n, a, b = 1e6, 8, 1e-5, 1e9
    right = 2 * (n - 1) * (a + nbytes / n / b)
    got = attempt(nbytes, n, a, b)
    same = lambda value: math.isclose(got, value, rel_tol=1e-9)
    if same(right):
        return None if math.isclose(attempt(3e5, 3, a, b), 4 * (a + 1e5 / b), rel_tol=1e-9) else "Right for n = 8 only."
    wrong = {
        "That is one pass round the ring, a reduce-scatter. The sum has to be gathered as well: twice as long.": right
        / 2,
        "A message is one chunk, nbytes / n, not the whole tensor.": 2 * (n - 1) * (a + nbytes / b),
        "There are n - 1 steps in each pass, not n: a chunk need not come back to where it started.": (
            2 * n * (a + nbytes / n / b)
        ),
        "The latency is paid in every step, not once.": a + 2 * (n - 1) / n * nbytes / b,
        "You multiplied by the bandwidth, or left the latency out: a step is latency + bytes / bandwidth.": (
            2 * (n - 1) * nbytes / n / b
        ),
        "That is the tree: log2(n) steps with the whole tensor in each.": 2 * math.log2(n) * (a + nbytes / b),
    }
    for verdict, value in wrong.items():
        if same(value):
            return verdict
    return (
        f"For 1 MB, 8 ranks, 10 microseconds and 1 GB/s the ring takes {right * 1e3:.3f} ms; yours {got * 1e3:.3f} ms."
    )


@exercise(lesson="40_collectives", level=2, minutes=10)
def check_all_gather_backward(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(8, 3, dtype=torch.float64, generator=generator) for _ in range(4)]
    total = sum(grads)
    out = attempt([g.clone() for g in grads])
    if not isinstance(out, (list, tuple)) or len(out) != 4:
        return "Return a list with one gradient a rank."
    if out[0].shape == (8, 3):
        if torch.allclose(out[0], total):
            return "You added, but did not scatter: rank i's block is only block i of the sum."
        return f"A block has the shape (2, 3), a quarter of what was gathered; yours is {tuple(out[0].shape)}."
    same = lambda values: all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(out, values))
    if same(total.chunk(4)):
        return None
    if same([g.chunk(4)[i] for i, g in enumerate(grads)]):
        return "You took each rank's own gradient of its own block; the other ranks used the block too: add theirs."
    if same((total / 4).chunk(4)):
        return "You averaged. The objective is the sum of the ranks' losses, so gradients add."
    if same(total.chunk(4)[::-1]):
        return "The blocks are in the wrong order: rank i owns block i."
    return "Block i of the gradient is the sum over all ranks of block i of their gradients."


@exercise(lesson="40_collectives", level=3, minutes=30)
def check_all_reduce_fast(attempt) -> str | None:
    cluster = Cluster(8)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 64, dtype=torch.float64, generator=generator)
    xs = [row.clone() for row in values]
    with cluster.watch(xs):
        try:
            out = attempt(cluster, list(xs))
        except RuntimeError as error:
            if "has to be sent first" in str(error):
                return "A rank read another rank's tensor without a message: only what `exchange` brings may be used."
            raise
    if not isinstance(out, (list, tuple)) or len(out) != 8:
        return "Return a list of eight tensors, one a rank."
    if any(x is None or x.shape != (64,) for x in out):
        return "Every rank needs the whole sum, 64 numbers. Did you stop after the scattering half?"
    total = values.sum(0)
    for r, x in enumerate(out):
        if not torch.allclose(x, total, rtol=1e-12, atol=1e-12):
            if torch.allclose(x.sort().values, total.sort().values, rtol=1e-12, atol=1e-12):
                return f"Rank {r} has the right numbers in the wrong order: which half comes first depends on the rank."
            return f"Rank {r} does not have the sum of all eight."
    sent = max(cluster.ledger.by("source").values(), default=0)
    if not cluster.ledger.messages:
        return "No message was sent, so the sum was not computed by the ranks."
    if cluster.ledger.clock > 6:
        return (
            f"The sum is right, but it took {cluster.ledger.clock} steps, and 6 are allowed: talk to ranks 4, 2 and 1 "
            "away instead of to the neighbour."
        )
    if sent > 896:
        return (
            f"The sum is right in {cluster.ledger.clock} steps, but a rank sent {sent} bytes, and 896 are allowed: "
            "send halves, not whole tensors."
        )
    return None
