"""`llama-edu train`: a model from your text."""

from __future__ import annotations

from pathlib import Path

from llama_edu import LlamaConfig
from llama_edu.data import TokenFile, held_out, read_documents, tokenizer_hash, write_tokens
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer
from llama_edu.training import TrainConfig, train


def train_model(
    data: str,
    tokenizer: Path,
    out: Path,
    *,
    dim: int = 256,
    n_layers: int = 6,
    n_heads: int = 8,
    n_kv_heads: int = 2,
    seq_len: int = 256,
    batch_size: int = 16,
    steps: int = 1000,
    lr: float = 1e-3,
    warmup: int = 100,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Train a small Llama on text and save it in Hugging Face format. Interrupted, the same command goes on.

    Args:
        data: "builtin", a file, a folder, a glob or hf:NAME.
        tokenizer: a rank file, such as `llama-edu tokenize --train` makes.
        out: folder of the run: tokens/, run/ (metrics and checkpoints) and, at the end, model/.
        dim: width of the model.
        n_layers: blocks of the model.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of n_heads.
        seq_len: tokens in a sequence.
        batch_size: sequences in a step.
        steps: training steps.
        lr: highest learning rate.
        warmup: steps until it is reached.
        seed: seed of the weights and the data order.
        device: "auto", "cpu" or "cuda".
    """
    if not tokenizer.is_file():
        raise UserError(f"there is no tokenizer file {tokenizer}: make one with `llama-edu tokenize --train {data}`")
    tok = BPETokenizer.load(tokenizer)
    config = TrainConfig(
        model=LlamaConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            vocab_size=tok.n_vocab,
            max_seq_len=2 * seq_len,
            tie_embeddings=True,
        ),
        train_data=str(out / "tokens" / "train"),
        val_data=str(out / "tokens" / "held_out"),
        out_dir=str(out / "run"),
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        warmup=warmup,
        eval_every=max(1, steps // 10),
        checkpoint_every=max(1, steps // 10),
        seed=seed,
        device=device,
    )
    parts = [Path(config.train_data), Path(config.val_data)]
    if all(part.exists() for part in parts):
        if TokenFile(parts[0]).tokenizer_sha256 != tokenizer_hash(tok):
            raise UserError(f"{parts[0]} was written with another tokenizer than {tokenizer}; choose another --out")
    else:
        split = held_out(read_documents(data))
        for part, documents in zip(parts, (split.train, split.held_out)):
            if not part.exists():
                write_tokens((d.text for d in documents), tok, part, progress=True)
    result = train(config)
    if result.interrupted:
        return 0
    result.model.save_pretrained(out / "model")
    tok.to_hf(out / "model" / "tokenizer.json")
    print(f"held-out text: {result.bits_per_byte:.3f} bits per byte; the model is in {out / 'model'}")
    return 0
