"""Streams of training sequences: sequence number n is the same whatever the batch size, the readers or the ranks."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llama_edu.data.build import unfinished
from llama_edu.data.mixture import _FINE, BLOCK, Mixture, check_weights
from llama_edu.data.packing import PackedSequences
from llama_edu.data.sources import expanded
from llama_edu.data.tokens import Batch, Batches, TokenFile, TokenShards
from llama_edu.errors import UserError

__all__ = ["Spec", "TokenStream", "open_stream", "open_tokens", "read_ahead", "read_spec"]

Tokens = str | Path | Sequence[str | Path]
Spec = Tokens | Mapping[str, Any]
SPEC_FILES = (".json", ".toml", ".yaml", ".yml")


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


def open_tokens(where: Tokens) -> TokenFile:
    """Tokens on disk: one shard, a folder of shards, or a list of either, read as one.

    Raises:
        UserError: nothing is there, a build is unfinished, a shard is damaged, or two tokenizers wrote the shards.
    """
    if isinstance(where, (str, Path)):
        folder = expanded(where)
        shards = _shards(folder)
        return TokenFile(folder) if shards == [folder] else TokenShards(shards, folder)
    return TokenShards([shard for one in where for shard in _shards(expanded(one))])


def _shards(folder: Path) -> list[Path]:
    if (folder / "meta.json").exists():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; `llama-edu data` or write_shards makes one from text")
    if sentence := unfinished(folder):
        raise UserError(sentence)
    shards = sorted(meta.parent for meta in folder.glob("[!.]*/meta.json"))
    if not shards:
        raise UserError(f"{folder} holds no tokens: neither meta.json nor folders with one; write_shards makes them")
    return shards


def open_stream(spec: Spec, *, seq_len: int, seed: int, packing: str = "concat") -> TokenStream:
    """The stream of training sequences that `spec` describes.

    Args:
        spec: a folder of tokens, a folder or a list of shards; or a mixture, either path -> weight, or with the fields
            `sources` (name -> path or list), `weights` (name -> weight) and `changes` (a list of `at`, in tokens, and
            `weights`, which hold from the first sequence that begins there or later); or a .json, .toml or .yaml file
            with such a mixture (paths in it are relative to the file).
        seq_len: tokens in a sequence.
        seed: of every order.
        packing: "concat" cuts the tokens into windows, document after document; "best-fit" keeps documents whole that
            fit, and pads.

    Raises:
        UserError: something of this is missing, damaged or does not fit together.
    """
    if seq_len < 1:
        raise UserError(f"seq_len is {seq_len}; it must be 1 or larger")
    if isinstance(spec, (str, Path)) and Path(spec).suffix.lower() in SPEC_FILES and not Path(spec).is_dir():
        spec = read_spec(spec)
    if not isinstance(spec, Mapping):
        return _open_one(spec, seq_len, seed, packing)
    paths, phases = _mixture(spec, seq_len)
    sources = {
        name: _open_one(where, seq_len, _seed_of(seed, name), packing) for name, where in paths.items()
    }  # a seed by name: what is added or left out changes the order of no other
    first_name, first = next(iter(sources.items()))
    for name, source in sources.items():
        if source.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"the sources {first_name!r} and {name!r} were written by two tokenizers "
                f"({first.tokenizer_sha256[:8]} and {source.tokenizer_sha256[:8]}); write one of them again"
            )
    return Mixture(sources, phases, seed)


def read_spec(file: str | Path) -> dict[str, Any]:
    """The mixture that a .json, .toml or .yaml file describes, its paths made relative to nothing.

    Raises:
        UserError: the file cannot be read or holds no mixture.
    """
    file = expanded(file)
    try:
        text = file.read_text()
        if file.suffix.lower() == ".json":
            spec = json.loads(text)
        elif file.suffix.lower() == ".toml":
            import tomllib

            spec = tomllib.loads(text)
        else:
            import yaml

            spec = yaml.safe_load(text)
    except ImportError as error:
        raise UserError(f"reading {file} needs PyYAML: pip install pyyaml, or write it as .toml or .json") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:
        raise UserError(f"{file} is no {file.suffix[1:]}: {str(error).splitlines()[0]}") from error
    if not isinstance(spec, dict):
        raise UserError(f"{file} holds a {type(spec).__name__}; a mixture is a table with 'sources' and 'weights'")
    beside = lambda path: str(file.parent / path)
    move = lambda where: beside(where) if isinstance(where, str) else [beside(path) for path in where]
    if isinstance(spec.get("sources"), dict):
        _check_places(spec["sources"])
        return {**spec, "sources": {name: move(where) for name, where in spec["sources"].items()}}
    if wrong := [path for path in spec if not isinstance(path, str)]:
        raise UserError(f"{file} has {wrong[0]!r} where a path is due; put the name of a folder into quotes")
    return {beside(path): weight for path, weight in spec.items()}


def _check_places(sources: Mapping[str, Any]) -> None:
    for name, where in sources.items():
        places = where if isinstance(where, (list, tuple)) else [where]
        if wrong := [place for place in places if not isinstance(place, (str, Path))]:
            raise UserError(f"the source {name!r} of the mixture is {wrong[0]!r}; it must be a path or a list of paths")


def _open_one(where: Tokens, seq_len: int, seed: int, packing: str) -> Batches | PackedSequences:
    tokens = open_tokens(where)
    if packing == "best-fit":
        return PackedSequences(tokens, seq_len, seed)
    if packing != "concat":
        raise UserError(f"packing is {packing!r}; it is 'concat' or 'best-fit'")
    return Batches(tokens, 1, seq_len, seed)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _mixture(spec: Mapping[str, Any], seq_len: int) -> tuple[dict[str, Tokens], list[tuple[int, Mapping]]]:
    """Paths by name, and (first sequence, weights) of each phase."""
    if not spec:
        raise UserError("the mixture is empty; give it at least one source and its weight")
    if not isinstance(spec.get("sources"), Mapping):
        check_weights(spec, list(spec))
        return {str(path): str(path) for path in spec}, [(0, {str(p): w for p, w in spec.items()})]
    if unknown := sorted(set(spec) - {"sources", "weights", "changes"}, key=str):
        raise UserError(f"a mixture has no field {unknown[0]!r}; its fields are sources, weights, changes")
    paths, weights, changes = dict(spec["sources"]), spec.get("weights"), spec.get("changes", [])
    if not paths:
        raise UserError("the mixture is empty; give it at least one source and its weight")
    _check_places(paths)
    if not isinstance(weights, Mapping):
        raise UserError("the mixture has no weights; give it a field 'weights' with a number for each source")
    if not isinstance(changes, (list, tuple)):
        raise UserError(f"the changes of the mixture are {changes!r}; they must be a list, which may be empty")
    phases, at = [(0, weights)], 0
    for change in changes:
        if not isinstance(change, Mapping) or set(change) != {"at", "weights"}:
            raise UserError(f"a change of the mixture has two fields, 'at' (tokens) and 'weights'; here is {change!r}")
        if not isinstance(change["weights"], Mapping):
            raise UserError(
                f"a change of the mixture has the weights {change['weights']!r}; give it a number for each source"
            )
        if (
            isinstance(change["at"], bool)
            or not isinstance(change["at"], (int, float))
            or change["at"] != change["at"] // 1
        ):
            raise UserError(f"a change of the mixture is at {change['at']!r}; it must be a whole number of tokens")
        if change["at"] > (furthest := seq_len * (BLOCK << _FINE)):
            raise UserError(
                f"a change of the mixture is at {str(change['at'])[:40]}; a mixture of sequences of {seq_len} tokens "
                f"ends at {furthest:,} tokens, so leave the change out"
            )
        first = -(-int(change["at"]) // seq_len)
        if change["at"] <= at or first <= phases[-1][0]:
            raise UserError(
                f"the mixture changes at {change['at']:,} tokens, after a change at {at:,}: list changes in order, at "
                f"least a sequence of {seq_len} tokens apart"
            )
        phases.append((first, change["weights"]))
        at = change["at"]
    for _, weights in phases:
        check_weights(weights, list(paths))
    return paths, phases


def read_ahead(
    stream: TokenStream, shares: Iterable[tuple[int, int]], *, readers: int = 1, ahead: int = 2
) -> Iterator[Batch]:
    """`stream.rows(first, count)` for each share, in order, read by threads while the consumer computes.

    Args:
        shares: (first, count) of what is wanted; may be endless.
        readers: threads; what comes out is the same for any number.
        ahead: batches that are read before they are asked for.
    """
    with ThreadPoolExecutor(readers) as pool:
        pending: deque = deque()
        for first, count in shares:
            pending.append(pool.submit(stream.rows, first, count))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
