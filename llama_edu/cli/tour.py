"""`llama-edu tour`: raw text in, generated text out, every floor of the house on the way."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.cli import report
from llama_edu.data import Split, TokenFile, held_out, read_documents, write_tokens
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer
from llama_edu.training import TrainConfig, train
from llama_edu.training.utilisation import keep_freed_memory

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")
PROMPT_TOKENS = 32
SAMPLE_TOKENS = 160
# lzma looks back at most this far; longer training texts are read from here to their end.
LZMA_WINDOW = 1 << 26


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a tour. Kept in tour.json: another tour in the same folder is refused."""

    data: str
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    batch_size: int
    steps: int
    lr: float
    seed: int


def tour(
    data: str = "builtin",
    out: Path = Path("tour"),
    vocab_size: int = 2048,
    dim: int = 128,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    seq_len: int = 256,
    batch_size: int = 4,
    steps: int = 3500,
    lr: float = 6e-3,
    seed: int = 0,
) -> int:
    """Train a tokenizer and a small Llama on real text, and let it write.

    Interrupted, it goes on from its last checkpoint when the same command runs again, and ends with the same weights.

    Args:
        data: "builtin" (this interpreter's own documentation and library: no download), a file, a folder or a glob of
            .txt .md .jsonl .parquet (also .gz, .zst), or hf:NAME for a Hub data set.
        out: folder for everything that is made.
        vocab_size: tokens in the vocabulary, special ones included.
        dim: width of the model.
        n_layers: blocks of the model.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of n_heads.
        seq_len: tokens in a training sequence.
        batch_size: sequences in a step.
        steps: training steps.
        lr: highest learning rate.
        seed: seed of the weights, the data order and the samples.
    """
    settings = Settings(data, vocab_size, dim, n_layers, n_heads, n_kv_heads, seq_len, batch_size, steps, lr, seed)
    started = time.perf_counter()
    cfg = LlamaConfig(  # what cannot be is refused before anything is read or written
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab_size,
        max_seq_len=max(2 * seq_len, PROMPT_TOKENS + SAMPLE_TOKENS),
        tie_embeddings=True,
    )
    config = TrainConfig(
        model=cfg,
        train_data=str(out / "tokens" / "train"),
        val_data=str(out / "tokens" / "held_out"),
        out_dir=str(out / "run"),
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        warmup=min(steps // 10, 100),
        eval_every=max(1, steps // 10),
        checkpoint_every=max(1, steps // 10),
        seed=seed,
    )
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise UserError(
            f"vocab_size is {vocab_size}; 256 bytes and {len(SPECIAL)} special tokens need at least {least}"
        )
    say = Steps(6)

    say(f"reading {data}")
    split = held_out(read_documents(data))
    sizes = [sum(len(d.text.encode()) for d in part) for part in (split.train, split.held_out)]
    print(
        f"      {len(split.train)} documents, {sizes[0]:,} bytes to learn from; {sizes[1]:,} bytes put aside",
        flush=True,
    )
    claim(out, settings, split)

    say(f"training a tokenizer of {vocab_size} tokens")
    tokenizer = make_tokenizer(out / "tokenizer.model", split, vocab_size)
    shards = [
        make_tokens(out / "tokens" / name, part, tokenizer)
        for name, part in (("train", split.train), ("held_out", split.held_out))
    ]
    print(
        f"      {sizes[0] / shards[0].n_tokens:.2f} bytes a token; {shards[0].n_tokens:,} tokens to learn from",
        flush=True,
    )

    say("two baselines on the held-out text")
    baselines = make_baselines(out / "baselines.json", split, shards)
    for name, value in baselines.items():
        print(f"      {value:.3f} bits per byte  {name}", flush=True)

    say(f"pretraining a Llama of {cfg.num_parameters():,} parameters for {steps} steps")
    keep_freed_memory()
    result = train(config)
    if result.interrupted:
        print("interrupted; everything so far is kept: run the same command again to go on", flush=True)
        return 0
    model = result.model.eval()

    say("writing through the KV cache, saving, loading back")
    samples = write_samples(model, tokenizer, shards[1], seed)
    model.save_pretrained(out / "model")
    tokenizer.to_hf(out / "model" / "tokenizer.json")
    check_saved(out / "model", model, shards[1])

    say("writing the report")
    bits = {"this model": result.bits_per_byte, **baselines}
    write(out / "report.html", settings, cfg, tokenizer, shards, result, bits, samples)
    summary(out, model, bits, samples, time.perf_counter() - started)
    return 0


class Steps:
    """Numbered headings on standard output."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def __call__(self, what: str) -> None:
        self.done += 1
        print(f"[{self.done}/{self.total}] {what}", flush=True)


def read_kept(file: Path) -> dict[str, Any]:
    """A JSON object that an earlier run of this tour wrote."""
    try:
        kept = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object; remove its folder, or choose another --out")
    return kept


def claim(out: Path, settings: Settings, split: Split) -> None:
    """Make the folder this tour's own, or raise UserError where it holds another's."""
    fingerprint = hashlib.sha256()
    for part in (split.train, split.held_out):
        for document in part:
            fingerprint.update(document.text.encode("utf-8", "surrogatepass") + b"\0")
        fingerprint.update(b"\1")
    now = {**asdict(settings), "corpus_sha256": fingerprint.hexdigest()}
    file = out / "tour.json"
    if file.exists():
        before = read_kept(file)
        changed = [
            f"{key} {before.get(key)!r} (now {value!r})" for key, value in now.items() if before.get(key) != value
        ]
        if changed:
            raise UserError(f"{out} holds a tour with other settings: {'; '.join(changed)}; choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no tour; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(now, indent=1))
    temporary.replace(file)


def make_tokenizer(path: Path, split: Split, vocab_size: int) -> BPETokenizer:
    if path.exists():
        return BPETokenizer.load(path)
    tokenizer = BPETokenizer.train((d.text for d in split.train), vocab_size, special_tokens=SPECIAL, progress=True)
    tokenizer.save(path)
    return tokenizer


def make_tokens(path: Path, documents: list, tokenizer: BPETokenizer) -> TokenFile:
    if path.exists():
        return TokenFile(path)
    return write_tokens((d.text for d in documents), tokenizer, path, progress=True)


def make_baselines(path: Path, split: Split, shards: list[TokenFile]) -> dict[str, float]:
    """Bits per byte of the held-out text: counting tokens, and a compressor that has read the training text or not."""
    if path.exists():
        return read_kept(path)
    seen, new = ("\n".join(d.text for d in part).encode() for part in (split.train, split.held_out))
    seen = seen[-LZMA_WINDOW:]
    with tqdm(desc="lzma", total=2 * (len(seen) + len(new)), unit="B", unit_scale=True, disable=None) as bar:
        with ThreadPoolExecutor() as pool:  # lzma releases the interpreter's lock
            alone, before, both = pool.map(lambda text: lzma_size(text, bar), (new, seen, seen + new))
    found = {
        "lzma, having read the training text": 8 * (both - before) / len(new),
        "lzma": 8 * alone / len(new),
        "unigram model over the same tokens": unigram_bits(*shards) / shards[1].n_bytes,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)
    return found


def lzma_size(text: bytes, bar: tqdm) -> int:
    """Bytes of `text` compressed, piece by piece so that the bar moves."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": LZMA_WINDOW}]
    compressor, size = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters), 0
    for start in range(0, len(text), 1 << 18):
        piece = text[start : start + (1 << 18)]
        size += len(compressor.compress(piece))
        bar.update(len(piece))
    return size + len(compressor.flush())


