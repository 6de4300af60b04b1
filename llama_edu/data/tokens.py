"""Documents as token ids on disk, and the batches a training run draws from them.

A shard is a folder: `tokens.bin` (every id, little endian, documents one after the other), `documents.npy` (where each
document begins, and the end) and `meta.json` (counts, hashes; written last). It is memory-mapped, so opening one costs
nothing and its size is bounded by the disk alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llama_edu.data.shuffle import shuffled
from llama_edu.errors import UserError

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "TokenFile",
    "TokenShards",
    "document_positions",
    "sequential_batches",
    "tokenizer_hash",
    "write_tokens",
]

VERSION = 1
FLUSH_BYTES = 1 << 22
# A target that no loss counts: torch.nn.functional.cross_entropy leaves it out by default.
IGNORE = -100


class Batch(NamedTuple):
    """Inputs, what each position is to predict (IGNORE: nothing), and which document each position belongs to."""

    tokens: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    document_ids: Int[Tensor, "batch seq"]


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what fixes a tokenizer: the split pattern, the bytes of every id, the special tokens."""
    special = dict(tokenizer.special_tokens)
    digest = hashlib.sha256(str(getattr(tokenizer, "pattern", "")).encode())
    for i in sorted(set(range(tokenizer.n_vocab)) - set(special.values())):
        piece = tokenizer.decode_bytes([i])
        digest.update(b"%d %d " % (i, len(piece)) + piece)
    for text, i in sorted(special.items(), key=lambda item: item[1]):
        digest.update(b"special %d " % i + text.encode())
    return digest.hexdigest()


