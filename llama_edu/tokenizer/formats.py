"""Files of byte-level BPE tokenizers: tiktoken's rank file and Hugging Face's tokenizer.json, each fault named."""

from __future__ import annotations

import base64
import binascii
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from llama_edu.errors import UserError

__all__ = ["byte_to_char", "read_hf", "read_ranks", "write_hf", "write_ranks"]

MAX_BYTES = 1 << 28  # a rank file of a million tokens has about 20 MB


def read_ranks(path: str | Path) -> tuple[dict[bytes, int], dict[str, Any]]:
    """Ranks of a tiktoken file, and what the file `path` + ".json" beside it says of pattern and special tokens.

    A line is a token in base64, a space, its rank; the ranks are 0, 1, 2, ... in this order.

    Raises:
        UserError: the file is missing or damaged; the sentence names file and line.
    """
    path = Path(path)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        token, rank = _read_line(line, f"{path}, line {number}")
        if token in ranks:
            raise UserError(f"{path}, line {number}: this token already has rank {ranks[token]}")
        if rank != len(ranks):
            what = "stands for a second time" if rank < len(ranks) else "leaves a gap"
            raise UserError(f"{path}, line {number}: rank {rank} {what}; {len(ranks)} was expected")
        ranks[token] = rank
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(
            f"{path} ends after line {len(ranks)} without the byte 0x{missing[0]:02X}; it is cut short or no rank file"
        )
    extra = path.with_name(path.name + ".json")
    return ranks, _read_extra(extra) if extra.exists() else {}


def _read_line(line: bytes, where: str) -> tuple[bytes, int]:
    parts = line.split()
    if len(parts) != 2:
        raise UserError(f"{where}: a token in base64, a space and a rank are expected, not {line[:40]!r}")
    try:
        token = base64.b64decode(parts[0], validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{where}: {parts[0][:40]!r} is no base64") from None
    if not token:
        raise UserError(f"{where}: the token is empty")
    if not parts[1].isdigit() or len(parts[1]) > 9:
        raise UserError(f"{where}: {parts[1][:40]!r} is no rank")
    return token, int(parts[1])


def _read_extra(path: Path) -> dict[str, Any]:
    data = _read_json(path)
    kinds = {"pattern": str, "special_tokens": dict, "bos": (str, type(None)), "eos": (str, type(None))}
    if set(data) - set(kinds):
        raise UserError(f"{path} has an unknown field {sorted(set(data) - set(kinds))[0]!r}")
    for name, value in data.items():
        if not isinstance(value, kinds[name]):
            raise UserError(f"{path}: the field {name!r} is of a wrong type, {type(value).__name__}")
    for name, i in data.get("special_tokens", {}).items():
        _need_id(i, f"the special token {name!r}", path)
    _check_pattern(data.get("pattern", ""), path)
    return data


def _need_id(i: Any, whose: str, path: Path) -> None:
    if type(i) is not int or not 0 <= i < 2**31:  # in JSON true is no number
        raise UserError(f"{path}: the id of {whose} is {str(i)[:40]!r}, no whole number below 2**31")


def write_ranks(path: str | Path, ranks: dict[bytes, int], extra: dict[str, Any]) -> None:
    """Write a tiktoken rank file and its companion. Each replaces an older one only when it is whole."""
    path = Path(path)
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    text = json.dumps(extra, indent=1, ensure_ascii=False) + "\n"
    _write(path.with_name(path.name + ".json"), text.encode())
    _write(path, b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank))


