"""Streams of training sequences: sequence number n is the same whatever the batch size, the readers or the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llama_edu.data.tokens import Batch, Batches, TokenFile
from llama_edu.errors import UserError

__all__ = ["Spec", "TokenStream", "open_stream"]

Spec = str | Path | Sequence[str | Path] | Mapping[str, Any]


@runtime_checkable
class TokenStream(Protocol):
    """Training sequences by number. There is no state: a run that has seen n sequences goes on with number n.

    Attributes:
        seq_len: tokens in a sequence.
        n_sequences: sequences of an epoch; None where there is no such number (a mixture).
        vocab_size: every id is below this.
        tokenizer_sha256: `tokenizer_hash` of the tokenizer that wrote the tokens.
    """

    seq_len: int

    @property
    def n_sequences(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tokenizer_sha256(self) -> str: ...

    def rows(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count - 1`, counted from 0. Costs the same wherever `first` is."""
        ...

    def fingerprint(self, until: int | None = None) -> str:
        """sha256 of what fixes the sequences; with `until`, only of what fixes those before number `until`.

        A run that goes on may change its mixture later on: compare `fingerprint(until=sequences seen)`.
        """
        ...


def open_stream(spec: Spec, *, seq_len: int, seed: int) -> TokenStream:
    """The stream of training sequences that `spec` describes.

    Args:
        spec: a token folder, a folder or a list of shards, or a mixture: a mapping path -> weight, or
            `{"sources": {name: path or list}, "weights": {name: weight}, "changes": [{"at": tokens, "weights": ...}]}`.
        seq_len: tokens in a sequence.
        seed: of every order.

    Raises:
        UserError: something of this is missing, damaged or does not fit together.
    """
    if isinstance(spec, (str, Path)):
        return Batches(TokenFile(spec), 1, seq_len, seed)
    raise UserError("a mixture of sources cannot be opened yet; give one token folder")
