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
    weave = lambda *pair: torch.stack(pair, dim=-1).flatten(-2)
    join = lambda *pair: torch.cat(pair, dim=-1)
    pairings = {
        "Wrong sign: you turned by the opposite angle.": lambda sin: _turned(x, cos, sin),
        "Wrong pairing: you paired the halves, as Hugging Face does. In Meta's order the pairs are neighbours.": (
            lambda sin: join(first * cos - second * sin, first * sin + second * cos)
        ),
        "Wrong pairing: you took the pairs from the halves, but put them back as neighbours. Take neighbours too.": (
            lambda sin: weave(first * cos - second * sin, first * sin + second * cos)
        ),
        "The rotated pairs are right but not woven together again: the result must alternate a, b, a, b.": (
            lambda sin: join(a * cos - b * sin, a * sin + b * cos)
        ),
        "Wrong pairing, mixed: cos and sin are laid out for neighbours (repeat_interleave), but the partner comes from "
        "the other half (rotate_half).": lambda sin: x * weave(cos, cos) + join(-second, first) * weave(sin, sin),
        "Wrong pairing, mixed: the partner is the neighbour, but cos and sin are laid out for halves (cat). Neighbours "
        "share an angle (repeat_interleave).": lambda sin: x * join(cos, cos) + weave(-b, a) * join(sin, sin),
    }
    for verdict, made in pairings.items():
        if _close(y, made(sin)):
            return verdict
        if _close(y, made(-sin)):
            known = "" if verdict.startswith("Wrong sign") else " The sign is wrong as well."
            return f"{verdict}{known} The new first member is a*cos - b*sin."
    wrong = {
        "Cosine and sine are exchanged: at angle 0 the cosine is 1 and nothing may change.": _turned(x, sin, cos),
        "Both members have the same sign of the sine: that is no rotation, lengths change.": (
            weave(a * cos + b * sin, a * sin + b * cos)
        ),
        "Both members have a minus: that is no rotation, lengths change.": weave(a * cos - b * sin, b * cos - a * sin),
        "The members of each pair are exchanged: a*cos - b*sin comes first.": weave(
            a * sin + b * cos, a * cos - b * sin
        ),
        "The second member is made from the new first one: keep the old a until both are done. A slice such as "
        "x[:, 0::2] is no copy, it changes with x.": weave(a * cos - b * sin, (a * cos - b * sin) * sin + b * cos),
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
    same = lambda y, a: torch.allclose(y.double(), a, rtol=1e-5, atol=0)
    if same(y, right):
        other = attempt(f.clone(), 32.0, context // 2)
        keep = ((turns / 2 - 1) / 3).clamp(0, 1)
        if same(other, keep * f + (1 - keep) * f / 32):
            return None
        return "Right for a factor of 8 and 8,192 tokens only: use the arguments."
    scaled = lambda keep: keep * f + (1 - keep) * f / factor
    smooth = ((context / turns - context / 4) / (context - context / 4)).clamp(0, 1)  # linear in the wavelength
    wrong = {
        "Unscaled frequencies: nothing changed.": f,
        "You divided all frequencies. The fast ones, with more than 4 turns, stay as they are.": f / factor,
        "You multiplied: a stretched context needs slower rotation, so divide by the factor.": (
            keep * f + (1 - keep) * f * factor
        ),
        "The bands are exchanged: fast pairs stay, slow pairs are divided.": scaled(1 - keep),
        "There is no transition: between 1 and 4 turns go from f / factor to f on a straight line.": torch.where(
            turns < 4, f / factor, f
        ),
        "There is no transition: between 1 and 4 turns go from f / factor to f along a straight line.": torch.where(
            turns < 1, f / factor, f
        ),
        "The transition is turned around: at 4 turns it must arrive at f, at 1 turn at f / factor.": torch.where(
            (turns > 1) & (turns < 4), scaled(1 - keep), right
        ),
        "Your transition is a straight line in the wavelength; it must be one in the number of turns.": (
            scaled(1 - smooth)
        ),
        "You went in a straight line from one wavelength to the other: let the frequencies go in one.": (
            1 / (keep / f + (1 - keep) * factor / f)
        ),
        "Your count of turns lacks the 2 * pi: one turn is 2 * pi radians.": scaled(
            ((context * f - 1) / 3).clamp(0, 1)
        ),
        "Nothing holds the transition between its ends: clamp the share that stays to 0 and 1.": scaled(
            (turns - 1) / 3
        ),
        "From 1 to 4 turns it is 3: divide turns - 1 by 4 - 1, so that the share arrives at 1.": scaled(
            ((turns - 1) / 4).clamp(0, 1)
        ),
        "The transition begins at 1 turn, not at 0: take 1 off the turns, and divide by 4 - 1.": scaled(
            (turns / 4).clamp(0, 1)
        ),
    }
    for verdict, values in wrong.items():
        if same(y, values):
            return verdict
    if not same(y[turns > 4], f[turns > 4]):
        return "Pairs with more than 4 turns within the context must stay unchanged."
    if not same(y[turns < 1], f[turns < 1] / factor):
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