def byte_to_char() -> dict[int, str]:
    """How Hugging Face's files write a byte as one printable character: itself where it is one, U+0100 onward else."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(rest)}


def write_hf(path: str | Path, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> None:
    """Write a tokenizer.json that Hugging Face `tokenizers` reads, with the same ids.

    That format lists merges, a rank file does not. A token's merge is where its own bytes stand when one merge is left;
    a token that its bytes never merge to is in the vocabulary without a merge and still found whole.
    """
    table = byte_to_char()
    text = {token: "".join(table[b] for b in token) for token in ranks}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [[text[a], text[b]] for token in by_rank for a, b in _last_merge(token, ranks)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
        "vocab": {text[token]: ranks[token] for token in by_rank}, "merges": merges,
    }  # fmt: skip
    by_id = sorted(special_tokens.items(), key=lambda item: item[1])
    if [i for _, i in by_id] != list(range(len(ranks), len(ranks) + len(by_id))):
        model["vocab"] |= dict(by_id)  # else `tokenizers` numbers them one after the other
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in by_id],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": model,
    }
    _write(Path(path), json.dumps(data, ensure_ascii=False, indent=1).encode())


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair whose merge makes a token; none for a byte, or for a token that its bytes never merge to."""
    parts, own = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, own), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= own:
            return []
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [(parts[0], parts[1])] if len(parts) == 2 else []


def read_hf(path: str | Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Ranks, pattern and special tokens of a byte-level BPE tokenizer.json.

    Raises:
        UserError: the file is missing, damaged, or describes another kind of tokenizer than ids by rank can.
    """
    path = Path(path)
    data = _read_json(path)
    try:
        return _parse_hf(data, path)
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise UserError(f"{path} lacks what a byte-level BPE tokenizer.json has ({error!r})") from None


def _parse_hf(data: dict[str, Any], path: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    model = data["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(f"{path} holds a tokenizer of another kind ({model.get('type')}), not byte-level BPE")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UserError(f"{path} has the option {option} ({model[option]!r}), which this tokenizer has not")
    if data.get("normalizer") is not None:
        raise UserError(f"{path} changes the text before it is split (its normalizer), which this tokenizer does not")
    special = {t["content"]: t["id"] for t in data.get("added_tokens") or []}
    for name, i in [*special.items(), *model["vocab"].items()]:
        _need_id(i, f"the token {name!r}", path)
    table = {c: b for b, c in byte_to_char().items()}
    ranks = {}
    for text, i in model["vocab"].items():
        if text in special and special[text] == i:
            continue
        if bad := [c for c in text if c not in table]:
            raise UserError(f"{path}: the token {text!r} has the character {bad[0]!r}, which stands for no byte")
        ranks[bytes(table[c] for c in text)] = i
    lengths = [(ranks[_bytes(pair, table)], pair) for pair in model["merges"]]
    if any(a[0] > b[0] for a, b in pairwise(lengths)):  # of a token there may be several, as in Llama 3's own file
        raise UserError(f"{path} lists its merges in another order than the ids, which a list of ranks cannot express")
    whole = ranks.keys() - {_bytes(pair, table) for pair in model["merges"]}
    if not model.get("ignore_merges") and (lost := [token for token in whole if len(token) > 1]):
        raise UserError(f"{path} has no merge for {len(lost)} of its tokens, such as {min(lost)!r}: it is never found")
    pre = data["pre_tokenizer"]
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        kinds = ", ".join(str(step["type"]) for step in steps)
        raise UserError(f"{path} does not split text by a pattern into bytes, and that alone (it has {kinds})")
    split, level = steps
    if split.get("behavior") != "Isolated" or split.get("invert") or level["add_prefix_space"]:
        raise UserError(f"{path} drops, joins or adds text where it splits, which this tokenizer does not")
    if level.get("use_regex", True):
        raise UserError(f"{path} splits by the pattern of GPT-2 as well, which this tokenizer does not")
    pattern = split["pattern"]["Regex"]
    _check_pattern(pattern, path)
    return ranks, pattern, special


def _bytes(pair: list[str] | str, table: dict[str, int]) -> bytes:
    """The bytes of a merge, which older files write as one string with a space."""
    return bytes(table[c] for part in (pair.split(" ") if isinstance(pair, str) else pair) for c in part)


def _check_pattern(pattern: str, path: Path) -> None:
    import regex

    try:
        regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"{path}: the split pattern is no regular expression ({error})") from None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"there is no tokenizer file {path}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a tokenizer file has at most {MAX_BYTES:,}")
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 at byte {error.start}; it is damaged") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a tokenizer") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object, as a tokenizer file does")
    return data


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None
