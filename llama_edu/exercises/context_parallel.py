"""Checks for the exercises of lesson 44: a rank's positions, merged partial attention, bytes of the gather, balance."""

from __future__ import annotations

import random

import torch

from llama_edu.config import LlamaConfig
from llama_edu.exercises import exercise

__all__ = ["check_assign", "check_combine", "check_gather_bytes", "check_rank_positions"]


@exercise(lesson="44_context_parallel", level=1, minutes=5)
def check_rank_positions(attempt) -> str | None:
    n, seq_len, size = 3, 24, 4
    chunk = lambda i: list(range(i * size, (i + 1) * size))
    got = [[int(p) for p in attempt(rank, n, seq_len)] for rank in range(n)]
    right = [chunk(r) + chunk(2 * n - 1 - r) for r in range(n)]
    if got == right:
        return None
    if got == [list(range(8 * r, 8 * r + 8)) for r in range(n)]:
        return "These are contiguous pieces: the last rank would have most of the work. Take 2n chunks, two a rank."
    if [sorted(g) for g in got] == [sorted(x) for x in right]:
        return "The tokens are right, but not their order: the early chunk comes first, each chunk in its own order."
    if got == [chunk(2 * r) + chunk(2 * r + 1) for r in range(n)]:
        return "Chunks 2r and 2r + 1 are neighbours: that is contiguous again. The partner of chunk i is 2n - 1 - i."
    if got == [chunk(r) + chunk(n + r) for r in range(n)]:
        return "Chunks i and n + i both grow with i: the partner must fall as i rises."
    if any(p >= seq_len for g in got for p in g):
        return f"Some positions lie past the end of {seq_len} tokens. The last chunk is number 2n - 1, counted from 0."
    if any(len(g) != 2 * size for g in got):
        return f"With {seq_len} tokens and {n} ranks each holds {2 * size}; yours hold {[len(g) for g in got]}."
    if sorted(p for g in got for p in g) != list(range(seq_len)):
        return "Together the ranks must hold every position once; some are missing or held twice."
    return f"Rank 0 of {n} holds {right[0]} of {seq_len} tokens; yours {got[0]}."


@exercise(lesson="44_context_parallel", level=2, minutes=15)
def check_combine(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(5, 12, dtype=torch.float64, generator=generator)
    v = torch.randn(12, 4, dtype=torch.float64, generator=generator)

    def meet(scores):
        parts = []
        for s, values in zip(scores.split(4, dim=1), v.split(4)):
            log = s.logsumexp(1)
            parts.append(((s.softmax(1).nan_to_num(0) @ values), log))
        return parts

    def same(a, b):
        return isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-12)

    parts = meet(scores)
    outs, logs = (torch.stack(x) for x in zip(*parts))
    right, total = scores.softmax(1) @ v, scores.logsumexp(1)
    got = attempt([tuple(x.clone() for x in p) for p in parts])
    if not (isinstance(got, tuple | list) and len(got) == 2):
        return "Return two things: the output, and the logarithm of its denominator, so that more can be merged."
    out, log = got
    if not same(out, right):
        if same(out, outs.mean(0)):
            return "You averaged the outputs: a block whose keys match better must count for more."
        if same(out, outs.sum(0)):
            return "You added outputs that are each normalised already: weigh them by their denominators."
        if same(out, (logs / logs.sum(0))[..., None].mul(outs).sum(0)):
            return "You weighted with the logarithms; the denominators are exp of them."
        if same(out, (logs.exp()[..., None] * outs).sum(0)):
            return "You added the numerators; now divide by the sum of the denominators."
        return (
            "The output differs from attention over all keys: each part's share is exp(its log - the log of the sum)."
        )
    if same(log, logs.amax(0)):
        return "The output is right, but you returned the largest logarithm; that of the sum is larger (logsumexp)."
    if same(log, logs.sum(0)):
        return "The output is right, but you added the logarithms: that multiplies the denominators."
    if same(log, total.exp()):
        return "The output is right, but you returned the denominator itself: take its logarithm."
    if not same(log, total):
        return "The output is right; the second value must be the logarithm of the sum of the denominators."

    blind = scores.clone()
    blind[1, :4] = blind[2] = -torch.inf
    out, log = attempt(meet(blind))
    if out.isnan().any() or log.isnan().any():
        return "A query that saw nothing gives NaN: -inf - (-inf) is not a number, so put another base there."
    right = blind.softmax(1).nan_to_num(0) @ v
    if not same(out, right) or not same(log, blind.logsumexp(1)):
        return "Wrong where a query saw nothing of a block (its weight is 0), or nothing at all (zeros and -inf)."
    out, _ = attempt([(o, x + 5000) for o, x in parts])
    if not torch.allclose(out, outs.mul((logs - total).exp()[..., None]).sum(0), atol=1e-6):
        return "Right for small scores, but exp of 5,000 overflows: subtract the logarithm of the sum before exp."
    return None


