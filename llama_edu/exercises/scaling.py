"""Checks for the exercises of lesson 32: a parabola's vertex, the best split of a budget, the Huber objective."""

from __future__ import annotations

import numpy as np

from llama_edu.exercises import exercise, ignored_argument

__all__ = ["check_compute_optimal", "check_huber_objective", "check_parabola_vertex"]

SIZES = np.array([1.1e7, 2.0e7, 4.3e7, 9.0e7, 1.5e8, 3.2e8])


def _close(a: object, b: object, tolerance: float = 1e-6) -> bool:
    a, b = np.asarray(a, float), np.asarray(b, float)
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=tolerance, atol=0))


@exercise(lesson="32_scaling_laws", level=1, minutes=5)
def check_parabola_vertex(attempt) -> str | None:
    loss = 3.0 + 0.11 * (np.log(SIZES) - np.log(7e7)) ** 2 + 0.01 * np.array([1, -1, 0.5, 1, -1, 0.5])
    order = np.array([3, 0, 5, 2, 4, 1])
    found = attempt(SIZES[order].copy(), loss[order].copy())
    if np.ndim(found) != 0:
        return f"One number is expected, the size at the vertex; you returned {type(found).__name__}."
    x = np.log(SIZES)
    c2, c1, _ = np.polyfit(x - x.mean(), loss, 2)
    right = np.exp(x.mean() - c1 / (2 * c2))
    if _close(found, right):
        return None
    p2, p1, _ = np.polyfit(SIZES / 1e8, loss, 2)
    wrong = {
        "That is the run with the lowest loss. The vertex lies between the runs: take it from the parabola.": (
            SIZES[loss.argmin()]
        ),
        "That is the logarithm of the size: undo it with exp.": np.log(right),
        "That is the logarithm to base 10 of the size: undo it with 10 ** x.": np.log10(right),
        "Your parabola is in the size itself. A valley is symmetric in its logarithm: fit against log(size).": (
            -p1 / (2 * p2) * 1e8
        ),
        "The sign is wrong: the derivative c1 + 2 c2 x vanishes at x = -c1 / (2 c2).": np.exp(x.mean() + c1 / (2 * c2)),
        "A factor 2 is missing: the derivative of c2 x^2 is 2 c2 x.": np.exp(x.mean() - c1 / c2),
    }
    u2, u1, _ = np.polyfit(x, loss, 2)
    wrong["The sign is wrong: the derivative c1 + 2 c2 x vanishes at x = -c1 / (2 c2). "] = np.exp(u1 / (2 * u2))
    wrong["A factor 2 is missing: the derivative of c2 x^2 is 2 c2 x. "] = np.exp(-u1 / u2)
    with np.errstate(all="ignore"):
        for verdict, value in wrong.items():
            if _close(found, value, 1e-4):
                return verdict.strip()
    return f"For a valley whose vertex is at {right:.4g} you found {float(found):.4g}."


@exercise(lesson="32_scaling_laws", level=2, minutes=10)
def check_compute_optimal(attempt) -> str | None:
    A, B, alpha, beta, flops = 400.0, 2000.0, 0.3, 0.4, 1e21
    found = attempt(A, B, alpha, beta, flops)
    if not (isinstance(found, (tuple, list, np.ndarray)) and len(found) == 2):
        return "Return two numbers: parameters, then tokens."
    n, d = (float(v) for v in found)
    ratio = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    right = _split(A, B, alpha, beta, flops)[0]
    if _close((n, d), (right, flops / 6 / right)):
        return ignored_argument(
            {"A": A, "B": B, "alpha": alpha, "beta": beta, "flops": flops},
            {"A": 150.0, "B": 900.0, "alpha": 0.45, "beta": 0.25, "flops": 3e19},
            lambda given: _close([float(v) for v in attempt(*given.values())], _split(**given)),
        )
    if _close((d, n), (right, flops / 6 / right)):
        return "The two numbers are in the wrong order: parameters first, then tokens."
    if _close(n * d, flops):
        return "Your N times D is the whole budget: the constraint is 6 N D = C, so the two multiply to C / 6."
    wrong = {
        "The exponents are swapped: N grows as C^(beta / (alpha + beta)). The steeper the gain from data, the more "
        "goes into parameters, for the data term is soon small.": ratio * (flops / 6) ** (alpha / (alpha + beta)),
        "The ratio is upside down: at the optimum alpha A / N^alpha equals beta B / D^beta.": (
            right / ratio**2
        ),
        "The coefficient is missing: only for alpha A = beta B is it 1.": right / ratio,
        "You set the two terms equal to each other. What is equal at the optimum are their derivatives in log N and "
        "log D, alpha A / N^alpha and beta B / D^beta.": (
            (A / B) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
        ),
    }
    for verdict, value in wrong.items():
        if _close(n, value):
            return verdict
    if not _close(6 * n * d, flops):
        return f"Your split does not cost the budget: 6 N D is {6 * n * d:.3g}, the budget {flops:.3g}."
    return f"For A = {A:g}, B = {B:g}, alpha = {alpha}, beta = {beta}, C = {flops:.0e}, N is {right:.4g}, not {n:.4g}."


