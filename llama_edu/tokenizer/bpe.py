"""Byte-level byte-pair encoding: a trainer, an encoder, and the tokenizer that Llama 3 uses."""

from __future__ import annotations

import base64
import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from llama_edu.errors import UserError

__all__ = ["LLAMA3_PATTERN", "BPETokenizer", "StreamDecoder"]

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train(texts: Iterable[str], vocab_size: int, pattern: str) -> dict[bytes, int]:
    split = regex.compile(pattern)
    counts = Counter(word for text in texts for word in split.findall(text))
    words = [(list(word.encode()), n) for word, n in counts.items()]
    tokens = [bytes([i]) for i in range(256)]
    pairs: dict[tuple[int, int], int] = defaultdict(int)
    where: dict[tuple[int, int], set[int]] = defaultdict(set)
    for w, (ids, n) in enumerate(words):
        for pair in pairwise(ids):
            pairs[pair] += n
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for w in where.pop(pair):
            ids, n = words[w]
            for p in pairwise(ids):
                pairs[p] -= n
            i, out = 0, []
            while i < len(ids):
                if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
                    out.append(new)
                    i += 2
                else:
                    out.append(ids[i])
                    i += 1
            ids[:] = out
            for p in pairwise(ids):
                pairs[p] += n
                where[p].add(w)
                if new in p:
                    changed.add(p)
        for p in changed:
            heapq.heappush(heap, (-pairs[p], p))
    return {token: i for i, token in enumerate(tokens)}


class BPETokenizer:
    """Byte-level BPE: text is split by a pattern, and the bytes of each piece are merged by rank.

    Args:
        ranks: bytes of a token -> its id; 0 to n-1 without gaps, all 256 single bytes among them.
        pattern: how text is split before merging.
        special_tokens: text -> id of tokens that no ordinary text becomes.
        bos, eos: which special tokens `encode(bos=True, eos=True)` puts before and after the text.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        *,
        pattern: str = LLAMA3_PATTERN,
        special_tokens: dict[str, int] | None = None,
        bos: str | None = None,
        eos: str | None = None,
    ) -> None:
        self.ranks = dict(ranks)
        self.pattern = pattern
        self.special_tokens = dict(special_tokens or {})
        for name in (bos, eos):
            if name is not None and name not in self.special_tokens:
                raise UserError(f"{name!r} is no special token of this tokenizer")
        self.bos, self.eos = bos, eos
        self.bos_id = None if bos is None else self.special_tokens[bos]
        self.eos_id = None if eos is None else self.special_tokens[eos]
        self.n_vocab = max([len(self.ranks) - 1, *self.special_tokens.values()]) + 1

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The same tokenizer as a `tiktoken.Encoding`."""
        return tiktoken.Encoding(
            "llama_edu", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: str = LLAMA3_PATTERN,
        special_tokens: Collection[str] = (),
        progress: bool = False,
    ) -> BPETokenizer:
        """Learn a vocabulary of `vocab_size` tokens, the 256 bytes and the special tokens among them."""
        ranks = _train(texts, vocab_size - len(special_tokens), pattern)
        special = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        bos, eos = (n if n in special else None for n in ("<|begin_of_text|>", "<|end_of_text|>"))
        return cls(ranks, pattern=pattern, special_tokens=special, bos=bos, eos=eos)

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, allowed_special: Collection[str] = frozenset()
    ) -> list[int]:
        """Ids of `text`. The text of a special token is ordinary text unless it is in `allowed_special`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text holds half a character, U+{ord(text[error.start]):04X} at character {error.start}"
            ) from None
        ids = self.encoding.encode(text, allowed_special=set(allowed_special), disallowed_special=())
        for wanted, value, name in ((bos, self.bos_id, "begin"), (eos, self.eos_id, "end")):
            if wanted and value is None:
                raise UserError(f"this tokenizer has no token for the {name} of a text")
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(
        self, texts: Iterable[str], *, bos: bool = False, eos: bool = False, allowed_special=frozenset()
    ) -> list[list[int]]:
        """`encode` for many texts."""
        return [self.encode(t, bos=bos, eos=eos, allowed_special=allowed_special) for t in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for."""
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder to be fed id by id."""
        return StreamDecoder(self)

    def save(self, path: str | Path) -> None:
        """Write a tiktoken rank file and, beside it, `path` + ".json" with pattern and special tokens."""
        path = Path(path)
        lines = (base64.b64encode(token) + b" %d\n" % i for token, i in sorted(self.ranks.items(), key=lambda x: x[1]))
        _write(path, b"".join(lines))
        side = {"pattern": self.pattern, "special_tokens": self.special_tokens, "bos": self.bos, "eos": self.eos}
        _write(path.with_name(path.name + ".json"), json.dumps(side, indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read what `save` wrote, or any tiktoken rank file."""
        path = Path(path)
        ranks = {}
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        side = path.with_name(path.name + ".json")
        return cls(ranks, **(json.loads(side.read_bytes()) if side.exists() else {}))

    def to_hf(self, path: str | Path) -> None:
        """Write a tokenizer.json for Hugging Face `tokenizers`."""
        from llama_edu.tokenizer.formats import to_hf

        to_hf(self, path)

    @classmethod
    def from_hf(cls, path: str | Path) -> BPETokenizer:
        """Read a byte-level BPE tokenizer.json."""
        from llama_edu.tokenizer.formats import from_hf

        return cls(**from_hf(path))


class StreamDecoder:
    """Turns ids into text as they come, whole characters only.

    `push(id)` returns the text that is complete, `finish()` what is left.
    """

    def __init__(self, tokenizer: BPETokenizer) -> None:
        import codecs

        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that is complete now, after one more id (or several)."""
        ids = [ids] if isinstance(ids, int) else ids
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """The end of the stream: half a character that never became whole is U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)
