"""Reading and writing tokenizer files: every number checked, every fault named with its place."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["byte_to_char", "from_hf", "to_hf"]


def byte_to_char() -> dict[int, str]:
    """How Hugging Face files write a byte as one printable character (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in table):
        table[b] = chr(256 + n)
    return table


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made this one: merge its bytes by lower ranks until two are left."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= limit:
            raise ValueError(token)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def to_hf(tokenizer: Any, path: str | Path) -> None:
    """Write a tokenizer.json that Hugging Face `tokenizers` reads with identical ids."""
    table = byte_to_char()
    text = {token: "".join(table[b] for b in token) for token in tokenizer.ranks}
    merges = [
        [text[p] for p in _parts(token, tokenizer.ranks)]
        for token, _ in sorted(tokenizer.ranks.items(), key=lambda item: item[1])
        if len(token) > 1
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    special = [
        {"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for s, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    ]  # fmt: skip
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {text[t]: i for t, i in tokenizer.ranks.items()}, "merges": merges,
        },
    }  # fmt: skip
    Path(path).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def from_hf(path: str | Path) -> dict[str, Any]:
    """The arguments of BPETokenizer from a byte-level BPE tokenizer.json."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    table = {c: b for b, c in byte_to_char().items()}
    special = {t["content"]: t["id"] for t in data["added_tokens"]}
    ranks = {bytes(table[c] for c in t): i for t, i in data["model"]["vocab"].items() if t not in special}
    split = next(p for p in data["pre_tokenizer"]["pretokenizers"] if p["type"] == "Split")
    bos, eos = (n if n in special else None for n in ("<|begin_of_text|>", "<|end_of_text|>"))
    return {"ranks": ranks, "pattern": split["pattern"]["Regex"], "special_tokens": special, "bos": bos, "eos": eos}
