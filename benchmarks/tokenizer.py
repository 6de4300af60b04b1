"""Tokenizers side by side, in one run, on text that is on every machine: training and encoding.

    python benchmarks/tokenizer.py [--megabytes 33] [--vocab-size 32768] [--repeat 5]

The corpus is the interpreter's own documentation and library, and as much of the installed packages as is needed. Every
tokenizer reads the same list of texts, under Llama 3's pattern and with its own threads; ours compiles before the clock
starts, and the time of that is printed apart. A peer that is not installed is left out with a line. The educational
trainers (tiktoken's, minbpe's algorithm) would take days for the whole job; they run a small one, and so
do we beside them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import regex

from llama_edu.data import read_documents
from llama_edu.tokenizer import LLAMA3_PATTERN, BPETokenizer


def corpus(megabytes: float) -> list[str]:
    texts, size = [], 0
    folders = ["builtin", *(p for p in map(Path, sys.path) if p.name in ("site-packages", "dist-packages"))]
    for folder in folders:
        if folder == "builtin":
            found = (d.text for d in read_documents("builtin"))
        else:
            found = (p.read_text(errors="ignore") for p in sorted(folder.rglob("*.py")) if p.stat().st_size < 1 << 20)
        for text in found:
            texts.append(text)
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return texts
    return texts


def clock(repeat: int, **jobs: Callable) -> dict[str, float]:
    """Median seconds of each job, the jobs taking turns, so that a busy machine is busy for all."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeat):
        for name, job in jobs.items():
            gc.collect()
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, seconds: dict[str, float], size: float) -> None:
    ours = seconds["llama_edu"]
    print(f"\n{title}\n\n| | seconds | MB/s | ours is faster by |\n|---|---|---|---|")
    for name, t in seconds.items():
        print(f"| {name} | {t:.3f} | {size / t / 1e6:.1f} | {t / ours:.1f} |")


def installed(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        print(f"{name} is not installed; left out (pip install {name})")
        return False
    return True


def hf_trainer(texts: list[str], vocab_size: int) -> Callable:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    def train() -> None:
        peer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        peer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        how = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        peer.train_from_iterator(texts, how)

    return train


def rustbpe_trainer(texts: list[str], vocab_size: int) -> Callable:
    import rustbpe

    return lambda: rustbpe.Tokenizer().train_from_iterator(iter(texts), vocab_size, pattern=LLAMA3_PATTERN)


def minbpe_trainer(text: str, vocab_size: int) -> None:
    """minbpe's algorithm, in our words: all pairs of all pre-tokens counted again before every merge."""
    pieces = [list(p.encode()) for p in regex.findall(LLAMA3_PATTERN, text)]
    for new in range(256, vocab_size):
        counts: dict[tuple[int, int], int] = {}
        for ids in pieces:
            for pair in pairwise(ids):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=counts.__getitem__)
        merged = []
        for ids in pieces:
            out, i = [], 0
            while i < len(ids):
                both = i + 1 < len(ids) and ids[i] == best[0] and ids[i + 1] == best[1]
                out.append(new if both else ids[i])
                i += 1 + both
            merged.append(out)
        pieces = merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=33)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()

    texts = corpus(args.megabytes)
    size = sum(len(t.encode()) for t in texts)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{size / 1e6:.1f} MB in {len(texts)} texts, vocabulary {args.vocab_size}, {os.cpu_count()} cores{load}")
    start = time.perf_counter()
    BPETokenizer.train(texts[:3], 300).encode_batch(["a"])
    print(f"import of the kernels, compiled or from disk: {time.perf_counter() - start:.1f} s")

    small = "".join(texts)[:100_000]
    from tiktoken._educational import bpe_train

    jobs = {
        "llama_edu": lambda: BPETokenizer.train([small], 300),
        "tiktoken_educational": lambda: bpe_train(small, 300, LLAMA3_PATTERN, visualise=None),
        "minbpe_algorithm": lambda: minbpe_trainer(small, 300),
    }
    table("Training, 0.1 MB, 300 tokens", clock(1, **jobs), len(small.encode()))

    jobs = {"llama_edu": lambda: BPETokenizer.train(texts, args.vocab_size)}
    if installed("tokenizers"):
        jobs["tokenizers"] = hf_trainer(texts, args.vocab_size)
    if installed("rustbpe"):
        jobs["rustbpe"] = rustbpe_trainer(texts, args.vocab_size)
    table(f"Training, {size / 1e6:.0f} MB, {args.vocab_size} tokens", clock(args.repeat, **jobs), size)

    tok = BPETokenizer.train(texts, args.vocab_size)
    threads = os.cpu_count() or 1
    assert tok.encode_batch(texts) == tok.encoding.encode_ordinary_batch(texts, num_threads=threads), "ids differ"
    jobs = {
        "llama_edu": lambda: sum(map(len, tok.encode_corpus(texts))),
        "llama_edu_as_lists": lambda: tok.encode_batch(texts),
        "tiktoken": lambda: tok.encoding.encode_ordinary_batch(texts, num_threads=threads),
    }
    if installed("tokenizers"):
        import tokenizers

        with tempfile.TemporaryDirectory() as folder:
            tok.to_hf(Path(folder) / "tokenizer.json")
            peer = tokenizers.Tokenizer.from_str((Path(folder) / "tokenizer.json").read_text())
        jobs["tokenizers"] = lambda: peer.encode_batch_fast(texts)
    table(f"Encoding, {size / 1e6:.0f} MB, identical ids", clock(args.repeat, **jobs), size)


if __name__ == "__main__":
    main()
