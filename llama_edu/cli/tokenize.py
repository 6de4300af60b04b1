"""`llama-edu tokenize`: train a tokenizer, or see how one cuts a text."""

from __future__ import annotations

import sys
from pathlib import Path

from llama_edu.data import read_documents
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer


def tokenize(
    text: str | None = None,
    *,
    model: Path | None = None,
    train: str | None = None,
    vocab_size: int = 4096,
    out: Path = Path("tokenizer.model"),
) -> int:
    """Train a byte-level BPE tokenizer with --train, or print the tokens of a text with --model.

    Args:
        text: what to cut; standard input when left out.
        model: a tokenizer made with --train, or any tiktoken rank file.
        train: documents to train on: "builtin", a file, a folder, a glob or hf:NAME.
        vocab_size: tokens of the new tokenizer, with <|begin_of_text|> and <|end_of_text|>.
        out: where the new tokenizer is written; a file that is there already is refused.
    """
    if (train is None) == (model is None):
        raise UserError("give one of --train SOURCE (make a tokenizer) and --model FILE (use one)")
    if train is not None:
        if text is not None:
            raise UserError("--train makes a tokenizer and cuts no text: leave the text out, or give --model FILE")
        check_new(out)
        texts = (document.text for document in read_documents(train))
        special = ("<|begin_of_text|>", "<|end_of_text|>")
        tokenizer = BPETokenizer.train(texts, vocab_size, special_tokens=special, progress=True)
        tokenizer.save(out)
        print(f"{out}: {tokenizer.n_vocab} tokens")
        return 0
    tokenizer = BPETokenizer.load(model)
    ids = tokenizer.encode(read_input() if text is None else text)
    for i in ids:
        print(f"{i:>7}  {tokenizer.decode_bytes([i])!r}")
    print(f"{len(ids)} tokens", file=sys.stderr)
    return 0


def check_new(out: Path) -> None:
    """Refuse, before anything is read, a place where no new tokenizer can be written."""
    for file in (out, out.with_name(out.name + ".json")):  # BPETokenizer.save writes both
        if file.exists() or file.is_symlink():
            raise UserError(f"{file} exists already: name another file with --out, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} for {out.name}: make it, or name another file with --out")


def read_input() -> str:
    """The text on standard input."""
    if sys.stdin is None:
        raise UserError("standard input is closed: give a text")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is no {error.encoding} text (byte 0x{error.object[error.start]:02x}): convert it first"
        ) from None
