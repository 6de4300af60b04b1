"""Checks for the exercises of lesson 52: bytes of a token, scales of int8, int4 unpacked, acceptance of guesses."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from llama_edu.config import LlamaConfig
from llama_edu.exercises import exercise

__all__ = ["check_accept", "check_bytes_per_token", "check_row_scales", "check_unpack_int4"]


@exercise(lesson="52_fast_decoding", level=1, minutes=5)
def check_bytes_per_token(attempt) -> str | None:
    cfg = LlamaConfig.preset("llama-3-8b")
    heads = 2 * cfg.dim * cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads)
    layers = cfg.n_layers * (heads + 3 * cfg.dim * cfg.ffn_dim)
    table = cfg.vocab_size * cfg.dim
    kv = cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim * 2
    for bits, length in ((16, 1000), (8, 500)):
        answer = float(attempt(cfg, bits, length))
        weights, cache = (layers + table) * bits / 8, length * kv
        near = lambda value: abs(answer - value) < 2e-4 * weights  # noqa: B023 (norms may count or not)
        if near(weights + cache):
            continue
        wrong = {
            "Your cache is quantised like the weights: its numbers have 2 bytes each.": weights + cache * bits / 16,
            "The cache is missing: every key and value so far is read too.": weights,
            "You counted the embedding table: a token reads one row of it. The output matrix is read whole.": (
                weights + table * bits / 8 + cache
            ),
            "The output matrix is missing: every token reads all of it.": layers * bits / 8 + cache,
            "You took bits for bytes: a byte has 8 of them.": (layers + table) * bits + cache,
            "Keys and values are both read: your cache has one of them.": weights + cache / 2,
            "The cache has a head for each query head in your count; grouped attention keeps `n_kv_heads`.": (
                weights + cache * cfg.n_heads / cfg.n_kv_heads
            ),
        }
        for verdict, value in wrong.items():
            if near(value):
                return verdict
        return f"At {bits} bits and {length} cached tokens it is {weights + cache:.4g} bytes; yours are {answer:.4g}."
    return None


@exercise(lesson="52_fast_decoding", level=1, minutes=5)
def check_row_scales(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 8, generator=generator) * torch.tensor([[0.1], [1.0], [3.0], [0.5], [10.0]])
    w[:, 3] = -w.abs().amax(1) * 1.5  # the largest of each row is negative
    scales = attempt(w.clone())
    if not isinstance(scales, Tensor):
        return f"A tensor is expected; you returned {type(scales).__name__}."
    right = w.abs().amax(1, keepdim=True) / 127
    same = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=1e-5)
    if same(scales, right):
        return None
    if scales.numel() == 1 or torch.allclose(scales, (w.abs().max() / 127).expand_as(scales)):
        return "That is one scale for the whole matrix: its largest row decides, and small rows become zero."
    if same(scales, right[:, 0]):
        return "The numbers are right, the shape must be (rows, 1): use `keepdim=True`, or dividing mixes up rows."
    if scales.shape in ((1, 8), (8,)):
        return "Those are scales of the columns: a scale that belongs to a row can wait until the row's sum is done."
    wrong = {
        "The absolute value is missing: here the largest number of each row is negative, and it would not fit.": (
            w.amax(1, keepdim=True) / 127
        ),
        "You divided by 128: the largest weight becomes 128, which int8 does not have.": right * 127 / 128,
        "You divided by 255: the numbers have a sign, 127 steps on each side.": right * 127 / 255,
        "That is the inverse of the scale: w is about values * scale.": 1 / right,
        "The division by 127 is missing.": right * 127,
    }
    for verdict, value in wrong.items():
        if same(scales, value):
            return verdict
    return "The scales differ from max |w| of each row, divided by 127."


@exercise(lesson="52_fast_decoding", level=2, minutes=10)
def check_unpack_int4(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(-8, 8, (3, 2, 32), generator=generator, dtype=torch.int32)
    shifted = (right + 8).to(torch.uint8)
    packed = (shifted[..., :16] | (shifted[..., 16:] << 4)).flatten(1)
    got = attempt(packed.clone())
    if not isinstance(got, Tensor) or got.shape != (3, 64):
        return (
            f"A tensor of shape (3, 64) is expected for bytes of shape (3, 32); yours is {getattr(got, 'shape', got)}."
        )
    whole = got.to(torch.int32)
    flat, low, high = right.flatten(1), right[..., :16], right[..., 16:]
    if torch.equal(whole, flat):
        return None
    if torch.equal(whole + 256 * (whole < -8) - 256 * (whole > 7), flat) and got.dtype == torch.uint8:
        return "Your numbers are unsigned bytes, in which 3 - 8 becomes 251: make them signed before you subtract 8."
    layouts = {
        "": flat,
        "The halves are exchanged: the low four bits hold weight i, the high ones weight i + 16.": (
            torch.cat([high, low], -1).flatten(1)
        ),
        "You put the two halves of a byte side by side: they are 16 places apart.": (
            torch.stack([low, high], -1).flatten(1)
        ),
        "You put all low halves of a row before all high ones: the layout repeats every 16 bytes.": (
            torch.cat([low.flatten(1), high.flatten(1)], -1)
        ),
    }
    zeros = {
        "": 0,
        "The zero is wrong: 8 was added, so 0 stands for -8; you subtracted 7, one too few.": 1,
        "The zero is missing: 8 was added to every number, so 8 must be subtracted.": 8,
    }
    for layout, values in layouts.items():
        for zero, offset in zeros.items():
            if (layout or zero) and torch.equal(whole, values + offset):
                return " ".join(part for part in (zero, layout) if part)
    twos = lambda t: t + 8 - 16 * (t + 8 > 7)  # the same bits read as two's complement
    if torch.equal(whole, twos(flat)):
        return "You read the four bits as two's complement: here 0 to 15 stand for -8 to 7 in order."
    return "The numbers differ from (four bits) - 8 in the layout of the lesson."


def _induced(attempt, p: Tensor, q: Tensor, n: int = 40) -> Tensor:
    """How `attempt` distributes its answers, over a grid of the two uniform numbers."""
    grid = ((torch.arange(n) + 0.5) / n).tolist()
    result = torch.zeros(len(p), dtype=torch.float64)
    for token in range(len(p)):
        for u in grid:
            for v in grid:
                answer = int(attempt(p.clone(), q.clone(), token, u, v))
                result[answer] += q[token] / n**2
    return result


@exercise(lesson="52_fast_decoding", level=3, minutes=15)
def check_accept(attempt) -> str | None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    first = attempt(p.clone(), q.clone(), 0, 0.5, 0.5)
    if not isinstance(first, (Integral, Tensor)):  # NumPy's whole numbers, too
        return f"Return the token's number; you returned {type(first).__name__}."
    got = _induced(attempt, p, q)
    near = lambda d: bool((got - d).abs().max() < 0.02)
    if near(p):
        return None
    kept = torch.minimum(p, q)
    lost = 1 - kept.sum()
    residual = (p - q).clamp_min(0)
    distance = (p - q).abs()
    best = torch.zeros_like(p).index_fill_(0, residual.argmax().reshape(1), 1.0)
    wrong = {
        "The answers are distributed as q: nothing is ever rejected.": q,
        "After a rejection you draw from p again, so tokens that q likes come too often: draw from the residual.": (
            kept + lost * p
        ),
        "After a rejection you draw from q again: draw from what p has beyond q.": kept + lost * q,
        "After a rejection you draw from |p - q|: only where p is larger is something missing.": (
            kept + lost * distance / distance.sum()
        ),
        "After a rejection you take the likeliest token of the residual: it must be drawn.": kept + lost * best,
    }
    for verdict, distribution in wrong.items():
        if near(distribution):
            return verdict
    turned = q * torch.minimum(torch.ones_like(p), q / p)
    if near(turned + (1 - turned.sum()) * residual / residual.sum()):
        return "Your ratio is upside down: a token is kept with probability p / q, not q / p."
    alike = (q * p + (1 - (q * p).sum()) * residual / residual.sum()).round(decimals=6)
    if near(alike):
        return "You keep a token with probability p; it must be p / q, for q has drawn it already."
    shown = ", ".join(f"{x:.2f}" for x in got.tolist())
    return (
        f"The answers come with the probabilities {shown}; they should be {', '.join(f'{x:.2f}' for x in p.tolist())}."
    )
