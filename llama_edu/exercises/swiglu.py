"""Checks for the exercises of lesson 23: the gated layer, its backward pass, and its width."""

from __future__ import annotations

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_edu.config import ffn_width
from llama_edu.exercises import exercise

__all__ = ["check_hidden_width", "check_swiglu", "check_swiglu_backward"]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance)


@exercise(lesson="23_swiglu", level=1, minutes=5)
def check_swiglu(attempt) -> str | None:
    x, w1, w2, w3 = _random(5, 6, seed=0), _random(10, 6, seed=1), _random(6, 10, seed=2), _random(10, 6, seed=3)
    y = attempt(x.clone(), w1.clone(), w2.clone(), w3.clone())
    if y.shape != x.shape:
        return f"The result must have the shape of x, {tuple(x.shape)}; yours has {tuple(y.shape)}."
    gate, up = x @ w1.T, x @ w3.T
    if _close(y, (F.silu(gate) * up) @ w2.T):
        return None
    if _close(y, x):
        return "You returned x: x * sigmoid(x) + (1 - sigmoid(x)) * x is the identity. The layer has three matrices."
    hidden = {
        "Gate and up are swapped: silu goes on what w1 makes, and w3 is left plain.": gate * F.silu(up),
        "Your gate has the sigmoid only: that is GLU. Silu is the input times its sigmoid.": torch.sigmoid(gate) * up,
        "Your gate is a ReLU: that is ReGLU.": F.relu(gate) * up,
        "Your gate is a GELU: that is GEGLU.": F.gelu(gate) * up,
        "Your gate is a GELU in its tanh form: that is GEGLU.": F.gelu(gate, approximate="tanh") * up,
        "You left the nonlinearity out: that is the bilinear layer.": gate * up,
        "You applied silu to the product; it goes on the gate alone, before multiplying.": F.silu(gate * up),
        "You applied silu to both: w3 is left plain.": F.silu(gate) * F.silu(up),
        "You added gate and up: they are multiplied.": F.silu(gate) + up,
        "Your gate is a tanh: silu is the input times its sigmoid.": torch.tanh(gate) * up,
        "You left w3 out: that is the older layer with two matrices.": F.silu(gate),
    }
    for verdict, values in hidden.items():
        if _close(y, values @ w2.T):
            return verdict
    if _close(y, (F.silu(x) @ w1.T * up) @ w2.T):
        return "You applied silu to x; it goes on the gate, on what w1 makes of x."
    if _close(y, F.silu((gate * up) @ w2.T)):
        return "You applied silu to the result; it goes on the gate, before the product."
    return "The values differ from w2(silu(w1 x) * w3 x)."


@exercise(lesson="23_swiglu", level=2, minutes=15)
def check_swiglu_backward(attempt) -> str | None:
    gate, up, grad = _random(5, 6, seed=0), _random(5, 6, seed=1), _random(5, 6, seed=2)
    result = attempt(grad.clone(), gate.clone(), up.clone())
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        return "Return two tensors: the gradient of the gate, then the gradient of up."
    grad_gate, grad_up = result
    sigma = torch.sigmoid(gate)
    silu = gate * sigma
    slope = sigma + silu * (1 - sigma)
    if _close(grad_gate, grad * silu) and _close(grad_up, grad * up * slope):
        return "The two gradients are in the wrong order: the gate first, then up."
    if not _close(grad_up, grad * silu):
        if _close(grad_up, silu):
            return "That is the slope of up alone: multiply it by grad, the gradient that arrives."
        if _close(grad_up, grad * gate):
            return "The gradient of up multiplies grad with silu(gate), not with the gate itself."
        return "The gradient of up differs: up is multiplied by silu(gate), so that is its slope."
    wrong = {
        "The slope of silu is more than the sigmoid: the gate also stands inside it. Use the product rule.": sigma,
        "The slope of silu is more than gate * sigmoid': the gate also stands in front. Use the product rule.": (
            silu * (1 - sigma)
        ),
        "You used the slope of the sigmoid, sigma * (1 - sigma); silu has another factor, the gate.": (
            sigma * (1 - sigma)
        ),
        "The second term of the slope has the wrong sign: sigmoid' is sigma * (1 - sigma), positive.": (
            sigma - silu * (1 - sigma)
        ),
        "You used silu for its own slope.": silu,
        "You used the slope of ReLU: silu is smooth.": (gate > 0).to(gate.dtype),
    }
    for verdict, values in wrong.items():
        if _close(grad_gate, grad * up * values):
            return verdict
    if _close(grad_gate, grad * slope):
        return "The gradient of the gate lacks up: what the gate is multiplied with is its slope."
    if _close(grad_gate, up * slope):
        return "The gradient of the gate lacks grad, the gradient that arrives."
    if not _close(grad_gate, grad * up * slope):
        return "The gradient of the gate differs from that of autograd."
    return None


@exercise(lesson="23_swiglu", level=1, minutes=10)
def check_hidden_width(attempt) -> str | None:
    published = [(4096, 256, None), (5120, 256, None), (8192, 4096, 1.3), (16384, 4096, 1.2), (2048, 256, 1.5)]
    cases = [*published, (100, 1, 4.0)]
    found, right = [attempt(*case) for case in cases], [ffn_width(*case) for case in cases]
    if any(not isinstance(width, Integral) for width in found):
        return "A width is a whole number: return an int."
    if found == right:
        return None

    def widths(hidden, rounding):
        return [rounding(hidden(dim, 1 if k is None else k), m) for dim, m, k in cases]

    hidden = lambda dim, k: int(k * int(8 * dim / 3))
    up = lambda n, m: -(-n // m) * m
    wrong = {
        "You rounded down: the width is rounded up to a multiple.": widths(hidden, lambda n, m: n // m * m),
        "You rounded to the nearest multiple: it is rounded up.": widths(hidden, lambda n, m: (n + m // 2) // m * m),
        "A width that is a multiple already stays; you raised it.": widths(hidden, lambda n, m: (n // m + 1) * m),
        "You left out the two thirds: three matrices must cost as much as two.": (
            widths(lambda dim, k: int(k * 4 * dim), up)
        ),
        "You took two thirds of dim: it is two thirds of four times dim.": (
            widths(lambda dim, k: int(k * int(2 * dim / 3)), up)
        ),
        "You ignored the multiplier.": widths(lambda dim, k: int(8 * dim / 3), up),
        "The multiplier comes before rounding, or the width is no multiple any more.": (
            [int((k or 1) * up(int(8 * dim / 3), m)) for dim, m, k in cases]
        ),
    }
    for verdict, values in wrong.items():
        if found == values:
            return verdict
    if found[:-1] == right[:-1]:
        return "The published widths are right, but fractions are dropped twice: before the multiplier and after it."
    case, mine, yours = next((c, r, f) for c, r, f in zip(cases, right, found) if r != f)
    return f"For dim {case[0]}, multiple_of {case[1]} and multiplier {case[2]} the width is {mine}, not {yours}."