@exercise(lesson="44_context_parallel", level=1, minutes=10)
def check_gather_bytes(attempt) -> str | None:
    cases = (("llama-3.1-405b", 131_072, 16, 8), ("llama-3.1-8b", 32_768, 4, 2))
    for name, seq_len, cp, tp in cases:
        cfg = LlamaConfig.preset(name)
        got = float(attempt(cfg, seq_len, cp, tp))
        right = 2 * 2 * seq_len * (cfg.n_kv_heads // tp) * cfg.head_dim * 2 * (cp - 1) / cp
        same = lambda value, got=got: abs(got / value - 1) < 1e-9
        if same(right):
            continue
        if same(right * cfg.n_heads / cfg.n_kv_heads):
            return "You counted a key for every query head: only n_kv_heads travel, which is what makes it cheap."
        if same(right / 2):
            return "Half is missing: keys and values travel, and the backward pass sends as much as the forward pass."
        if same(right / 4):
            return "That is the keys' all-gather alone: values travel too, and both once more in the backward pass."
        if same(right * cp / (cp - 1)):
            return "A rank does not send n blocks but n - 1: the factor (cp - 1) / cp is missing."
        if same(right * tp):
            return "Tensor parallelism has cut the heads already: a rank sends those of n_kv_heads / tp."
        if same(right / (cp - 1)):
            return (
                "That is one block. In a ring all-gather a rank sends cp - 1 of them, its own and those it passes on."
            )
        if same(right * 2):
            return "Twice too much: bfloat16 has 2 bytes."
        return f"{name}, {seq_len:,} tokens, cp {cp}, tp {tp}: {right:,.0f} bytes a rank and layer; yours {got:,.0f}."
    return None


_TARGET = 1.02


def _documents(seed: int) -> list[int]:
    """Work of 64 chunks of 256 tokens under a mask of long and short documents."""
    draw, left, lengths = random.Random(seed), 64 * 256, []
    while left:
        lengths.append(min(left, draw.choice((100, 200, 300, 400, 5000))))
        left -= lengths[-1]
    work = [position + 1 for length in lengths for position in range(length)]
    return [sum(work[i : i + 256]) for i in range(0, len(work), 256)]


@exercise(lesson="44_context_parallel", level=3, minutes=30)
def check_assign(attempt) -> str | None:
    n = 8
    for seed in (3, 0, 2):
        work = _documents(seed)
        ranks = [[int(i) for i in rank] for rank in attempt(list(work), n)]
        if len(ranks) != n:
            return f"Return a list for each of the {n} ranks; yours has {len(ranks)}."
        if sorted(i for rank in ranks for i in rank) != list(range(len(work))):
            return "Every chunk must be on one rank, once; some of yours are missing or there twice."
        if any(len(rank) != len(work) // n for rank in ranks):
            return (
                f"The ranks hold {[len(r) for r in ranks]} chunks: the work may be even, the memory is not. "
                f"Give each {len(work) // n}."
            )
        worst = max(sum(work[i] for i in rank) for rank in ranks) * n / sum(work)
        if worst > _TARGET:
            size = len(work) // n
            named = {
                "Contiguous pieces": [set(range(r * size, (r + 1) * size)) for r in range(n)],
                "Every n-th chunk": [set(range(r, len(work), n)) for r in range(n)],
                "Head and tail": [
                    set(range(r * size // 2, (r + 1) * size // 2))
                    | set(range(len(work) - (r + 1) * size // 2, len(work) - r * size // 2))
                    for r in range(n)
                ],
            }
            name = next((k for k, v in named.items() if v == [set(r) for r in ranks]), "Your assignment")
            return (
                f"{name}: the busiest rank has {worst:.2f} times the mean, and {_TARGET} is allowed. Look at `work`: "
                "where is a chunk late in a long document?"
            )
    return None
