"""Checks for lesson 51: what a sampler keeps, in which order, what a choice was worth, and where a text stops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_edu.exercises import exercise


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-6)


def _nucleus(p: Tensor, keep: Tensor) -> Tensor:
    """What is left of the sorted probabilities where `keep` holds, in the old order and normalised."""
    ranked, order = p.sort(descending=True)
    out = torch.zeros_like(p)
    out[order] = ranked * keep
    return out / out.sum()


@exercise(lesson="51_sampling", level=1, minutes=10)
def check_top_p(attempt) -> str | None:
    p = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64)
    for bound in (0.7, 0.3, 1.0):
        ranked = p.sort(descending=True).values
        before = ranked.cumsum(0) - ranked
        right, got = _nucleus(p, before < bound - 1e-12), attempt(p.clone(), bound)
        if not isinstance(got, Tensor) or got.shape != p.shape:
            return f"A tensor of shape {tuple(p.shape)} is expected, zeros included."
        if _same(got, right):
            continue
        if _same(got / got.sum(), right):
            return "The right tokens are kept, but the probabilities do not sum to 1: divide by their sum."
        if bool(got.isnan().any()):
            return f"For p = {bound} nothing is left: the likeliest token is kept whatever p is."
        if _same(got, (ranked * (before < bound)) / (ranked * (before < bound)).sum()):
            return "The probabilities are sorted; return them in the order in which they came."
        if _same(got, _nucleus(p, before + ranked <= bound + 1e-12)):
            return (
                f"You drop the token at which the sum crosses p = {bound}: it belongs to the nucleus, which is to have "
                "at least probability p."
            )
        unsorted = torch.where(p.cumsum(0) - p < bound, p, 0)
        if _same(got, unsorted / unsorted.sum()):
            return "You add up in the order of the ids; the likeliest come first, so sort before you sum."
        over = torch.where(p >= bound * p.max(), p, 0)
        if _same(got, over / over.sum()):
            return "That is min-p, a bound for each token; top-p looks at the sum of the likelier ones."
        return f"For {p.tolist()} and p = {bound} the answer is {[round(x, 3) for x in right.tolist()]}."
    return None


@exercise(lesson="51_sampling", level=2, minutes=10)
def check_next_distribution(attempt) -> str | None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.2, -0.4], dtype=torch.float64)
    cut = lambda z, p: z.masked_fill(z < z.max() + math.log(p), -math.inf)
    for temperature, p in [(2.0, 0.3), (0.5, 0.1)]:
        right, got = cut(logits / temperature, p).softmax(0), attempt(logits.clone(), temperature, p)
        if not isinstance(got, Tensor) or got.shape != logits.shape:
            return f"A tensor of shape {tuple(logits.shape)} is expected, zeros included."
        if _same(got, right):
            continue
        wrong = {
            "The temperature comes after min-p here, so the bound was taken in another distribution than the one drawn "
            "from: divide first.": (cut(logits, p) / temperature).softmax(0),
            "You multiply by the temperature; a high one must make the tokens more alike, so divide.": (
                cut(logits * temperature, p).softmax(0)
            ),
            "The softmax comes before the cut, so the rest does not sum to 1: cut the logits, then normalise.": (
                torch.where(cut(logits / temperature, p).isfinite(), (logits / temperature).softmax(0), 0)
            ),
            "The temperature is missing.": cut(logits, p).softmax(0),
            "Nothing is cut off: min-p drops what is less than p times as likely as the likeliest.": (
                (logits / temperature).softmax(0)
            ),
        }
        for verdict, tensor in wrong.items():
            if _same(got, tensor):
                return verdict
        q = (logits / temperature).softmax(0)
        if _same(got, torch.where(q >= p, q, 0) / torch.where(q >= p, q, 0).sum()):
            return "Your bound is the probability p itself; min-p is p times the largest probability."
        return (
            f"For {logits.tolist()}, temperature {temperature} and min_p {p} the answer is "
            f"{[round(x, 3) for x in right.tolist()]}."
        )
    return None


@exercise(lesson="51_sampling", level=1, minutes=10)
def check_penalise(attempt) -> str | None:
    logits = torch.tensor([2.0, -2.0, 1.0, 3.0, -0.5])
    ids, theta = [0, 1, 1, 0, 0], 1.5
    given = logits.clone()
    got = attempt(given, list(ids), theta)
    held = torch.zeros(5, dtype=torch.bool)
    held[ids] = True
    right = torch.where(held, torch.where(logits > 0, logits / theta, logits * theta), logits)
    if not isinstance(got, Tensor) or got.shape != logits.shape:
        return "Return logits of the same shape as those given."
    if not torch.equal(given, logits):
        return "You changed the logits that were given; their log-probabilities are still wanted: work on a copy."
    if _same(got, right):
        return None
    if _same(got, torch.where(held, logits / theta, logits)):
        return "Dividing a negative logit raises it, so a repeated token becomes likelier: multiply those."
    if _same(got, torch.where(held, logits * theta, logits)):
        return "Multiplying a positive logit raises it: divide those, and multiply the negative ones."
    if _same(got, torch.where(logits > 0, logits / theta, logits * theta)):
        return "All tokens are penalised; only those in `ids` are to be."
    if _same(got, logits - theta * held):
        return "You subtract the penalty; this one divides or multiplies."
    often = logits.clone()
    for i in ids:
        often[i] = often[i] / theta if often[i] > 0 else often[i] * theta
    if _same(got, often):
        return "An id that stands in `ids` several times is penalised several times; once is enough: take the set."
    return f"For {logits.tolist()}, ids {ids} and {theta} the answer is {[round(x, 3) for x in right.tolist()]}."


@exercise(lesson="51_sampling", level=2, minutes=10)
def check_chosen_logprob(attempt) -> str | None:
    logits = 2 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, ids = 3, logits.topk(3).indices[[0, 1, 2, 3], [1, 2, 0, 1]]
    got, every = attempt(logits.clone(), k, ids.clone()), logits.log_softmax(-1)
    at = lambda z: z.gather(-1, ids[:, None])[:, 0]
    if not isinstance(got, Tensor) or got.shape != (4,):
        return "A tensor of shape (batch,) is expected: one number a row."
    if _same(got, at(every)):
        return None
    masked = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)
    wrong = {
        "The log-softmax comes after the masking, so the sum runs over the kept tokens only and every choice looks "
        "better than it was to the model.": at(masked.log_softmax(-1)),
        "These are the logits themselves: they become log-probabilities when the log of the sum is subtracted.": (
            at(logits)
        ),
        "These are probabilities; their logarithms are wanted.": at(every.exp()),
        "This is the likeliest token of each row, not the one that was drawn.": every.amax(-1),
        "The softmax runs over the batch; it belongs over the vocabulary.": at(logits.log_softmax(0)),
        "The sign is turned: a log-probability is never above 0.": -at(every),
    }
    return next((verdict for verdict, tensor in wrong.items() if _same(got, tensor)), None) or (
        f"For the first row the answer is {float(at(every)[0]):.4f}; you have {float(got[0]):.4f}."
    )


@exercise(lesson="51_sampling", level=2, minutes=10)
def check_row_numbers(attempt) -> str | None:
    together = list(map(float, attempt(7, [0, 1, 2, 3], 0)))
    if len(together) != 4 or not all(0 <= u < 1 for u in together):
        return "One number from 0 to below 1 is expected for each row."
    if list(map(float, attempt(7, [0, 1, 2, 3], 0))) != together:
        return "Asked again, the numbers differ: seed the generator with what is given, and nothing else."
    if len(set(together)) == 1:
        return "All rows get the same number, so equal prompts would get equal answers: the row belongs into the seed."
    fewer = list(map(float, attempt(7, [2, 3], 0)))
    if fewer != together[2:]:
        return (
            "A row's number depends on which others are in the list: rows that end would change the rest. Make a "
            "generator for each row."
        )
    if list(map(float, attempt(7, [0, 1, 2, 3], 1))) == together:
        return "Every step gives the same number, so a row would draw the same interval for ever: use `step`."
    if list(map(float, attempt(8, [0, 1, 2, 3], 0))) == together:
        return "The seed makes no difference."
    for seed, row, step in [(8, 2, 0), (7, 3, 0), (7, 2, 1), (6, 3, 0), (6, 2, 1), (8, 1, 0), (8, 2, 1)]:
        other = float(attempt(seed, [row], step)[0])
        if (seed, row, step) != (7, 2, 0) and other == together[2]:
            return (
                f"Row 2 at step 0 with seed 7 gets the number of row {row} at step {step} with seed {seed}: do not add "
                "them up, give the generator all of them as a list."
            )
    return None


@exercise(lesson="51_sampling", level=2, minutes=15)
def check_hold_back(attempt) -> str | None:
    cases = [
        ("the answer", ["STOP"]),
        ("the answer S", ["STOP"]),
        ("the answer STO", ["STOP"]),
        ("aab", ["aabaac"]),
        ("x\n", ["\n\nUser:", "\n###"]),
        ("x aa", ["aab", "ab"]),
        ("x ab", ["bxx", "abcd"]),
        ("x aba", ["abac", "ac"]),
        ("xab", ["abababc"]),
        ("plain", []),
    ]
    for text, stops in cases:
        fits = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        right, got = max(fits, default=0), attempt(text, list(stops))
        if got == right:
            continue
        where = f"For {text!r} and stop strings {stops}"
        if fits and got == min(fits):
            return f"{where} you hold back the shortest beginning; a longer one may be under way: take the longest."
        if got == max((len(s) - 1 for s in stops), default=0):
            return f"{where} you hold back as much as ever could be; only what fits has to wait, {right} here."
        if got == int(any(text.endswith(s[:1]) for s in stops)):
            return f"{where} you look at the last character only; {right} of them may be the beginning of a stop."
        if got == 0:
            return f"{where} {right} characters at the end may be the beginning of a stop; you show them."
        return f"{where} the answer is {right}; you say {got}."
    return None