def unigram_bits(seen: TokenFile, new: TokenFile) -> float:
    """Bits of `new` under the token frequencies of `seen`, each count plus one."""
    counts = np.bincount(seen.tokens, minlength=seen.vocab_size) + 1
    return float(-np.log2(counts / counts.sum())[new.tokens].sum())


def prompts_from(shard: TokenFile, n: int) -> list[list[int]]:
    """Pieces of the held-out text, which the model has not seen: how its longest documents begin, or, where it has
    fewer than `n`, pieces from evenly spaced places."""
    lengths = np.diff(shard.documents)
    if len(lengths) >= n:
        starts = np.sort(shard.documents[np.argsort(-lengths, kind="stable")[:n]])
    else:
        starts = np.arange(n) * max(0, shard.n_tokens - PROMPT_TOKENS) // n
    return [shard.tokens[start : start + PROMPT_TOKENS].tolist() for start in starts]


def write_samples(model: Transformer, tokenizer: BPETokenizer, shard: TokenFile, seed: int) -> list[report.Sample]:
    prompts = prompts_from(shard, 3)
    stop = (tokenizer.special_tokens[SPECIAL[1]],)
    answers = []
    for how, options in (
        ("greedy", {}),
        ("drawn at temperature 0.8, top-p 0.95", {"temperature": 0.8, "top_p": 0.95, "seed": seed}),
    ):
        ids = generate(model, prompts, max_new_tokens=SAMPLE_TOKENS, stop_ids=stop, **options)
        answers += [report.Sample(plain(tokenizer, p), plain(tokenizer, a), how) for p, a in zip(prompts, ids)]
    return answers


