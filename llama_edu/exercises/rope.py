"""Checks for the exercises of lesson 21: the rotation, Llama 3.1's frequencies, and the order of the rows."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from llama_edu.exercises import exercise

__all__ = ["check_permute_rows", "check_rotate", "check_scale_frequencies"]


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)).flatten(-2)


@exercise(lesson="21_rope", level=1, minutes=10)
def check_rotate(attempt) -> str | None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.6, 0.3, 0.1]))
    cos, sin = angles.cos(), angles.sin()
    y = attempt(x.clone(), cos.clone(), sin.clone())
    if y.shape != x.shape:
        return f"The result must have the shape of x, {tuple(x.shape)}; yours has {tuple(y.shape)}."
    if _close(y, _turned(x, cos, sin)):
        return None
    a, b = x[:, 0::2], x[:, 1::2]
    first, second = x.chunk(2, dim=-1)
    turned_halves = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    wrong = {
        "Wrong sign: you turned by the opposite angle. The new first member is a*cos - b*sin.": _turned(x, cos, -sin),
        "Wrong pairing: you paired the halves, as Hugging Face does. In Meta's order the pairs are neighbours.": (
            turned_halves
        ),
        "Wrong pairing and wrong sign: pairs are neighbours here, and the first member becomes a*cos - b*sin.": (
            torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
        ),
        "The rotated pairs are right but not woven together again: the result must alternate a, b, a, b.": torch.cat(
            [a * cos - b * sin, a * sin + b * cos], dim=-1
        ),
        "Cosine and sine are exchanged: at angle 0 the cosine is 1 and nothing may change.": _turned(x, sin, cos),
        "Both members have the same sign of the sine: that is no rotation, lengths change.": (
            torch.stack([a * cos + b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        ),
        "You changed nothing.": x,
    }
    for verdict, values in wrong.items():
        if _close(y, values):
            return verdict
    if not _close(y.norm(dim=-1), x.norm(dim=-1)):
        return "A rotation keeps lengths; yours changes them."
    return "Lengths are kept, but the pairs do not turn by the angles of cos and sin."


@exercise(lesson="21_rope", level=2, minutes=15)
def check_scale_frequencies(attempt) -> str | None:
    factor, context = 8.0, 8192
    f = 5e5 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    turns = context * f / (2 * math.pi)
    keep = ((turns - 1) / 3).clamp(0, 1)
    right = keep * f + (1 - keep) * f / factor
    y = attempt(f.clone(), factor, context)
    if y.shape != f.shape:
        return f"The result must have the shape of the frequencies, {tuple(f.shape)}; yours has {tuple(y.shape)}."
    same = lambda a: torch.allclose(y, a.to(y.dtype), rtol=1e-6, atol=0)
    if same(right):
        other = attempt(f.clone(), 32.0, context // 2)
        keep = ((turns / 2 - 1) / 3).clamp(0, 1)
        if torch.allclose(other, keep * f + (1 - keep) * f / 32, rtol=1e-6, atol=0):
            return None
        return "Right for a factor of 8 and 8,192 tokens only: use the arguments."
    smooth = ((context / turns - context / 4) / (context - context / 4)).clamp(0, 1)  # linear in the wavelength
    wrong = {
        "Unscaled frequencies: nothing changed.": f,
        "You divided all frequencies. The fast ones, with more than 4 turns, stay as they are.": f / factor,
        "You multiplied: a stretched context needs slower rotation, so divide by the factor.": (
            keep * f + (1 - keep) * f * factor
        ),
        "The bands are exchanged: fast pairs stay, slow pairs are divided.": (1 - keep) * f + keep * f / factor,
        "There is no transition: between 1 and 4 turns go from f / factor to f on a straight line.": torch.where(
            turns < 4, f / factor, f
        ),
        "There is no transition: between 1 and 4 turns go from f / factor to f along a straight line.": torch.where(
            turns < 1, f / factor, f
        ),
        "The transition is turned around: at 4 turns it must arrive at f, at 1 turn at f / factor.": torch.where(
            (turns > 1) & (turns < 4), (1 - keep) * f + keep * f / factor, right
        ),
        "Your transition is a straight line in the wavelength; it must be one in the number of turns.": (
            (1 - smooth) * f + smooth * f / factor
        ),
    }
    for verdict, values in wrong.items():
        if same(values):
            return verdict
    if not torch.allclose(y[turns > 4], f[turns > 4].to(y.dtype), rtol=1e-6, atol=0):
        return (
            "Pairs with more than 4 turns within the context must stay unchanged. Is the 2 * pi in your count of turns?"
        )
    if not torch.allclose(y[turns < 1], f[turns < 1].to(y.dtype) / factor, rtol=1e-6, atol=0):
        return "Pairs with less than 1 turn within the context must be divided by the factor."
    return "Fast and slow pairs are right; those between 1 and 4 turns are not."


@exercise(lesson="21_rope", level=2, minutes=10)
def check_permute_rows(attempt) -> str | None:
    w = torch.arange(24.0)[:, None] + torch.arange(24.0) / 100
    y = attempt(w.clone(), 3)
    if y.shape != w.shape:
        return f"The result must have the shape of w, {tuple(w.shape)}; yours has {tuple(y.shape)}."
    forward = "(h p t) c -> (h t p) c"
    if _close(y, rearrange(w, forward, h=3, t=2)):
        return None
    wrong = {
        "You changed nothing.": w,
        "That is the way back, from Hugging Face's order to Meta's.": rearrange(w, "(h t p) c -> (h p t) c", h=3, t=2),
        "You reordered all rows as if they were one head: stay within each head.": rearrange(w, forward, h=1, t=2),
        "You reordered the columns, the features that go in; the rows are the features of the heads.": (
            rearrange(w, "r (h p t) -> r (h t p)", h=3, t=2)
        ),
        "You exchanged the heads with the pairs: heads stay where they are.": (
            rearrange(w, "(h p t) c -> (p h t) c", h=3, t=2)
        ),
    }
    for verdict, values in wrong.items():
        if _close(y, values):
            return verdict
    if not _close(y.sort(dim=0).values, w):
        return "Not every row is there exactly once: reorder them, do not change them."
    return (
        "The rows are in another order: within each head, first all first members of the pairs, then all second ones."
    )
