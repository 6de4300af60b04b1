"""The choice of the next token: parts of the vocabulary kept, and one id drawn for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def keep_top_k(logits: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, "batch vocab"]:
    """Set all but the `k` largest logits to -inf. Ties with the k-th stay."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """Keep the likeliest tokens until their probabilities sum to `p` or more; the others become -inf.

    Source: Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    if p >= 1:
        return logits  # rounding must not cost the last tokens their places
    ranked, order = logits.sort(descending=True, stable=True)
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what the likelier ones sum to
    drop = before >= p
    drop[:, 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def keep_min_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """Keep the tokens at least `p` times as likely as the likeliest; the others become -inf.

    Source: Nguyen et al., arXiv 2407.01082, section 3.
    """
    best = logits.amax(-1, keepdim=True)
    return logits.masked_fill(logits < best + math.log(p), -torch.inf) if p > 0 else logits


def draw(logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Draw an id for each row with the probabilities softmax(logits).

    Args:
        uniform: one number in [0, 1) a row. It picks the id whose interval it falls into when the probabilities are
            laid end to end, so a row's draw depends on that row alone.
    """
    ends = logits.double().softmax(-1).cumsum(-1)
    target = uniform.to(ends)[:, None] * ends[:, -1:]
    return torch.searchsorted(ends, target, right=True)[:, 0]


@runtime_checkable
class Choose(Protocol):
    """What decoding asks of the choice of the next id. `Sampler` is one; `generate` takes any."""

    def __call__(
        self, logits: Float[Tensor, "batch vocab"], rows: Sequence[int], step: int, ids: Sequence[Sequence[int]]
    ) -> Int[Tensor, " batch"]:
        """The next id of each row.

        Args:
            logits: of the rows that are still going.
            rows: the number of the prompt that each row of `logits` belongs to.
            step: how many ids these rows have got so far.
            ids: for each row of `logits`, its prompt and the ids it has got so far.
        """
        ...


class Sampler:
    """The likeliest id, or one drawn from a part of the vocabulary: the options of `generate` as one callable.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it and an id is drawn.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the likeliest tokens that together have this probability.
        min_p: draw from the tokens at least this many times as likely as the likeliest. The three apply in this order.
        seed: row r draws from a random stream made of (seed, r); None takes a seed from torch's global generator.

    Raises:
        ValueError: an option means nothing, or two contradict each other.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        _check(temperature, top_k, top_p, min_p, seed)
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.seed = int(torch.randint(2**62, ())) if seed is None and temperature > 0 else seed
        self._streams: dict[int, tuple[np.random.Generator, list[float]]] = {}

    def __call__(
        self, logits: Float[Tensor, "batch vocab"], rows: Sequence[int], step: int, ids: Sequence[Sequence[int]]
    ) -> Int[Tensor, " batch"]:
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = (logits - logits.amax(-1, keepdim=True)).double() / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return draw(logits, torch.tensor([self._uniform(row, step) for row in rows], dtype=torch.float64))

    def _uniform(self, row: int, step: int) -> float:
        """The number of `row` at `step`: the same however often and in whatever company it is asked for."""
        if row not in self._streams:
            self._streams[row] = (np.random.default_rng([self.seed, row]), [])
        stream, drawn = self._streams[row]
        while len(drawn) <= step:
            drawn.append(stream.random())
        return drawn[step]


def _check(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None) -> None:
    """Raise ValueError with a sentence for options that mean nothing or contradict each other."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (the likeliest token) or a positive number")
    given = {name: value for name, value in [("top_k", top_k), ("top_p", top_p), ("min_p", min_p)] if value is not None}
    if temperature == 0 and given:
        names = " and ".join(given)
        raise ValueError(
            f"temperature 0 takes the likeliest token, so {names} means nothing: drop it, or raise the temperature"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; at least 1 token must remain")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it is a probability above 0, at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}; it is a share of the largest probability, from 0 to 1")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