def _split(A: float, B: float, alpha: float, beta: float, flops: float) -> tuple[float, float]:
    n = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return n, flops / 6 / n


@exercise(lesson="32_scaling_laws", level=2, minutes=10)
def check_huber_objective(attempt) -> str | None:
    constants = (406.4, 410.7, 1.69, 0.34, 0.28)
    A, B, E, alpha, beta = constants
    tokens, delta = SIZES[::-1] * 40, 1e-2
    predicted = E + A / SIZES**alpha + B / tokens**beta
    loss = predicted * np.exp([0.004, -0.03, 0.001, 0.05, -0.006, 0.02])
    found = attempt(constants, SIZES.copy(), tokens.copy(), loss.copy(), delta)
    if np.ndim(found) != 0:
        return f"One number is expected, the sum over the runs; you returned an array of shape {np.shape(found)}."

    def huber(residual: np.ndarray, delta: float = delta) -> np.ndarray:
        size = np.abs(residual)
        return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))

    def agrees(given: dict) -> bool:
        A, B, E, alpha, beta, n, d, measured, delta = given.values()
        total = huber(np.log((E + A / n**alpha + B / d**beta) / measured), delta).sum()
        return _close(attempt((A, B, E, alpha, beta), n.copy(), d.copy(), measured.copy(), delta), total)

    residual = np.log(predicted / loss)
    size = np.abs(residual)
    right = huber(residual).sum()
    if _close(found, right):
        names = ("A", "B", "E", "alpha", "beta", "params", "tokens", "loss", "delta")
        other = (300.0, 500.0, 1.9, 0.3, 0.33, SIZES * 1.5, tokens * 2, loss[::-1] * 1.01, 3e-3)
        first = dict(zip(names, (*constants, SIZES, tokens, loss, delta)))
        return ignored_argument(first, dict(zip(names, other)), agrees)
    wrong = {
        "You took the mean. It is so small that an optimiser with ordinary tolerances stops at once: take the sum.": (
            huber(residual).mean()
        ),
        "Your residuals are differences of losses. Take differences of their logarithms: errors are relative.": (
            huber(predicted - loss).sum()
        ),
        "You squared every residual: beyond delta the loss must go on as a straight line.": (residual**2 / 2).sum(),
        "You squared every residual, and left out the half.": (residual**2).sum(),
        "The straight part does not meet the parabola: it is delta * (|r| - delta / 2).": (
            np.where(size <= delta, size**2 / 2, delta * size).sum()
        ),
        "The straight part has slope 1: it must continue the parabola with slope delta.": (
            np.where(size <= delta, size**2 / 2, size - delta / 2).sum()
        ),
        "The half in front of the square is missing.": (
            np.where(size <= delta, size**2, delta * (size - delta / 2)).sum()
        ),
        "You took absolute values everywhere: inside delta the loss is a parabola.": size.sum(),
        "Your logarithm is to base 10; the delta of the papers is for the natural one.": (
            huber(residual / np.log(10)).sum()
        ),
    }
    for verdict, value in wrong.items():
        if _close(found, value):
            return verdict
    return f"The sum should be {right:.6g}; yours is {float(found):.6g}."
