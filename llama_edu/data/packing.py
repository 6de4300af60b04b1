"""Documents packed into sequences without cutting those that fit: best-fit bins, and the stream made of them."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort

import numpy as np
import torch
from jaxtyping import Int

from llama_edu.data.shuffle import shuffled
from llama_edu.data.tokens import IGNORE, Batch, TokenFile
from llama_edu.errors import UserError


def best_fit(lengths: Int[np.ndarray, " pieces"], capacity: int) -> list[list[int]]:
    """Put pieces into bins, the longest first, each into the bin that it leaves with the least room.

    Args:
        lengths: of the pieces, 1 to `capacity`.
        capacity: of a bin.

    Returns:
        the numbers of the pieces in each bin.

    Source: Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830, section 3.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free positions -> the bins that have as many
    rooms: list[int] = []  # the keys of by_room, sorted
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist()):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        bins[number].append(piece)
        if room > length:
            if room - length not in by_room:
                by_room[room - length] = []
                insort(rooms, room - length)
            by_room[room - length].append(number)
    return bins


class PackedSequences:
    """Sequences of whole documents: only those longer than a sequence are cut. What no document fills is padding.

    A document of n tokens asks n - 1 questions (which token comes next?), and takes as many positions. Padding has no
    target and is a document of its own, number -1. The bins follow from the lengths; an epoch visits each once, in an
    order that follows from seed and epoch.

    Args:
        token_file: where the documents are.
        seq_len: positions in a sequence.
        seed: of the order.

    Attributes:
        waste: share of the positions that are padding.

    Raises:
        UserError: no document has two tokens.
    """

    def __init__(self, token_file: TokenFile, seq_len: int, seed: int) -> None:
        self.token_file, self.seq_len, self.seed = token_file, seq_len, seed
        starts, lengths, documents = _pieces(token_file.bounds(), seq_len)
        if not len(starts):
            raise UserError(f"no document in {token_file.path} has two tokens or more: there is nothing to predict")
        bins = best_fit(lengths, seq_len)
        order = np.array([piece for one in bins for piece in one])
        self._starts, self._lengths, self._documents = starts[order], lengths[order], documents[order]
        self._bins = np.cumsum([0, *map(len, bins)])
        self.waste = 1 - int(lengths.sum()) / (len(bins) * seq_len)

    @property
    def n_sequences(self) -> int:
        """Sequences of an epoch."""
        return len(self._bins) - 1

    @property
    def vocab_size(self) -> int:
        return self.token_file.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        return self.token_file.tokenizer_sha256

    def take(self, numbers: Int[np.ndarray, " count"]) -> Batch:
        """The sequences of these numbers, in this order."""
        epoch, position = np.divmod(numbers, self.n_sequences)
        shape = (len(numbers), self.seq_len)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        documents = np.full(shape, -1, np.int64)
        for row, chosen in enumerate(shuffled(position, self.n_sequences, self.seed, epoch).tolist()):
            at = 0
            for piece in range(self._bins[chosen], self._bins[chosen + 1]):
                start, end = int(self._starts[piece]), at + int(self._lengths[piece])
                self.token_file.copy(start, tokens[row, at:end])
                self.token_file.copy(start + 1, targets[row, at:end])
                documents[row, at:end] = self._documents[piece]
                at = end
        return Batch(*(torch.from_numpy(a) for a in (tokens, targets, documents)))

    def rows(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count - 1` of the run, counted from 0."""
        return self.take(first + np.arange(count))

    def fingerprint(self, until: int | None = None) -> str:
        """sha256 of all that fixes the sequences: the tokens, their tokenizer, the length and the seed."""
        file = self.token_file
        parts = ("packed", file.tokens_sha256, file.tokenizer_sha256, self.seq_len, self.seed)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _pieces(bounds: Int[np.ndarray, " ends"], seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, document) of the pieces that documents are cut into, none longer than `seq_len`."""
    questions = np.maximum(np.diff(bounds) - 1, 0)
    n = -(-questions // seq_len)
    documents = np.repeat(np.arange(len(n)), n)
    within = np.arange(len(documents)) - np.repeat(np.cumsum(n) - n, n)
    starts = bounds[documents] + within * seq_len
    return starts, np.minimum(seq_len, questions[documents] - within * seq_len), documents
