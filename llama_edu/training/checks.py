"""What is checked before a run begins, when it goes on from a checkpoint, and after its first steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_edu.data.stream import TokenStream, open_stream, open_tokens
from llama_edu.data.tokens import TokenFile
from llama_edu.errors import UserError
from llama_edu.training.config import FREE, TrainConfig

__all__ = ["identity", "open_data", "refuse_other"]


def open_data(config: TrainConfig) -> tuple[TokenStream, TokenFile | None]:
    """The training sequences and the validation text. Raises UserError where they do not fit the configuration."""
    stream = open_stream(config.train_data, seq_len=config.seq_len, seed=config.seed, packing=config.packing)
    _fits(str(config.train_data), stream.vocab_size, config)
    largest = max([config.batch_size, *(size for _, size in config.batch_ramp)])
    if stream.n_sequences is not None and stream.n_sequences < largest:
        raise UserError(
            f"the corpus in {config.train_data} has {stream.n_sequences} sequences of {config.seq_len} tokens, less "
            f"than the {largest} of one batch of {largest}: give it more text, or lower batch_size or seq_len"
        )
    if config.val_data is None:
        return stream, None
    val_file = open_tokens(config.val_data)
    _fits(config.val_data, val_file.vocab_size, config)
    if val_file.n_tokens < 2:
        raise UserError(f"val_data {config.val_data} holds {val_file.n_tokens} token; a prediction takes at least two")
    if val_file.tokenizer_sha256 != stream.tokenizer_sha256:
        raise UserError(
            f"val_data {config.val_data} was written with another tokenizer than train_data: write one of them again"
        )
    return stream, val_file


def _fits(path: str, vocab_size: int, config: TrainConfig) -> None:
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"{path} has ids up to {vocab_size - 1}, the model's vocab_size is {config.model.vocab_size}: "
            f"make it at least {vocab_size}"
        )


def identity(config: TrainConfig, stream: TokenStream, precision: str, sequences: int) -> dict[str, Any]:
    """What must be equal for one run to go on where another stopped; the data by the content that was seen."""
    kept = {name: value for name, value in config.to_dict().items() if name not in FREE}
    data = {"train_data": stream.fingerprint(until=sequences), "tokenizer": stream.tokenizer_sha256}
    return json.loads(json.dumps({**kept, "precision": precision, **data}))


def refuse_other(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raise UserError where a checkpoint belongs to another run, with the fields that differ."""

    def flat(d: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in d.items() if k != "model"} | {f"model.{k}": v for k, v in d["model"].items()}

    saved, now = flat(saved), flat(now)
    names = {name for name in saved | now if saved.get(name) != now.get(name)}
    if names & {"seed", "seq_len", "tokenizer"}:  # then the sequences differ as well, which says nothing more
        names.discard("train_data")
    if names:
        differing = [f"{name} {_short(saved.get(name))} (now {_short(now.get(name))})" for name in sorted(names)]
        raise UserError(
            f"{checkpoint} belongs to a run with another configuration: {'; '.join(differing)}; "
            "choose another out_dir, or remove this one"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:12]}...{text[-5:]}"