def plain(tokenizer: BPETokenizer, ids: list[int]) -> str:
    """The text of ids, special tokens left out."""
    special = set(tokenizer.special_tokens.values())
    return tokenizer.decode([i for i in ids if i not in special])


def check_saved(folder: Path, model: Transformer, shard: TokenFile) -> None:
    """Raise unless the model loaded from `folder` says what `model` says, to the last bit."""
    loaded = Transformer.from_pretrained(folder).eval()
    prompts = prompts_from(shard, 2)
    with torch.inference_mode():
        tokens = torch.tensor(prompts[:1])
        if not torch.equal(model(tokens), loaded(tokens)):
            raise RuntimeError(f"the model loaded from {folder} gives other logits than the one that was saved")
    if generate(model, prompts, max_new_tokens=32) != generate(loaded, prompts, max_new_tokens=32):
        raise RuntimeError(f"the model loaded from {folder} writes another text than the one that was saved")
    print(f"      {folder} was loaded back and says the same, to the last bit", flush=True)


class Recorder(torch.nn.Module):
    """Stands in for a layer's inner attention and keeps the weights it would mix with."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.weights = inner, torch.empty(0)

    def forward(self, q, k, v, mask=None):
        k_all = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q.float() @ k_all.float().mT / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        self.weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.inner(q, k, v, mask)


@torch.inference_mode()
def attention_of_one_head(model: Transformer, tokens: list[int]) -> tuple[np.ndarray, int, int]:
    """(weights, layer, head) of the head that looks back most: away from itself and from the first token."""
    recorders = []
    for layer in model.layers.values():
        layer.attention.inner = Recorder(layer.attention.inner)
        recorders.append(layer.attention.inner)
    try:
        model(torch.tensor([tokens]))
    finally:
        for layer in model.layers.values():
            layer.attention.inner = layer.attention.inner.inner
    weights = torch.stack([r.weights[0] for r in recorders])  # layer, head, query, key
    away = 1 - weights.diagonal(dim1=-2, dim2=-1).mean(-1) - weights[..., 0].mean(-1)
    layer, head = divmod(int(away.argmax()), weights.shape[1])
    return weights[layer, head].numpy(), layer, head


def write(
    path: Path,
    settings: Settings,
    cfg: LlamaConfig,
    tokenizer: BPETokenizer,
    shards: list[TokenFile],
    result: Any,
    bits: dict[str, float],
    samples: list[report.Sample],
) -> None:
    history = result.history
    evaluated = [(h["step"], h["val_loss"]) for h in history if h.get("val_loss") is not None]
    ids = prompts_from(shards[1], 1)[0]
    weights, layer, head = attention_of_one_head(result.model, ids)
    labels = [repr(tokenizer.decode([i]))[1:-1] for i in ids]
    counts = np.bincount(shards[0].tokens, minlength=cfg.vocab_size)
    regular = [i for i in range(cfg.vocab_size) if i not in set(tokenizer.special_tokens.values())]
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in regular])
    speed = [h["tokens_per_second"] for h in history]
    density = shards[0].n_bytes / shards[0].n_tokens
    report.write_report(
        path,
        title="A tour of llama_edu",
        summary=[
            ("corpus", f"{settings.data}: {shards[0].n_bytes:,} bytes to learn from, {shards[1].n_bytes:,} held out"),
            ("tokenizer", f"byte-level BPE, {cfg.vocab_size:,} tokens, one for {density:.2f} bytes of text"),
            (
                "model",
                f"{cfg.num_parameters():,} parameters: {cfg.n_layers} layers, width {cfg.dim}, {cfg.n_heads} query and "
                f"{cfg.n_kv_heads} key/value heads, SwiGLU of {cfg.ffn_dim}",
            ),
            (
                "training",
                f"{settings.steps} steps of {settings.batch_size} x {settings.seq_len} tokens, "
                f"{settings.steps * settings.batch_size * settings.seq_len:,} in all",
            ),
            ("speed", f"{float(np.median(speed)):,.0f} tokens a second (median of the steps)"),
            ("weights", f"sha256 {weights_sha256(result.model)}"),
        ],
        scores=sorted(((k, v) for k, v in bits.items()), key=lambda kv: kv[1]),
        figures=[
            report.training_figure(
                [h["step"] for h in history],
                [math.nan if h["loss"] is None else h["loss"] for h in history],  # None: a skipped step
                [h["lr"] for h in history],
                speed,
                ([s for s, _ in evaluated], [v for _, v in evaluated]),
            ),
            report.token_figure(lengths, counts[regular]),
            report.attention_figure(weights, labels, f"layer {layer}, head {head}"),
        ],
        samples=samples,
        notes=[
            "The held-out text was chosen before training and never trained on.",
            "The model is charged for every token of the held-out text, each sequence read from its own start.",
            f"torch {torch.__version__.split('+')[0]}, {torch.get_num_threads()} threads, seed {settings.seed}.",
        ],
    )


def weights_sha256(model: Transformer) -> str:
    """One hash for all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def summary(
    out: Path, model: Transformer, bits: dict[str, float], samples: list[report.Sample], seconds: float
) -> None:
    drawn = samples[-1]
    print("\nheld-out text, bits per byte (lower is better):")
    for name, value in sorted(bits.items(), key=lambda kv: kv[1]):
        print(f"  {value:.3f}  {name}")
    print(f"\na sample, {drawn.how}:\n{drawn.prompt}|{drawn.answer}\n")
    print(f"done in {seconds:.0f} s; weights sha256 {weights_sha256(model)[:16]}")
    for name, what in (
        ("report.html", "the report: figures, comparison, samples"),
        ("model/", "the model in Hugging Face format, with its tokenizer"),
        ("run/metrics.jsonl", "every training step"),
        ("tokenizer.model", "the tokenizer as a tiktoken rank file"),
    ):
        print(f"  {out / name}  {what}")
    command = "llama-edu" if shutil.which("llama-edu") else os.path.relpath(Path(sys.executable).with_name("llama-edu"))
    print("\nwhat to try next:")
    print(f"  {command} generate --model {out / 'model'} --prompt 'def '")
    print(f"  {command} tour --data YOUR_TEXT.txt --out another-tour")
    print("  make lab        the lessons, starting with 00_llama_family")
