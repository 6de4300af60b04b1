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
        out: where the new tokenizer is written.
    """
    if (train is None) == (model is None):
        raise UserError("give one of --train SOURCE (make a tokenizer) and --model FILE (use one)")
    if train is not None:
        texts = (document.text for document in read_documents(train))
        special = ("<|begin_of_text|>", "<|end_of_text|>")
        tokenizer = BPETokenizer.train(texts, vocab_size, special_tokens=special, progress=True)
        tokenizer.save(out)
        print(f"{out}: {tokenizer.n_vocab} tokens")
        return 0
    tokenizer = BPETokenizer.load(model)
    ids = tokenizer.encode(sys.stdin.read() if text is None else text)
    for i in ids:
        print(f"{i:>7}  {tokenizer.decode_bytes([i])!r}")
    print(f"{len(ids)} tokens", file=sys.stderr)
    return 0
