"""Checks for the exercises of lesson 31: targets, loss, schedule, AdamW, decay, chunks, utilisation."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from llama_edu.exercises import exercise, ignored_argument

__all__ = [
    "check_adamw",
    "check_batch_loss",
    "check_chunk_gradients",
    "check_inputs_and_targets",
    "check_split_decay",
    "check_utilisation",
    "check_warmup_cosine",
]


@exercise(lesson="31_training", level=1, minutes=5)
def check_inputs_and_targets(attempt) -> str | None:
    window = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    answer = attempt(window.clone())
    if not (isinstance(answer, tuple | list) and len(answer) == 2 and all(isinstance(t, Tensor) for t in answer)):
        return "Return two tensors: inputs, then targets."
    x, y = answer
    if torch.equal(x, window[:, 1:]) and torch.equal(y, window[:, :-1]):
        return "Inputs and targets are swapped: this asks for the token before, which the model has already read."
    if x.shape == y.shape and torch.equal(x, y):
        return "The targets are the inputs themselves. The model would learn to copy: shift them by one."
    if torch.equal(y, window.roll(-1, 1)):
        return "roll brings the first id round to the end: the last position would be asked for the first token."
    if torch.equal(x, window) or torch.equal(y, window):
        return "The whole window is no input: nothing is known of the token after its last id. Both have one id less."
    if torch.equal(x, window[:, :-2]) and torch.equal(y, window[:, 2:]):
        return "The targets are shifted by two: each position is asked for the token after the next."
    if torch.equal(x, window[:-1]) or torch.equal(y, window[1:]):
        return "You cut rows, not positions: slice the second axis."
    if x.shape != (2, 5) or y.shape != (2, 5):
        return (
            f"From a window of 6 ids come 5 inputs and 5 targets; yours have shapes {tuple(x.shape)}, {tuple(y.shape)}."
        )
    if not torch.equal(x, window[:, :-1]):
        return "The inputs must be all ids but the last, in their order."
    if not torch.equal(y, window[:, 1:]):
        return "The targets must be all ids but the first, in their order."
    return None


@exercise(lesson="31_training", level=1, minutes=5)
def check_batch_loss(attempt) -> str | None:
    means, counts = [2.0, 3.0, 7.0], [10, 20, 2]
    right, answer = 94 / 32, float(attempt(list(means), list(counts)))
    wrong = {
        "This is the mean of the means: two tokens of the last part weigh as much as twenty of the second.": 4.0,
        "The sums are not divided by the number of tokens of the whole batch.": 94.0,
        "You divided by the number of parts, not by the number of tokens.": 94 / 3,
        "You added the means: the loss would grow with the number of parts.": 12.0,
        "You divided the sum of the means by the number of tokens: a mean has to be multiplied by its count first.": 12
        / 32,
        "You weighted each mean by the inverse of its count: it is the longer part that weighs more.": (
            (2 / 10 + 3 / 20 + 7 / 2) / (1 / 10 + 1 / 20 + 1 / 2)
        ),
    }
    for diagnosis, value in wrong.items():
        if math.isclose(answer, value, rel_tol=1e-6):
            return diagnosis
    if not math.isclose(answer, right, rel_tol=1e-6):
        return f"For means {means} of {counts} tokens the loss is {right:.4f}; yours is {answer:.4f}."
    if not math.isclose(float(attempt([2.0, 100.0], [4, 0])), 2.0, rel_tol=1e-6):
        return "A part without targets must not count."
    return None


@exercise(lesson="31_training", level=2, minutes=10)
def check_warmup_cosine(attempt) -> str | None:
    peak, final, warmup, steps = 8.0, 2.0, 10, 110
    rates = {step: float(attempt(step, peak, final, warmup, steps)) for step in range(1, steps + 1)}
    close = lambda step, value: math.isclose(rates[step], value, rel_tol=1e-6, abs_tol=1e-9)
    if close(1, 0.0):
        return "Step 1 has rate 0: you count from 0. Steps are counted from 1, and the first one already moves."
    if close(1, peak):
        return "There is no warm-up: step 1 has the peak already."
    if close(1, peak * 2 / warmup):
        return "The warm-up is one step ahead: step 1 has the rate of step 2. Steps are counted from 1 here."
    if close(1, peak / (warmup + 1)):
        return f"The warm-up reaches the peak one step late, at step {warmup + 1}: divide by warmup."
    if not all(close(step, peak * step / warmup) for step in range(1, warmup)):
        return "The warm-up is no straight line from 0 (before step 1) to the peak at step `warmup`."
    if not close(warmup, peak):
        return f"Step {warmup} has rate {rates[warmup]:.4f}; the cosine begins there, at the peak {peak}."
    if close(steps, 0.0):
        return "The rate falls to 0, not to `final`: the cosine spans only what lies between peak and final."
    if close(steps, final + (peak - final) * (1 + math.cos(math.pi * (steps - 1 - warmup) / (steps - warmup))) / 2):
        return "The last step is one step short of `final`: in the share, count the steps from 1 as well."
    if close(steps, final + (peak - final) * (1 + math.cos(math.pi * (steps - warmup) / steps)) / 2):
        return "The cosine is stretched over all steps; it has only `steps - warmup` to come down in."
    if any(b > a + 1e-9 for a, b in pairwise(rates[step] for step in range(warmup, steps + 1))):
        return "The rate rises again after the warm-up: half a cosine (up to pi) falls all the way, a whole one not."
    if not close(steps, final):
        return f"The last step has rate {rates[steps]:.4f}; it must have `final`, {final}."
    if close((warmup + steps) // 2, final + (peak - final) * math.cos(math.pi / 4)):
        return "That is a quarter of a cosine: it falls steeply at the end. Use (1 + cos(pi * share)) / 2."
    if close(35, peak + (final - peak) * 0.25):
        return "The rate falls in a straight line; a cosine is flat at both ends."
    for step in range(warmup, steps + 1):
        value = _rate(step, peak, final, warmup, steps)
        if not close(step, value):
            given = f"peak {peak}, final {final}, warmup {warmup}, steps {steps}"
            return f"With {given}, step {step} has rate {value:.4f}; yours is {rates[step]:.4f}."
    curve = lambda rate, given: torch.tensor([float(rate(s, **given)) for s in range(1, given["steps"] + 1)])
    return ignored_argument(
        {"peak": peak, "final": final, "warmup": warmup, "steps": steps},
        {"peak": 5.0, "final": 1.0, "warmup": 20, "steps": 60},
        lambda given: torch.allclose(curve(lambda s, **g: attempt(s, *g.values()), given), curve(_rate, given)),
    )


def _rate(step: int, peak: float, final: float, warmup: int, steps: int) -> float:
    if step < warmup:
        return peak * step / warmup
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@exercise(lesson="31_training", level=3, minutes=15)
def check_adamw(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    lr, beta1, beta2, eps, decay, step = 0.1, 0.9, 0.8, 0.05, 0.5, 3
    first = {"step": step, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "decay": decay}
    second = {"step": 7, "lr": 0.02, "beta1": 0.6, "beta2": 0.95, "eps": 0.3, "decay": 0.2}

    def adamw(w, g, m, v, *, coupled=False, decays=True, correct=True, inside=False, t=step, square=True, root=True):
        if coupled and decays:
            g = g + decay * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * (g * g if square else g.abs())
        m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if correct else (m, v)
        size = (v_hat + eps).sqrt() if inside else (v_hat.sqrt() if root else v_hat) + eps
        return w * (1 - lr * decay * (decays and not coupled)) - lr * m_hat / size, m, v

    for shape in ((3, 4), (5,)):
        w, g, m, v = draw(*shape), draw(*shape), draw(*shape), draw(*shape).square()
        answer = attempt(w.clone(), g.clone(), m.clone(), v.clone(), step, lr, beta1, beta2, eps, decay)
        if not (isinstance(answer, tuple | list) and len(answer) == 3 and all(isinstance(t, Tensor) for t in answer)):
            return "Return three tensors: the new weight, m and v."
        matrix = len(shape) == 2
        right = adamw(w, g, m, v, decays=matrix)
        if all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(answer, right)):
            continue
        kind = "a matrix" if matrix else "a vector"
        wrong = {
            "You return the corrected moments. Keep the running means as they are, and correct only for the step.": (
                right[0], right[1] / (1 - beta1**step), right[2] / (1 - beta2**step)
            ),
            f"For {kind}: decay is on the wrong tensors. Matrices shrink, vectors (the weights of norms) do not.": (
                adamw(w, g, m, v, decays=not matrix)
            ),
            "The decay went into the gradient (L2): decoupled decay stays outside of the moments and the division.": (
                adamw(w, g, m, v, coupled=True)
            ),
            "The bias correction is missing: divide m by 1 - beta1 ** step, v by 1 - beta2 ** step.": (
                adamw(w, g, m, v, decays=matrix, correct=False)
            ),
            "The bias correction is one step behind: step counts from 1.": (
                adamw(w, g, m, v, decays=matrix, t=step - 1)
            ),
            "The bias correction is one step ahead: step counts from 1.": (
                adamw(w, g, m, v, decays=matrix, t=step + 1)
            ),
            "Epsilon is inside the root: it is added to the root.": adamw(w, g, m, v, decays=matrix, inside=True),
            "You divided by v, not by its root.": adamw(w, g, m, v, decays=matrix, root=False),
            "v is the running mean of the squared gradient; yours averages its size.": (
                adamw(w, g, m, v, decays=matrix, square=False)
            ),
            "The decay lacks the learning rate: the weight shrinks by lr * decay a step.": (
                right[0] - (1 - lr) * decay * w * matrix, right[1], right[2]
            ),
            "You went uphill: the step is subtracted.": (
                2 * w * (1 - lr * decay * matrix) - right[0], right[1], right[2]
            ),
        }  # fmt: skip
        for diagnosis, value in wrong.items():
            if all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(answer, value)):
                return diagnosis
        name = next(n for n, a, b in zip("wmv", answer, right) if a.shape != b.shape or not torch.allclose(a, b))
        return f"For {kind}, the new {name} is not what the formulas give; compare with `adamw_step` of the lesson."
    tensors = draw(3, 4), draw(3, 4), draw(3, 4), draw(3, 4).square()

    def agrees(given: dict) -> bool:
        answer = attempt(*(t.clone() for t in tensors), *given.values())
        return all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(answer, _adamw(*tensors, **given)))

    return ignored_argument(first, second, agrees)


def _adamw(w, g, m, v, step, lr, beta1, beta2, eps, decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    size = (v / (1 - beta2**step)).sqrt() + eps
    return w * (1 - lr * decay) - lr * m / (1 - beta1**step) / size, m, v


@exercise(lesson="31_training", level=1, minutes=5)
def check_split_decay(attempt) -> str | None:
    shapes = {
        "tok_embeddings.weight": (100, 8),
        "layers.0.attention.wq.weight": (8, 8),
        "layers.0.feed_forward.w2.weight": (8, 24),
        "layers.0.attention_norm.weight": (8,),
        "layers.0.ffn_norm.weight": (8,),
        "norm.weight": (8,),
    }
    right = [name for name, shape in shapes.items() if len(shape) == 2]
    answer = attempt(dict(shapes))
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        return "Return two lists of names: those that decay, then those that do not."
    decays, others = map(list, answer)
    if sorted(decays + others) != sorted(shapes):
        return "Every name belongs into exactly one of the two lists."
    norms = sorted(set(shapes) - set(right))
    if sorted(decays) == norms:
        return "The lists are swapped: you let the norms decay and nothing else."
    if sorted(decays) == sorted(shapes):
        return "You let everything decay. The weights of norms are scales around 1: a pull towards 0 breaks them."
    if sorted(decays) == sorted(set(right) - {"tok_embeddings.weight"}):
        return "You left the embeddings out: some recipes do, ours lets them decay with the matrices."
    if set(right) < set(decays):
        wrong = sorted(set(decays) & set(norms))
        return f"{wrong[0]} is a vector and must not decay: not every norm has the same name, so look at the shape."
    if sorted(decays) != sorted(right):
        missing = sorted(set(right) - set(decays))
        return f"{missing[0]} is a matrix and must decay."
    if list(attempt({"a_norm_of_matrices": (2, 2)})[0]) != ["a_norm_of_matrices"]:
        return "You went by names. A matrix decays whatever it is called: count the axes."
    return None


@exercise(lesson="31_training", level=2, minutes=10)
def check_chunk_gradients(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    targets = torch.tensor([3, 0, 6, 3, 1])
    answer = attempt(hidden.clone(), weight.clone(), targets.clone())
    if not (isinstance(answer, tuple | list) and len(answer) == 2 and all(isinstance(t, Tensor) for t in answer)):
        return "Return two tensors: the gradient of hidden, then that of weight."
    p, hot = (hidden @ weight.T).softmax(1), torch.nn.functional.one_hot(targets, 7)
    both = lambda g: (g @ weight, g.T @ hidden)
    right = both(p - hot)
    close = lambda xs, ys: all(x.shape == y.shape and torch.allclose(x, y.to(x.dtype)) for x, y in zip(xs, ys))
    if close(answer, right):
        return None
    wrong = {
        "That is the gradient of the mean; the chunks can be added only when each is a sum.": both((p - hot) / 5),
        "The sign is turned round: the gradient of a score is softmax minus one at the target.": both(hot - p),
        "You forgot to take 1 away at the target: this pushes every score down.": both(p),
        "You took the scores for probabilities: there is no softmax.": both(hidden @ weight.T - hot),
        "The softmax ran over the rows: each row sums to 1 over the vocabulary.": (
            both((hidden @ weight.T).softmax(0) - hot)
        ),
        "The two gradients are swapped.": right[::-1],
    }
    for diagnosis, value in wrong.items():
        if close(answer, value):
            return diagnosis
    if close(answer[:1], right[:1]):
        return (
            "The gradient of hidden is right; that of weight is g.T @ hidden, one row for each token of the vocabulary."
        )
    if close(answer[1:], right[1:]):
        return "The gradient of weight is right; that of hidden is g @ weight."
    return "With g = softmax(scores), minus 1 at the target: hidden gets g @ weight, weight gets g.T @ hidden."


@exercise(lesson="31_training", level=1, minutes=5)
def check_utilisation(attempt) -> str | None:
    parameters, speed, peak = 65e9, 380.0, 312e12
    answer, unit = float(attempt(parameters, speed, peak)), parameters * speed / peak
    wrong = {
        "You counted the forward pass alone: the backward pass is twice as much again, 6 FLOPs in all.": 2,
        "You counted one FLOP a parameter: a multiplication and an addition are two.": 3,
        "You counted the recomputed forward pass. The hardware does it, but it is no work of the model: 6, not 8.": 8,
        "You counted the backward pass alone.": 4,
        "You forgot that a parameter takes part in more than one operation a token.": 1,
    }
    for diagnosis, factor in wrong.items():
        if math.isclose(answer, factor * unit, rel_tol=1e-6):
            return diagnosis
    if math.isclose(answer, 1 / (6 * unit), rel_tol=1e-6):
        return "Upside down: what is used stands above what is there."
    if math.isclose(answer, 600 * unit, rel_tol=1e-6):
        return "That is in percent: give the share, between 0 and 1."
    if not math.isclose(answer, 6 * unit, rel_tol=1e-6):
        return (
            f"For 65e9 parameters, 380 tokens a second and 312e12 FLOP/s it is {6 * unit:.3f}; yours is {answer:.3f}."
        )
    return None