def write_tokens(documents: Iterable[str], tokenizer: Any, out_dir: str | Path, *, progress: bool = False) -> TokenFile:
    """Encode documents into a new shard folder. Memory holds one document, and one number for each seen before.

    A document becomes its ids between the tokenizer's begin and end tokens, as far as it has them. The folder appears
    under its name only when it is whole.

    Args:
        documents: texts; empty ones are left out.
        tokenizer: has `encode`, `decode_bytes`, `n_vocab` and `special_tokens`; `bos_id` and `eos_id`, ids or None.
        out_dir: the shard; must not exist yet, or be an empty folder.
        progress: show a progress bar.

    Raises:
        UserError: `out_dir` is taken, or there is no text.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder; choose another place for the tokens")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_shard(documents, tokenizer, partial, progress)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return TokenFile(out)


def encoded(documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(UTF-8 bytes, ids) of each document that is not empty, the ids between the begin and end tokens as far as any.

    Raises:
        UserError: the tokenizer gave an id that its vocabulary does not have.
    """
    ends = {name: getattr(tokenizer, f"{name}_id", None) is not None for name in ("bos", "eos")}
    for group in _groups(documents):
        if hasattr(tokenizer, "encode_batch"):
            rows = tokenizer.encode_batch(group, **ends)
        else:
            rows = (tokenizer.encode(text, **ends) for text in group)
        for text, row in zip(group, rows):
            ids = np.asarray(row, dtype=np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.n_vocab:
                bad = ids.max() if ids.min() >= 0 else ids.min()
                raise UserError(
                    f"the tokenizer gave the id {bad}, but its vocabulary has {tokenizer.n_vocab} tokens, 0 to "
                    f"{tokenizer.n_vocab - 1}"
                )
            yield n_bytes(text), ids


def n_bytes(text: str) -> int:
    """Length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _groups(documents: Iterable[str], characters: int = 1 << 18) -> Iterator[list[str]]:
    """Documents in lists of about as many characters: a tokenizer encodes many small ones faster at a time."""
    group: list[str] = []
    size = 0
    for text in documents:
        if text:
            group.append(text)
            size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_shard(
    documents: Iterable[str], tokenizer: Any, folder: Path, progress: bool, extra: dict[str, Any] | None = None
) -> None:
    from tqdm import tqdm

    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    bounds, total, digest = array("q", [0]), 0, hashlib.sha256()
    bar = tqdm(desc="encoding", unit="B", unit_scale=True, disable=None if progress else True)
    with open(folder / "tokens.bin", "wb", buffering=FLUSH_BYTES) as file, bar:
        for size, ids in encoded(documents, tokenizer):
            ids = ids.astype(dtype)
            file.write(ids.data)
            digest.update(ids.data)
            bounds.append(bounds[-1] + len(ids))
            total += size
            bar.update(size)
        _sync(file)
    if not total:
        raise UserError("there is no text to encode: no document holds a character")
    with open(folder / "documents.npy", "wb") as file:
        np.save(file, np.frombuffer(bounds, dtype="<i8"))
        _sync(file)
    meta = {
        "version": VERSION,
        "dtype": dtype.name,
        "n_tokens": bounds[-1],
        "n_documents": len(bounds) - 1,
        "n_bytes": total,
        "vocab_size": tokenizer.n_vocab,
        "tokenizer_sha256": (extra or {}).get("tokenizer_sha256") or tokenizer_hash(tokenizer),
        "tokens_sha256": digest.hexdigest(),
        **(extra or {}),
    }
    with open(folder / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
        _sync(file)


def _sync(file) -> None:
    """Bring what was written to the disk, so that a rename that survives a power failure names whole files."""
    file.flush()
    os.fsync(file.fileno())


class TokenFile:
    """A shard written by `write_tokens`, memory-mapped.

    Attributes:
        tokens: (n_tokens,) ids, uint16 or uint32, on disk.
        documents: (n_documents + 1,) int64; document i is `tokens[documents[i] : documents[i + 1]]`.
        n_tokens, n_documents: counts.
        n_bytes: UTF-8 bytes of the text.
        vocab_size: ids are below this.
        tokenizer_sha256: `tokenizer_hash` of the tokenizer that wrote it.
        tokens_sha256: hash of `tokens.bin`.

    Raises:
        UserError: the folder is no whole shard; the sentence says what is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        meta_file = self.path / "meta.json"
        if not meta_file.is_file():
            raise UserError(f"{self.path} holds no tokens: it has no meta.json; write_tokens makes such a folder")
        try:
            meta = json.loads(meta_file.read_text())
            if meta["version"] != VERSION:
                raise UserError(f"{meta_file} is of version {meta['version']}; this program reads version {VERSION}")
            dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
            self.n_tokens, self.n_documents, self.n_bytes, self.vocab_size = (
                int(meta[name]) for name in ("n_tokens", "n_documents", "n_bytes", "vocab_size")
            )
            self.tokenizer_sha256, self.tokens_sha256 = str(meta["tokenizer_sha256"]), str(meta["tokens_sha256"])
            self.text_sha256 = meta.get("text_sha256")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            fault = f"{type(error).__name__}: {error}"
            raise UserError(f"{meta_file} is damaged ({fault}); write the tokens again") from error
        self.tokens = self._map("tokens.bin", dtype)
        try:
            self.documents = np.load(self.path / "documents.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / 'documents.npy'} is damaged: {error}; write the tokens again") from error
        bounds = self.documents
        if (
            bounds.shape != (self.n_documents + 1,)
            or bounds.dtype != np.int64
            or (bounds[0], bounds[-1])
            != (
                0,
                self.n_tokens,
            )
        ):
            raise UserError(f"{self.path / 'documents.npy'} does not fit meta.json; write the tokens again")
        self._ids, self._bounds = np.asarray(self.tokens), np.asarray(self.documents)  # quicker to slice than a memmap

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        file, expected = self.path / name, self.n_tokens * dtype.itemsize
        size = file.stat().st_size if file.is_file() else 0
        if size != expected or not expected:
            raise UserError(f"{file} has {size} bytes where meta.json says {expected}; write the tokens again")
        return np.memmap(file, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {self.n_tokens:,} tokens in {self.n_documents:,} documents)"

    def verify(self) -> None:
        """Read every token and compare with the hash. Raises UserError where a byte has changed."""
        digest = hashlib.sha256()
        for start in range(0, self.n_tokens, FLUSH_BYTES):
            digest.update(np.ascontiguousarray(self.tokens[start : start + FLUSH_BYTES]).data)
        if digest.hexdigest() != self.tokens_sha256:
            raise UserError(f"{self.path / 'tokens.bin'} has changed since it was written; write the tokens again")

    def bounds(self) -> Int[np.ndarray, " ends"]:
        """Where each document begins, and the end."""
        return self._bounds

    def copy(self, start: int, out: Int[np.ndarray, " n"]) -> None:
        """Fill `out` with the ids from `start` on."""
        out[:] = self._ids[start : start + len(out)]

    def copy_documents(self, start: int, out: Int[np.ndarray, " n"]) -> None:
        """Fill `out` with the numbers of the documents that the tokens from `start` on belong to."""
        first, last = np.searchsorted(self._bounds, (start, start + len(out) - 1), side="right") - 1
        if first == last:
            out[:] = first
        else:
            lengths = np.diff(self._bounds[first + 1 : last + 1], prepend=start, append=start + len(out))
            out[:] = np.repeat(np.arange(first, last + 1), lengths)

    def windows(self, starts: Int[np.ndarray, " count"], seq_len: int) -> Batch:
        """The batch whose row i reads `seq_len` tokens from `starts[i]` on, targets one further.

        What lies beyond the end of the file is token 0 without a target.
        """
        shape = (len(starts), seq_len)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        documents = np.full(shape, self.n_documents, np.int64)
        for row, start in enumerate(starts.tolist()):
            n = min(seq_len, self.n_tokens - start)
            if n > 0:
                self.copy(start, tokens[row, :n])
                self.copy_documents(start, documents[row, :n])
                self.copy(start + 1, targets[row, : min(n, self.n_tokens - start - 1)])
        return Batch(*(torch.from_numpy(a) for a in (tokens, targets, documents)))


class TokenShards(TokenFile):
    """Several shards read as one, in the order given: the same windows as if they were one file.

    Args:
        shards: folders written by `write_tokens`.
        path: the folder they are in, for messages.

    Raises:
        UserError: one of them is no whole shard, or another tokenizer wrote it.
    """

    def __init__(self, shards: Iterable[str | Path], path: str | Path | None = None) -> None:
        self.shards = [TokenFile(shard) for shard in shards]
        if not self.shards:
            raise UserError("there are no shards to read; give one or more folders of tokens")
        first = self.shards[0]
        self.path = first.path.parent if path is None else Path(path)
        for shard in self.shards[1:]:
            if shard.tokenizer_sha256 != first.tokenizer_sha256:
                raise UserError(
                    f"{shard.path} and {first.path} were written by two tokenizers ({shard.tokenizer_sha256[:8]} and "
                    f"{first.tokenizer_sha256[:8]}); write one of them again with the other's"
                )
        self.n_tokens, self.n_documents, self.n_bytes = (
            sum(getattr(shard, name) for shard in self.shards) for name in ("n_tokens", "n_documents", "n_bytes")
        )
        self.vocab_size, self.tokenizer_sha256 = first.vocab_size, first.tokenizer_sha256
        hashes = "\n".join(shard.tokens_sha256 for shard in self.shards)
        self.tokens_sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        self._token_starts = np.cumsum([0, *(shard.n_tokens for shard in self.shards)])
        self._document_starts = np.cumsum([0, *(shard.n_documents for shard in self.shards)])

    def verify(self) -> None:
        """Read every token of every shard and compare with the hashes."""
        for shard in self.shards:
            shard.verify()

    def bounds(self) -> Int[np.ndarray, " ends"]:
        """Where each document begins, and the end."""
        parts = [shard.bounds()[:-1] + start for shard, start in zip(self.shards, self._token_starts)]
        return np.concatenate([*parts, [self.n_tokens]])

    def _parts(self, start: int, out: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(number of a shard, where in it, the part of `out` that it fills)."""
        number, done = int(np.searchsorted(self._token_starts, start, side="right")) - 1, 0
        while done < len(out):
            inside = start + done - int(self._token_starts[number])
            n = min(len(out) - done, self.shards[number].n_tokens - inside)
            yield number, inside, out[done : done + n]
            number, done = number + 1, done + n

    def copy(self, start: int, out: Int[np.ndarray, " n"]) -> None:
        """Fill `out` with the ids from `start` on."""
        for number, inside, part in self._parts(start, out):
            self.shards[number].copy(inside, part)

    def copy_documents(self, start: int, out: Int[np.ndarray, " n"]) -> None:
        """Fill `out` with the numbers of the documents that the tokens from `start` on belong to."""
        for number, inside, part in self._parts(start, out):
            self.shards[number].copy_documents(inside, part)
            part += self._document_starts[number]


def document_positions(document_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Position of each token inside its document's part of the row: 0, 1, 2, ... again at each new document.

    Example: a row of documents `[4, 4, 4, 5, 5]` has positions `[0, 1, 2, 0, 1]`.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    new = torch.ones_like(document_ids, dtype=torch.bool)
    new[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(new, index, 0).cummax(dim=1).values


class Batches:
    """Training batches as a function of the step: nothing to save, nothing to rewind.

    The file is cut into windows of `seq_len` tokens; an epoch visits every window once, in an order of its own that
    follows from seed and epoch. A batch may end one epoch and begin the next. What remains after the last whole window
    is left out.

    Args:
        token_file: where the tokens are.
        batch_size: sequences in a batch.
        seq_len: tokens in a sequence.
        seed: of the order.

    Raises:
        UserError: the file does not fill one batch.
    """

    def __init__(self, token_file: TokenFile, batch_size: int, seq_len: int, seed: int) -> None:
        self.token_file, self.batch_size, self.seq_len, self.seed = token_file, batch_size, seq_len, seed
        self.n_windows = (token_file.n_tokens - 1) // seq_len
        if self.n_windows < batch_size:
            raise UserError(
                f"the corpus in {token_file.path} has {token_file.n_tokens} tokens, less than the "
                f"{batch_size * seq_len + 1} of one batch of {batch_size} sequences of {seq_len}: give it more text, "
                "or lower batch_size or seq_len"
            )

    @property
    def n_sequences(self) -> int:
        """Sequences of an epoch."""
        return self.n_windows

    def take(self, numbers: Int[np.ndarray, " count"]) -> Batch:
        """The sequences of these numbers, in this order."""
        epoch, position = np.divmod(numbers, self.n_windows)
        windows = shuffled(position, self.n_windows, self.seed, epoch)
        return self.token_file.windows(windows * self.seq_len, self.seq_len)

    def rows(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count - 1` of the run, counted from 0."""
        return self.take(first + np.arange(count))

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self.rows(step * self.batch_size, self.batch_size)

    @property
    def vocab_size(self) -> int:
        return self.token_file.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        return self.token_file.tokenizer_sha256

    def fingerprint(self, until: int | None = None) -> str:
        """sha256 of all that fixes the sequences: the tokens, their tokenizer, the length and the seed."""
        file = self.token_file
        parts = ("windows", file.tokens_sha256, file.tokenizer_sha256, self.seq_len, self.seed)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def sequential_batches(
    token_file: TokenFile, batch_size: int, seq_len: int, *, max_batches: int | None = None
) -> Iterator[Batch]:
    """Every token once, in order, for evaluation; with `max_batches`, windows spread evenly over the file instead.

    All batches have the same shape; rows and positions beyond the end have no targets.
    """
    n_windows = max(1, -(-(token_file.n_tokens - 1) // seq_len))
    windows = np.arange(n_windows)
    if max_batches is not None and max_batches * batch_size < n_windows:
        chosen = max_batches * batch_size
        windows = windows[:chosen] * n_windows // chosen
    rest = -len(windows) % batch_size
    windows = np.concatenate([windows, np.full(rest, n_windows)])
    for rows in windows.reshape(-1, batch_size):
        yield token_file.windows(rows * seq_len, seq_len)
