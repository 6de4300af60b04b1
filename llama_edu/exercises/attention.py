"""Checks for the exercises of lesson 22: attention."""

from __future__ import annotations

import torch

from llama_edu.exercises import exercise

_LESSON = "22_attention"


def _same(a, b, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, atol=tolerance, rtol=tolerance, equal_nan=True)


def _heads(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


def _attend(q, k, v, *, scale=None, diagonal=0, fill=-torch.inf, axis=-1):
    """Attention with one thing done differently."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(diagonal)
    return scores.masked_fill(~visible, fill).softmax(axis) @ v


@exercise(lesson=_LESSON, level=1, minutes=10)
def check_attend(attempt):
    q, k, v = _heads(2, 3, 6, 16)
    out = attempt(q.clone(), k.clone(), v.clone())
    if out.shape != v.shape:
        return f"The output has shape {tuple(out.shape)}; it is that of v, {tuple(v.shape)}."
    if _same(out, _attend(q, k, v)):
        q, k = 1024 * q.round(), 1024 * k.round()  # scores of a million, and exact in float32
        big, right = attempt(q.clone(), k.clone(), v.clone()), _attend(q, k, v)
        if _same(big, right):
            return None
        weights = (q @ k.mT / 4).softmax(-1).tril()
        if _same(big.nan_to_num(0), (weights / weights.sum(-1, keepdim=True) @ v).nan_to_num(0)):
            return (
                "You masked after the softmax and normalised again: where a hidden key has by far the largest score, "
                "the visible weights round to 0, and 0 / 0 is nan. Mask the scores before the softmax."
            )
        if not big.isfinite().all():
            return "Scores of a million give inf or nan: use torch.softmax, not exp and sum."
        return (
            "Right for small scores only: beside scores of minus a million your masked ones are large. Set them to "
            "-torch.inf."
        )
    if _same(out, _attend(q, k, v, scale=1.0)):
        return "The scores are not scaled: divide them by the root of head_dim before the softmax."
    if _same(out, _attend(q, k, v, scale=q.shape[-1] ** 0.5)):
        return "You multiplied by the root of head_dim; divide by it."
    if _same(out, _attend(k, q, v)):
        return "Queries and keys are exchanged: row i of the scores belongs to query i, q @ k.mT."
    if out.isnan().all():
        return (
            "Everything is nan. Did you multiply the mask by infinity? 0 * inf is nan: use masked_fill or torch.where."
        )
    if _same(out, _attend(q, k, v, scale=1 / q.shape[-1])):
        return "You divided by head_dim; the scores have variance head_dim, so divide by its root."
    if _same(out, _attend(q, k, v, diagonal=5)):
        return "Nothing is masked: each token sees the future."
    if _same(out, _attend(q, k, v, diagonal=-1)):
        return "The mask is off by one: a token must see itself, and the first token, which sees nothing, became nan."
    if _same(out, _attend(q, k, v, diagonal=1)):
        return "The mask is off by one: each token sees the next one, the very token it should predict."
    if _same(out, _attend(q, k, v, fill=0.0)):
        return "Masked scores are 0, and e^0 is 1: they still get weight. Set them to minus infinity."
    if _same(out, _attend(q, k, v, axis=-2)):
        return (
            "The softmax runs over the queries: the weights of one query must add up to 1 over the keys, the last axis."
        )
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if _same(out, scores.softmax(-1).tril() @ v):
        return "You masked after the softmax: the rows no longer add up to 1. Mask the scores before it."
    if _same(out, scores.masked_fill(torch.ones(6, 6).tril() == 1, -torch.inf).softmax(-1) @ v):
        return "The mask is upside down: you hide the past and show the future."
    return (
        "The numbers differ from softmax(q k^T / sqrt(head_dim)) v with the causal mask; check each step on one head."
    )


@exercise(lesson=_LESSON, level=1, minutes=5)
def check_share_heads(attempt):
    k = _heads(2, 2, 3, 4)[0]
    out = attempt(k.clone(), 6)
    if out.shape != (2, 6, 3, 4):
        return f"The result has shape {tuple(out.shape)}; 2 heads for 6 query heads make (2, 6, 3, 4)."
    if torch.equal(out, k.repeat_interleave(3, dim=1)):
        if all(torch.equal(attempt(k[:, :n].clone(), 4), k[:, :n].repeat_interleave(4 // n, dim=1)) for n in (1, 2)):
            return None
        return "Right for 2 heads and 6 query heads only: use k.shape[1] and n_heads."
    if torch.equal(out, k.repeat(1, 3, 1, 1)):
        return "The order is 0 1 0 1 0 1 (repeat); consecutive query heads share, 0 0 0 1 1 1 (repeat_interleave)."
    if any(torch.equal(out, k.repeat_interleave(3, dim=d).reshape(2, 6, 3, 4)) for d in (2, 3)):
        return "You repeated along another axis and reshaped: the heads are axis 1."
    return "The shape is right, the heads are not the ones given: head i must be k[:, i // 3]."


@exercise(lesson=_LESSON, level=2, minutes=10)
def check_softmax_backward(attempt):
    scores, grad, _ = _heads(4, 5)
    p = scores.softmax(-1)
    out, right = attempt(p.clone(), grad.clone()), p * (grad - (grad * p).sum(-1, keepdim=True))
    if out.shape != p.shape:
        return f"The gradient has shape {tuple(out.shape)}; it is that of the scores, {tuple(p.shape)}."
    if _same(out, right):
        return None
    if _same(out, p * grad):
        return "The sum is missing: raising one score lowers all the other weights of its row."
    if _same(out, p * (1 - p) * grad):
        return "That is the diagonal of the derivative, p_i (1 - p_i): the row's other weights depend on the score too."
    if _same(out, p * (grad - grad.sum(-1, keepdim=True))):
        return "The sum is over grad_p; it must be over grad_p * p, the mean of the gradient under the weights."
    if _same(out, p * (grad - grad.mean(-1, keepdim=True))):
        return "You took off the plain mean; it must be the mean weighted with p."
    if _same(out, p * (grad - (grad * p).sum(0, keepdim=True))):
        return "The sum runs over the wrong axis: each row is a softmax of its own, so sum over the last one."
    if _same(out, p * (grad - (grad * p).sum())):
        return "You took one sum over everything; each row is a softmax of its own: sum(-1, keepdim=True)."
    if _same(out, -right):
        return "The sign is turned round."
    return "Each row must add up to 0 and equal p * (grad_p - something that is one number a row)."


@exercise(lesson=_LESSON, level=2, minutes=15)
def check_merge(attempt):
    q, k, v = _heads(7, 8, seed=1)

    def half(scores, v):
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    scores = 2 * q @ k.mT
    a, b = half(scores[:, :3], v[:3]), half(scores[:, 3:], v[3:])
    out, right = attempt(*(t.clone() for t in (*a, *b))), scores.softmax(-1) @ v
    if out.shape != right.shape:
        return f"The output has shape {tuple(out.shape)}; it is that of each half, {tuple(right.shape)}."
    if _same(out, (a[0] + b[0]) / 2):
        return "You averaged the two outputs: the half whose keys match better must count for more."
    if _same(out, a[0] + b[0]):
        return "You added two outputs that are each normalised already: multiply back by the denominators first."
    weights = torch.stack([a[1], b[1]]) / (a[1] + b[1])
    if _same(out, weights[0, :, None] * a[0] + weights[1, :, None] * b[0]):
        return "You weighted with the logarithms; the denominators are exp of them."
    flipped = torch.softmax(-torch.stack([a[1], b[1]]), 0)
    if _same(out, flipped[0, :, None] * a[0] + flipped[1, :, None] * b[0]):
        return "The halves are exchanged: the larger denominator must get the larger share."
    ea, eb = a[1].exp()[:, None], b[1].exp()[:, None]
    if _same(out, ea * a[0] + eb * b[0]):
        return "You added the numerators; now divide by the sum of the two denominators."
    if not _same(out, right):
        return "The output differs from attention over all keys: add numerators, add denominators, divide."
    big = attempt(a[0].clone(), a[1] + 5000, b[0].clone(), b[1] + 5000)
    if not _same(big, right, 1e-2):
        return "Right for small scores, but exp of 5,000 overflows: subtract the larger logarithm before exp."
    for (out, lse), rows in ((a, [0, 1]), (b, [1, 2])):
        out[rows], lse[rows] = 0, -torch.inf
    right[:3] = torch.stack([b[0][0], torch.zeros(8), a[0][2]])
    out = attempt(*(t.clone() for t in (*a, *b)))
    if out.isnan().any():
        return "A query that saw nothing in either half gives nan: -inf - (-inf) and 0 / 0 are no numbers. Return 0."
    if not _same(out, right):
        return "Wrong where a query saw nothing: an empty half has a share of 0, and two of them give 0."
    return None
