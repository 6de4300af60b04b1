"""Checks for the exercises of lesson 20: the norm, its backward pass, and its weight folded into a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_edu.exercises import exercise

__all__ = ["check_fold_weight", "check_rms_norm", "check_rms_norm_backward"]

EPS = 0.25  # large, so that its place shows


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance)


@exercise(lesson="20_rmsnorm", level=1, minutes=5)
def check_rms_norm(attempt) -> str | None:
    x, weight = 0.7 + _random(2, 5, 16), 1 + 0.5 * _random(16, seed=1)
    y = attempt(x.clone(), weight.clone(), EPS)
    right = F.rms_norm(x, (16,), weight, EPS)
    mean_square = x.square().mean(-1, keepdim=True)
    if not isinstance(y, Tensor):
        return f"A tensor is expected; you returned {type(y).__name__}."
    if y.shape != x.shape:
        return f"The result must have the shape of x, {tuple(x.shape)}; yours has {tuple(y.shape)}."
    if not _close(y, right):
        wrong = {
            "You left out the weight: each feature is scaled by its own.": right / weight,
            "You subtracted the mean: that is LayerNorm. RMSNorm only divides.": (
                F.layer_norm(x, (16,), weight, None, EPS)
            ),
            "You divided by the length of the vector. The root mean square is the length divided by sqrt(dim).": (
                x / (x.square().sum(-1, keepdim=True) + EPS).sqrt() * weight
            ),
            "You divided by the mean square itself: take its root.": x / (mean_square + EPS) * weight,
            "Your epsilon is outside the root: add it to the mean square, then take the root.": (
                x / (mean_square.sqrt() + EPS) * weight
            ),
            "You forgot epsilon: a vector of zeros would divide by zero.": x / mean_square.sqrt() * weight,
            "You normalised over more than the last dimension: each vector along it stands alone.": (
                x * torch.rsqrt(x.square().mean((-1, -2), keepdim=True) + EPS) * weight
            ),
            "You normalised over another dimension: each vector along the last one stands alone.": (
                x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * weight
            ),
            "You normalised over the first dimension: each vector along the last one stands alone.": (
                x * torch.rsqrt(x.square().mean(0, keepdim=True) + EPS) * weight
            ),
            "You multiplied by the size; it must be divided out.": x * (mean_square + EPS).sqrt() * weight,
            "You scaled by 1 + weight, as some other models do; here the weight itself scales.": (
                right / weight * (1 + weight)
            ),
            "You took one mean over the whole tensor: each vector has its own size.": (
                x * torch.rsqrt(x.square().mean() + EPS) * weight
            ),
        }
        for verdict, values in wrong.items():
            if _close(y, values):
                return verdict
        return "The values differ from x / sqrt(mean(x**2) + eps) * weight."
    half = torch.full((1, 8), 300.0, dtype=torch.float16)
    low = attempt(half, torch.ones(8, dtype=torch.float16), EPS)
    if low.dtype != torch.float16:
        return f"The result must have the dtype of x; for float16 yours has {low.dtype}."
    if not _close(low.float(), torch.ones(1, 8), 1e-2):
        return "A float16 input of 300s gives zeros: its squares overflow. Convert to float32 before squaring."
    brain = (1 + 0.3 * _random(64, 512, seed=2)).bfloat16()
    exact = F.rms_norm(brain.double(), (512,), None, EPS)
    low = attempt(brain, torch.ones(512, dtype=torch.bfloat16), EPS).double()
    ratio = (low * exact).sum(-1) / exact.square().sum(-1)
    if (ratio - 1).abs().mean() > 3e-4:
        return "In bfloat16 whole vectors are off by one factor: take the statistics in float32 and convert at the end."
    return None


@exercise(lesson="20_rmsnorm", level=2, minutes=15)
def check_rms_norm_backward(attempt) -> str | None:
    x, grad = _random(6, 16, dtype=torch.float64), _random(6, 16, seed=1, dtype=torch.float64)
    weight = 1 + 0.5 * _random(16, seed=2, dtype=torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    right_x, right_w = torch.autograd.grad(F.rms_norm(x, (16,), weight, EPS), [x, weight], grad)
    x, weight = x.detach(), weight.detach()
    result = attempt(grad.clone(), x.clone(), weight.clone(), EPS)
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        return "Return two tensors: the gradient of x, then the gradient of weight."
    grad_x, grad_w = result
    inv_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    unit, grad_unit = x * inv_rms, grad * weight
    along = lambda g: (g * unit).mean(-1, keepdim=True) * unit
    bare = torch.rsqrt(x.square().mean(-1, keepdim=True))  # without epsilon
    if _close(grad_x, right_w) and _close(grad_w, right_x):
        return "The two gradients are in the wrong order: x first, then weight."
    if not _close(grad_x, right_x):
        wrong = {
            "The gradient of x lacks the way through the size: every output depends on every input, through rms.": (
                inv_rms * grad_unit
            ),
            "The gradient of x lacks the weight: what reaches the normalised vector is grad * weight.": (
                inv_rms * (grad - along(grad))
            ),
            "The part along the vector is added in your gradient of x: the derivative of 1/rms is negative.": (
                inv_rms * (grad_unit + along(grad_unit))
            ),
            "The part along the vector is a mean over the features; you took the sum: divide by dim.": (
                inv_rms * (grad_unit - 16 * along(grad_unit))
            ),
            "The gradient of x lacks the factor 1/rms in front.": grad_unit - along(grad_unit),
            "Epsilon is missing: rms is the root of mean(x**2) + eps, here as in the forward pass.": (
                bare * (grad_unit - (grad_unit * x * bare).mean(-1, keepdim=True) * x * bare)
            ),
            "You took one mean over all vectors in the gradient of x: each vector has its own.": (
                inv_rms * (grad_unit - (grad_unit * unit).mean() * unit)
            ),
            "The mean in the gradient of x runs over the vectors; it must run over the features of each.": (
                inv_rms * (grad_unit - (grad_unit * unit).mean(0) * unit)
            ),
            "The part along the vector is made from x; it must be made from the normalised vector.": (
                inv_rms * (grad_unit - (grad_unit * x).mean(-1, keepdim=True) * x)
            ),
            "You took the mean off as well: that is the gradient of LayerNorm.": (
                inv_rms * (grad_unit - along(grad_unit) - grad_unit.mean(-1, keepdim=True))
            ),
        }
        for verdict, values in wrong.items():
            if _close(grad_x, values):
                return verdict
        return "The gradient of x differs from that of autograd."
    if not _close(grad_w, right_w):
        if grad_w.shape == x.shape and _close(grad_w.sum(0), right_w):
            return "One weight serves all vectors: sum its gradient over them."
        if grad_w.shape == (1, 16) and _close(grad_w[0], right_w):
            return "The gradient of weight must have its shape, (16,); yours has (1, 16): leave out the keepdim."
        if grad_w.shape == (6,):
            return "You summed the gradient of weight over the features; sum over the vectors, so that (16,) is left."
        if _close(grad_w, (grad * x * bare).sum(0)):
            return "Epsilon is missing in the gradient of weight: rms is the root of mean(x**2) + eps."
        if _close(grad_w, (grad * x).sum(0)):
            return "The gradient of weight multiplies grad with the normalised vector, not with x."
        if _close(grad_w * len(x), right_w):
            return "The gradient of weight is a sum over the vectors, not a mean."
        return "The gradient of weight differs from that of autograd."
    return None


@exercise(lesson="20_rmsnorm", level=2, minutes=10)
def check_fold_weight(attempt) -> str | None:
    matrix, weight, x = _random(8, 8), 1 + 0.5 * _random(8, seed=1), _random(5, 8, seed=2)
    folded = attempt(weight.clone(), matrix.clone())
    if folded.shape != matrix.shape:
        return f"The new matrix must have the shape of the old, {tuple(matrix.shape)}; yours has {tuple(folded.shape)}."
    right = F.rms_norm(x, (8,), weight, 1e-5) @ matrix.T
    if _close(F.rms_norm(x, (8,), None, 1e-5) @ folded.to(x.dtype).T, right):
        return None
    if _close(folded, matrix):
        return "You changed nothing."
    if _close(folded, matrix * weight[:, None]):
        return "You scaled the rows, the features that come out. The weight acts on those that go in: the columns."
    if _close(folded, matrix / weight):
        return "You divided by the weight: that takes it out a second time. The matrix must do its work: multiply."
    if _close(folded, matrix * weight * weight):
        return "The weight is in twice: the norm in front of your matrix no longer has one, so one factor is enough."
    if _close(folded, matrix.T * weight) or _close(folded, (matrix * weight).T):
        return "You returned the transpose: the matrix is (out, in), and is used as x @ matrix.T."
    return "A norm without weight followed by your matrix does not give what the norm with weight and the old one did."
