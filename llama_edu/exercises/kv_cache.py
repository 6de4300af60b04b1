"""Checks for the exercises of lesson 50: mask, one step of attention, greedy decoding, blocks, int8, scheduling."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_edu.config import LlamaConfig
from llama_edu.exercises import exercise
from llama_edu.model import Transformer
from llama_edu.model.rope import apply_rope

__all__ = [
    "check_attend_one",
    "check_cached_mask",
    "check_from_blocks",
    "check_greedy",
    "check_passes",
    "check_to_int8",
    "rotate",
]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the adjacent pairs of `x`, (heads, head_dim), by one position's angles; `cos`, `sin` are (head_dim / 2,)."""
    return apply_rope(x[None, :, None], cos[None, None], sin[None, None])[0, :, 0]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@exercise(lesson="50_kv_cache", level=1, minutes=5)
def check_cached_mask(attempt) -> str | None:
    for cached, seq in [(2, 3), (0, 4), (5, 1)]:
        mask = attempt(cached, seq)
        keys, queries = torch.arange(cached + seq), torch.arange(cached, cached + seq)[:, None]
        right = keys <= queries
        if not isinstance(mask, Tensor):
            return f"A tensor is expected; you returned {type(mask).__name__}."
        if mask.shape == (seq, seq) and cached:
            return "Your mask has a column for each new token only: the cached keys are missing in front of them."
        if mask.shape != right.shape:
            return (
                f"For {cached} cached and {seq} new tokens the shape must be {tuple(right.shape)}; yours is "
                f"{tuple(mask.shape)}."
            )
        if mask.dtype != torch.bool:
            return f"A boolean mask is expected, True where a token may look; yours has dtype {mask.dtype}."
        if torch.equal(mask, right):
            continue
        wrong = {
            "It is the wrong way round: True means that a token may look there.": ~right,
            "A token does not see itself in your mask: its own key is already stored, so compare with <=.": (
                keys < queries
            ),
            "A token sees the one after it in your mask: positions count from 0, the first new token is at `cached`.": (
                keys <= queries + 1
            ),
            "Your new tokens begin at position 0 and forget the cached keys: they stand behind, from `cached` on.": (
                keys <= queries - cached
            ),
            "The new tokens do not see each other in your mask, only the cached ones.": (
                (keys < cached).expand_as(right)
            ),
            "The new tokens see all of each other in your mask: the second must stay hidden from the first.": (
                torch.ones_like(right)
            ),
        }
        for verdict, values in wrong.items():
            if torch.equal(mask, values):
                return verdict
        return f"For {cached} cached and {seq} new tokens your mask differs from `key <= position of the query`."
    return None


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(heads, head_dim) from rotated q (heads, head_dim) and k, v (heads, keys, head_dim)."""
    scores = torch.einsum("hd,hnd->hn", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hn,hnd->hd", scores.softmax(-1), v)


@exercise(lesson="50_kv_cache", level=2, minutes=20)
def check_attend_one(attempt) -> str | None:
    heads, room, head_dim, length = 2, 9, 8, 5
    generator = torch.Generator().manual_seed(0)
    angles = torch.outer(torch.arange(room), torch.tensor([1.0, 0.7, 0.4, 0.2]))
    cos, sin = angles.cos(), angles.sin()
    q, k, v = (1.5 * torch.randn(heads, head_dim, generator=generator) for _ in range(3))
    k_old, v_old = (torch.randn(heads, room, head_dim, generator=generator) for _ in range(2))
    k_old[:, length:], v_old[:, length:] = 3.0, -4.0  # leftovers behind the end, which must not be seen
    k_cache, v_cache = k_old.clone(), v_old.clone()
    out = attempt(q.clone(), k.clone(), v.clone(), k_cache, v_cache, length, cos, sin)
    turned = rotate(k, cos[length], sin[length])
    changed = ((k_cache != k_old).any(-1) | (v_cache != v_old).any(-1)).any(0).nonzero()[:, 0].tolist()
    if not changed:
        return "The cache is as it was: store the rotated key and the value in `k_cache` and `v_cache`, in place."
    if changed == [length - 1]:
        return (
            f"You overwrote the entry at index {length - 1}, the last cached token: with {length} tokens the next "
            f"index is {length}."
        )
    if changed != [length]:
        return (
            f"You wrote at index {', '.join(map(str, changed))}: with `length` = {length} tokens the next one belongs "
            f"at {length}."
        )
    stored = k_cache[:, length]
    if _close(stored, k):
        return "You cached the key before its rotation: store what the scores use, since its position never changes."
    for wrong, name in [(length - 1, "length - 1"), (length + 1, "length + 1"), (0, "0")]:
        if _close(stored, rotate(k, cos[wrong], sin[wrong])):
            return f"You rotated the key by position {name}: after `length` tokens the new one stands at `length`."
    if _close(stored, v) or not _close(v_cache[:, length], v):
        return "The value is stored as it is, in `v_cache`; what stands there is something else."
    if not _close(stored, turned):
        return "The stored key differs from rotate(k, cos[length], sin[length])."
    if not isinstance(out, Tensor) or out.shape != q.shape:
        return f"Return the mixed values, a tensor of shape {tuple(q.shape)}."
    keys, values, query = k_cache[:, : length + 1], v_cache[:, : length + 1], rotate(q, cos[length], sin[length])
    if _close(out, _attend(query, keys, values)):
        return None
    wrong = {
        "The query is not rotated in your scores: only differences of rotations count, so both must be turned.": (
            _attend(q, keys, values)
        ),
        "The new token does not see itself: the keys go up to index `length`, so the slice ends at `length + 1`.": (
            _attend(query, keys[:, :-1], values[:, :-1])
        ),
        "Your scores reach behind the end: what lies at `length + 1` and later is left over and must stay hidden.": (
            _attend(query, k_cache, v_cache)
        ),
        "The scores are not divided by sqrt(head_dim).": _attend(query * head_dim**0.5, keys, values),
        "Your token sees only itself: the cached keys are forgotten.": v,
    }
    for verdict, tensor in wrong.items():
        if _close(out, tensor):
            return verdict
    return "The cache is right, but the output differs from softmax(q k / sqrt(head_dim)) v over keys 0 to `length`."


@exercise(lesson="50_kv_cache", level=2, minutes=15)
def check_greedy(attempt) -> str | None:
    cfg = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=64)
    model = Transformer(cfg)
    model.init_weights(torch.Generator().manual_seed(3))
    prompt, n = [5, 9, 2, 40, 11], 8
    read: list[list[int]] = []
    model.tok_embeddings.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0][0].tolist()))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
        right = list(prompt)
        for _ in range(n):
            right.append(int(model(torch.tensor([right]))[0, -1].argmax()))
        new = right[len(prompt) :]
        read.clear()
        answer = attempt(model, list(prompt), n)
    seen = list(read)
    if isinstance(answer, Tensor):
        return "Return a list of whole numbers, not a tensor: `int(...)` of each arg-max."
    if answer == right:
        return "You returned the prompt too: only the new ids are wanted."
    if not seen:
        return "The model was never asked."
    if len(seen) > 1 and len(seen[1]) > len(seen[0]):
        return "The model reads the whole text again in each step: with a cache it needs the new token only."
    if seen[0] == prompt[:1]:
        return "You feed the prompt token by token: one pass, the prefill, reads it all at once."
    if seen[0] == prompt and len(seen) > 1 and seen[1] == prompt[-1:] and prompt[-1] != new[0]:
        return (
            "The prompt's last token is read twice: after the prefill the cache holds it already. Take the first new "
            "id from the prefill's own logits."
        )
    if seen[0] == prompt[:-1]:
        return None if answer == new else "The last token of the prompt is missing from what the model has read."
    if len(answer) != n:
        return f"{n} new ids are wanted; you returned {len(answer)}."
    if answer != new:
        if len(seen) > 1 and len(seen[1]) == 1 and answer[0] == new[0]:
            return (
                "The first new id is right, the later ones are not: pass the same cache to every call, so that the new "
                "token sees those before it."
            )
        return f"The ids should be {new}; yours are {answer}. Take the arg-max of the last position's logits."
    if sum(map(len, seen)) > len(prompt) + n:
        return f"The ids are right, but the model read {sum(map(len, seen))} tokens; {len(prompt) + n - 1} suffice."
    return None


@exercise(lesson="50_kv_cache", level=1, minutes=10)
def check_from_blocks(attempt) -> str | None:
    heads, size, head_dim = 2, 4, 3
    store = torch.randn(8, size, heads, head_dim, generator=torch.Generator().manual_seed(0))
    for table, length in [([5, 0, 7], 10), ([3], 4), ([6, 1], 5)]:
        picked = store[table].flatten(0, 1)
        right = picked[:length].transpose(0, 1)
        keys = attempt(store.clone(), list(table), length)
        if not isinstance(keys, Tensor):
            return f"A tensor is expected; you returned {type(keys).__name__}."
        if keys.shape == (length, heads, head_dim):
            return "The keys are there, but the axes are (length, heads, head_dim): attention wants the heads in front."
        if keys.shape == (heads, len(table) * size, head_dim) and length < len(table) * size:
            return (
                f"You return whole blocks: the last one is only partly filled, so cut off what stands behind token "
                f"{length}."
            )
        if keys.shape != right.shape:
            return f"The shape must be {tuple(right.shape)}; yours is {tuple(keys.shape)}."
        if torch.equal(keys, right):
            continue
        wrong = {
            "You took the first blocks of the store; the table says which blocks are this sequence's.": (
                store[: len(table)].flatten(0, 1)[:length].transpose(0, 1)
            ),
            "The blocks come in the order of their numbers; the order of the table is the order of the text.": (
                store[sorted(table)].flatten(0, 1)[:length].transpose(0, 1)
            ),
            "Heads and tokens are mixed up: exchange the two axes with transpose, do not reshape one into the other.": (
                picked[:length].reshape(heads, length, head_dim)
            ),
        }
        for verdict, tensor in wrong.items():
            if torch.equal(keys, tensor):
                return verdict
        return f"For table {table} and {length} tokens: token p is place p % {size} of block table[p // {size}]."
    return None


@exercise(lesson="50_kv_cache", level=2, minutes=15)
def check_to_int8(attempt) -> str | None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1e-3, 1.0, 50.0])[:, None, None] * torch.linspace(0.5, 3.0, 5)[:, None]
    answer = attempt(x.clone())
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return "Return two tensors: the whole numbers, then the scales."
    q, scale = answer
    if q.dtype != torch.int8:
        return f"The whole numbers are to be torch.int8; yours are {q.dtype}."
    if scale.numel() == 1:
        return "You have one scale for everything: small vectors vanish. Each head and token needs its own."
    if scale.shape == (3, 1, 1):
        return "You have one scale a head: a token that comes later may be larger. Each token needs its own too."
    if scale.shape != (3, 5, 1):
        return f"The scales must have the shape (3, 5, 1); yours have {tuple(scale.shape)}: is keepdim=True there?"
    step = x.abs().amax(-1, keepdim=True) / 127
    if torch.allclose(scale, 127 * step):
        return "Your scale is the largest magnitude itself; divided by 127 it is the length of a step."
    if torch.allclose(scale * q, x.clamp(max=0), atol=float(step.max())) or torch.allclose(
        scale, x.amax(-1, keepdim=True) / 127
    ):
        return "Your scale comes from the largest number; a negative one may be larger in magnitude: take abs() first."
    off = ((q * scale - x).abs() / step).amax()
    if torch.equal(q, (x / step).to(torch.int8)):
        return "`.to(torch.int8)` cuts the decimals off, so you are up to a whole step away: round before it."
    if torch.allclose(scale, 127 * step / 128):
        return "128 steps reach beyond the largest int8, which is 127: the largest number turns negative."
    if off > 0.51:
        return f"q * scale is up to {float(off):.1f} steps away from x; rounding needs no more than half a step."
    q, scale = attempt(torch.zeros(1, 2, 4))
    if not torch.equal(q * scale, torch.zeros(1, 2, 4)):
        return "A vector of zeros does not come back as zeros: 0 / 0 is a NaN, so divide by something else there."
    return None


@exercise(lesson="50_kv_cache", level=2, minutes=15)
def check_passes(attempt) -> str | None:
    for lengths, rows in [([1, 9, 4, 8, 8, 9, 4], 3), ([5, 1, 1, 1], 2), ([4], 3), ([2, 2, 9, 1], 2)]:
        free = [0] * rows
        for n in lengths:
            free[free.index(min(free))] += n
        right, got = max(free), attempt(list(lengths), rows)
        if got == right:
            continue
        turns = [sum(lengths[i::rows]) for i in range(rows)]
        greedy = [0] * rows
        for n in sorted(lengths, reverse=True):
            greedy[greedy.index(min(greedy))] += n
        wrong = {
            sum(max(lengths[i : i + rows]) for i in range(0, len(lengths), rows)): (
                "That is the static batch: it waits for the longest of each group before the next may start."
            ),
            max(turns): "You deal the requests out to the rows in turn; a request takes the row that is free first.",
            -(-sum(lengths) // rows): (
                "That is all tokens divided by the rows: no schedule does better, but at the end some rows have "
                "nothing left to do."
            ),
            min(free): "That is when the first row is free for good; the last request ends later.",
            max(greedy): "You start the longest first; requests start in the order in which they came.",
            sum(lengths): "That is one after another: as many as `rows` run at a time.",
        }
        if got in wrong:
            return wrong[got]
        return f"For lengths {lengths} on {rows} rows it takes {right} passes; you say {got}."
    return None
