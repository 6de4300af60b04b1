"""A weighted mixture of sources, by sequence number: exact shares, changes at given tokens, nothing to save."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int

from llama_edu.data.shuffle import shuffled
from llama_edu.data.tokens import Batch
from llama_edu.errors import UserError

BLOCK = 64  # sequences that share one set of quotas
_FINE = 32  # bits of a block's offset, so that a run has fewer than 2**32 blocks


class Source(Protocol):
    """What a mixture draws from: sequences by number, again in another order after `n_sequences` of them."""

    seq_len: int

    @property
    def n_sequences(self) -> int: ...

    def take(self, numbers: Int[np.ndarray, " count"]) -> Batch: ...

    def fingerprint(self, until: int | None = None) -> str: ...


def reversed_bits(x: Int[np.ndarray, " *shape"]) -> Int[np.ndarray, " *shape"]:
    """The 32 bits of each number in reverse order (0, 2**31, 2**30, 3 * 2**30, ...): evenly spread at every length."""
    out = np.zeros_like(x)
    for bit in range(_FINE):
        out |= (x >> bit & 1) << (_FINE - 1 - bit)
    return out


def reversed_below(limit: int, n: int) -> int:
    """How many of `reversed_bits(0 .. n - 1)` are below `limit`, in 32 steps."""
    count, done = 0, 0
    for bit in reversed(range(n.bit_length())):
        if n >> bit & 1:  # numbers done .. done + 2**bit - 1: reversed, a ladder with steps of 2**(32 - bit)
            lowest, step = int(reversed_bits(np.array(done))), _FINE - bit
            count += 0 if limit <= lowest else (limit - lowest - 1 >> step) + 1
            done += 1 << bit
    return count


def check_weights(weights: Mapping[str, float], known: Sequence[str]) -> list[float]:
    """The weight of each of the sources `known`, 0 where none is given.

    Raises:
        UserError: a name is unknown, a weight is no number from 0 to 1, or they do not sum to 1.
    """
    if missing := [name for name in weights if name not in known]:
        raise UserError(f"the mixture has a weight for {missing[0]!r}, but its sources are {', '.join(known)}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise UserError(f"the weight of {name!r} is {weight!r}; it must be a number, 0 or larger")
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        way_out = f"; divide each by {total:g}" if total > 0 else ""
        raise UserError(f"the weights of the mixture sum to {total:g}, not to 1{way_out}")
    return [weights.get(name, 0) / total for name in known]


class Mixture:
    """A stream that draws from several sources.

    Each block of 64 sequences holds the whole part of 64 times a weight of its source, or one more, such that the sum
    over blocks stays within a few sequences of the exact share for ever. The order inside a block is random. A source
    is read in its own order, epoch after epoch, and a change of weights neither repeats nor skips anything in it.

    Args:
        sources: name -> what to draw from.
        phases: (first sequence, weights by name) with the first at 0, in order.
        seed: of the order inside the blocks.

    Raises:
        UserError: no or bad weights, a phase out of order, a source that is never drawn from.
    """

    n_sequences = None

    def __init__(
        self, sources: Mapping[str, Source], phases: Sequence[tuple[int, Mapping[str, float]]], seed: int
    ) -> None:
        self.sources, self.seed = dict(sources), seed
        self.phases = [(first, dict(weights)) for first, weights in phases]
        names = list(self.sources)
        starts = [first for first, _ in self.phases]
        if not starts or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise UserError(f"the phases of the mixture begin at sequences {starts}; the first is 0 and they rise")
        shares = np.array([check_weights(weights, names) for _, weights in self.phases])
        if idle := [name for name, share in zip(names, shares.sum(axis=0)) if share == 0]:
            raise UserError(f"the source {idle[0]!r} never has a weight above 0; leave it out or give it one")
        self.seq_len = next(iter(self.sources.values())).seq_len
        scale = BLOCK << _FINE
        self._upper = np.rint(np.cumsum(shares, axis=1) * scale).astype(np.int64).clip(0, scale)
        self._upper[:, -1] = scale
        self._starts = np.array(starts)
        self._before = np.zeros((len(starts), len(names)), np.int64)  # drawn from each source before each phase
        for phase in range(len(starts) - 1):
            length = starts[phase + 1] - starts[phase]
            self._before[phase + 1] = self._before[phase] + self._drawn_in(phase, length)

    def _whole_blocks(self, phase: int, blocks: int) -> Int[np.ndarray, " sources"]:
        """Sequences that each source gives to the first `blocks` blocks of a phase."""
        below = [
            blocks * (u >> _FINE) + reversed_below(u & (1 << _FINE) - 1, blocks) for u in self._upper[phase].tolist()
        ]
        return np.diff(below, prepend=0)

    def _block_sources(self, phase: int, block: int, count: int) -> Int[np.ndarray, " sequences"]:
        """The source of each sequence in `count` blocks of a phase from number `block` on."""
        number = np.repeat(block + np.arange(count), BLOCK)
        slot = shuffled(np.tile(np.arange(BLOCK), count), BLOCK, self.seed + phase, number)
        return np.searchsorted(self._upper[phase], slot << _FINE | reversed_bits(number), side="right")

    def _drawn_in(self, phase: int, n: int) -> Int[np.ndarray, " sources"]:
        """Sequences of each source among the first n of a phase."""
        blocks, rest = divmod(n, BLOCK)
        last = self._block_sources(phase, blocks, 1)[:rest]
        return self._whole_blocks(phase, blocks) + np.bincount(last, minlength=len(self.sources))

    def drawn(self, n: int) -> dict[str, int]:
        """How many of the first n sequences come from each source."""
        phase = int(np.searchsorted(self._starts, n, side="right")) - 1
        counts = self._before[phase] + self._drawn_in(phase, n - int(self._starts[phase]))
        return dict(zip(self.sources, counts.tolist()))

    def epochs(self, n: int) -> dict[str, float]:
        """How often the first n sequences go through each source."""
        return {name: count / self.sources[name].n_sequences for name, count in self.drawn(n).items()}

    def draw(self, first: int, count: int) -> tuple[Int[np.ndarray, " count"], Int[np.ndarray, " count"]]:
        """The source of each of these sequences, and its number among the sequences of that source."""
        which, number = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            at = first + done
            phase = int(np.searchsorted(self._starts, at, side="right")) - 1
            end = first + count
            if phase + 1 < len(self._starts):
                end = min(end, int(self._starts[phase + 1]))
            begin, stop = at - int(self._starts[phase]), end - int(self._starts[phase])
            block = begin // BLOCK
            sources = self._block_sources(phase, block, -(-stop // BLOCK) - block)
            numbers = np.empty_like(sources)
            drawn = self._before[phase] + self._whole_blocks(phase, block)
            for source in range(len(self.sources)):
                here = np.flatnonzero(sources == source)
                numbers[here] = drawn[source] + np.arange(len(here))
            part, inside = slice(done, done + end - at), slice(begin - block * BLOCK, stop - block * BLOCK)
            which[part], number[part] = sources[inside], numbers[inside]
            done += end - at
        return which, number

    def rows(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count - 1` of the run, counted from 0."""
        which, number = self.draw(first, count)
        out = [torch.empty(count, self.seq_len, dtype=torch.int64) for _ in Batch._fields]
        for source, stream in enumerate(self.sources.values()):
            here = np.flatnonzero(which == source)
            if len(here):
                for whole, part in zip(out, stream.take(number[here])):
                    whole[torch.from_numpy(here)] = part
        return Batch(*out)

    @property
    def vocab_size(self) -> int:
        return next(iter(self.sources.values())).vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        return next(iter(self.sources.values())).tokenizer_sha256

    def fingerprint(self, until: int | None = None) -> str:
        """sha256 of what fixes the sequences; with `until`, only of what fixes those before number `until`."""
        phases = [(first, w) for first, w in self.phases if until is None or first < until or first == 0]
        used = {name for _, weights in phases for name, weight in weights.items() if weight}
        parts = (
            "mixture",
            self.seed,
            [(first, {name: float(w) for name, w in weights.items() if w}) for first, weights in phases],
            [(name, source.fingerprint()) for name, source in self.sources.items() if name in used],
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
