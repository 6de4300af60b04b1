"""`llama-edu data`: make token shards from text, or look at tokens and mixtures that are there."""

from __future__ import annotations

from pathlib import Path

from llama_edu.data.build import write_shards
from llama_edu.data.mixture import Mixture
from llama_edu.data.sources import put_aside, read_documents
from llama_edu.data.stream import SPEC_FILES, open_stream, open_tokens
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer


def data(
    source: str | None = None,
    *,
    tokenizer: Path | None = None,
    out: Path = Path("tokens"),
    field: str = "text",
    workers: int | None = None,
    shard_mb: float = 32.0,
    held_out: float = 0.0,
    check: Path | None = None,
    seq_len: int = 2048,
    tokens: float = 0.0,
) -> int:
    """Encode the text of --source into token shards, or check what is there with --check.

    A build that was stopped or killed goes on where it was when the same command is given again.

    Args:
        source: documents: "builtin", a file, a folder, a glob or hf:NAME.
        tokenizer: a tokenizer made with `llama-edu tokenize`, or any tiktoken rank file.
        out: folder of the shards.
        field: where a row of .jsonl, .parquet or a Hub data set has its text.
        workers: processes that encode beside this one; when left out, one for every four cores.
        shard_mb: megabytes of text in a shard.
        held_out: share of the documents for testing; with it, OUT gets two folders, train and val.
        check: a folder of tokens to verify byte by byte, or a .json, .toml or .yaml file with a mixture.
        seq_len: tokens in a sequence, for what --check tells of epochs.
        tokens: of a run, for what --check tells of epochs; 0: once through all there is.
    """
    if not 0 <= tokens <= 1e18:
        raise UserError(f"--tokens is {tokens:g}; it must be 0 (once through all there is) or larger, at most 1e18")
    if seq_len < 1:
        raise UserError(f"--seq-len is {seq_len}; it must be at least 1")
    if not 0 < shard_mb < 1e9:
        raise UserError(f"--shard-mb is {shard_mb:g}; it must be above 0 and below 1e9")
    if (source is None) == (check is None):
        raise UserError("give one of --source SOURCE (make shards of it) and --check FOLDER (look at shards)")
    if check is not None:
        return _check(check, seq_len, tokens)
    if tokenizer is None:
        raise UserError("give --tokenizer FILE; `llama-edu tokenize --train SOURCE` makes one")
    if not 0 <= held_out < 1:
        raise UserError(f"--held-out is {held_out:g}; it must be 0 or larger, and below 1")
    tok = BPETokenizer.load(tokenizer)

    def build(part: Path, aside: bool | None) -> None:
        documents = read_documents(source, field=field)
        if aside is not None:
            documents = (document for document in documents if put_aside(document, held_out) == aside)
        shards = write_shards(documents, tok, part, workers=workers, shard_bytes=int(shard_mb * 1e6), progress=True)
        print(
            f"{part}: {shards.n_tokens:,} tokens in {shards.n_documents:,} documents and {len(shards.shards)} shards, "
            f"{shards.n_bytes / shards.n_tokens:.2f} bytes a token"
        )

    if not held_out:
        build(out, None)
        return 0
    if not any(put_aside(document, held_out) for document in read_documents(source, field=field)):
        raise UserError(
            f"no document of {source} falls into a share of {held_out:g}; raise --held-out or give more text"
        )
    build(out / "train", False)
    build(out / "val", True)
    return 0


def _check(where: Path, seq_len: int, tokens: float) -> int:
    if where.suffix.lower() not in SPEC_FILES or where.is_dir():
        file = open_tokens(where)
        file.verify()
        print(
            f"{where}: {file.n_tokens:,} tokens in {file.n_documents:,} documents, {file.n_bytes:,} bytes of text, "
            f"vocabulary {file.vocab_size:,}, tokenizer {file.tokenizer_sha256[:12]}; every byte is as it was written"
        )
        return 0
    stream = open_stream(where, seq_len=seq_len, seed=0)
    assert isinstance(stream, Mixture)
    for source in stream.sources.values():
        source.token_file.verify()
    total = sum(source.n_sequences for source in stream.sources.values())
    n = int(tokens) // seq_len if tokens else total
    print(f"{n * seq_len:,} tokens, {n:,} sequences of {seq_len}")
    for name, count in stream.drawn(n).items():
        there = stream.sources[name].n_sequences
        print(f"  {name}: {count:,} sequences, {count / n if n else 0:.2%} of the run, {count / there:.2f} epochs")
    return 0
