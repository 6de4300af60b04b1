"""A run from the command line, on one device or many: tokens, training, the saved model, the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama_edu.data.sources import held_out, read_documents
from llama_edu.data.stream import open_stream, open_tokens
from llama_edu.data.tokens import tokenizer_hash, write_tokens
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer
from llama_edu.training.config import Arguments, TrainConfig, parse_arguments
from llama_edu.training.engine import Engine, agreed
from llama_edu.training.loop import train
from llama_edu.training.report import write_report
from llama_edu.training.result import Sampler
from llama_edu.training.utilisation import keep_freed_memory

__all__ = ["SHORT", "Source", "run_command"]

ABOUT = (
    "Train a Llama on text, or on tokens, and save it in Hugging Face format. Interrupted, the same command goes on. "
    "What is left out has a default that suits a small model; with --config FILE a YAML, TOML or JSON file says it, "
    "and options win over the file."
)
# Shapes may be said without "model.".
SHORT = MappingProxyType({name: f"model.{name}" for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")})


@dataclass(frozen=True)
class Source:
    """Where a run begins.

    Args:
        data: text ("builtin", a file, a folder, a glob or hf:NAME), or a folder of tokens.
        tokenizer: a rank file, such as `llama-edu tokenize --train` makes; needed for text.
        out: folder of all that is made: tokens/, run/ (metrics, checkpoints, report) and, at the end, model/.
    """

    data: str | None = None
    tokenizer: Path | None = None
    out: Path | None = None


def run_command(
    argv: Sequence[str],
    *,
    prog: str = "llama-edu train",
    sections: Mapping[str, type] = MappingProxyType({}),
    make_engine: Callable[[Mapping[str, Any]], Engine] | None = None,
    make_sampler: Callable[[Any], Sampler] | None = None,
) -> int:
    """What `llama-edu train` does. Returns the exit code.

    Args:
        sections: see `parse_arguments`.
        make_engine: from the filled sections, the engine of this rank; None: one device.
        make_sampler: from a tokenizer, what writes the samples of a run.

    Raises:
        UserError: a mistake of the user's.
    """
    arguments = parse_arguments(argv, sections=sections, options=[Source], short=SHORT, prog=prog, about=ABOUT)
    source = arguments.fill(Source)
    engine = Engine() if make_engine is None else make_engine(arguments.sections)
    tokenizer = _tokenizer(source)
    with agreed(engine):
        if engine.rank == 0:
            _make_tokens(source, arguments, tokenizer)
    config = _config(source, arguments, tokenizer)
    sampler = None if make_sampler is None or tokenizer is None else make_sampler(tokenizer)
    if config.sample_every and sampler is None:
        raise UserError("samples take a tokenizer: give --tokenizer, or leave out sample_every")
    keep_freed_memory()  # this process does nothing but train
    result = train(config, engine=engine, sampler=sampler, inform=_say)
    if result.interrupted:
        return 0
    model, out = engine.whole(result.model, config), source.out or Path(config.out_dir)
    if engine.rank == 0:
        model.save_pretrained(out / "model")
        if tokenizer is not None:
            tokenizer.to_hf(out / "model" / "tokenizer.json")
        report = write_report(config.out_dir)
        score = "" if result.bits_per_byte is None else f"held-out text: {result.bits_per_byte:.3f} bits per byte; "
        print(f"{score}the model is in {out / 'model'}; the report is {report}")
    return 0


def _say(sentence: str) -> None:
    """On standard output, beside a progress bar."""
    from tqdm import tqdm

    tqdm.write(sentence)


def _tokenizer(source: Source) -> BPETokenizer | None:
    if source.tokenizer is None:
        return None
    if not source.tokenizer.is_file():
        made = f"`llama-edu tokenize --train {source.data or 'SOURCE'}`"
        raise UserError(f"there is no tokenizer file {source.tokenizer}: make one with {made}")
    return BPETokenizer.load(source.tokenizer)


def _is_tokens(data: str) -> bool:
    folder = Path(data).expanduser()
    return folder.is_dir() and ((folder / "meta.json").exists() or any(folder.glob("[!.]*/meta.json")))


def _parts(source: Source) -> tuple[Path, Path]:
    return source.out / "tokens" / "train", source.out / "tokens" / "held_out"


def _make_tokens(source: Source, arguments: Arguments, tokenizer: BPETokenizer | None) -> None:
    """Encode text into out/tokens, unless that is done. Raises UserError where the options say too little."""
    if source.out is None and "out_dir" not in arguments.values:
        raise UserError("--out is not given: the folder of all that the run makes")
    if "train_data" in arguments.values:
        if source.data is not None:
            raise UserError("data and train_data are both given: text or tokens, choose one")
        return
    if source.data is None:
        raise UserError("--data is not given: text, or a folder of tokens")
    if _is_tokens(source.data):
        return
    if tokenizer is None or source.out is None:
        missing = "--tokenizer" if tokenizer is None else "--out"
        raise UserError(f"{missing} is not given, and {source.data} is text: it is encoded into OUT/tokens")
    parts = _parts(source)
    if all(part.exists() for part in parts):
        if open_tokens(parts[0]).tokenizer_sha256 != tokenizer_hash(tokenizer):
            raise UserError(
                f"{parts[0]} was written with another tokenizer than {source.tokenizer}; choose another --out"
            )
        return
    split = held_out(read_documents(source.data))
    for part, documents in zip(parts, (split.train, split.held_out)):
        if not part.exists():
            write_tokens((d.text for d in documents), tokenizer, part, progress=True)


def _config(source: Source, arguments: Arguments, tokenizer: BPETokenizer | None) -> TrainConfig:
    """What was given, and for the rest what suits a small model."""
    values = arguments.values
    steps, seq_len = values.get("steps", 1000), values.get("seq_len", 256)
    low: dict[str, Any] = {"steps": steps, "seq_len": seq_len, "lr": 1e-3, "warmup": min(100, steps // 10)}
    low |= {"eval_every": max(1, steps // 10), "checkpoint_every": max(1, steps // 10)}
    low |= {"async_checkpoint": True, "mfu": True}
    if tokenizer is not None and not ({"sample_every", "sample_prompts"} & set(values) or values.get("compile")):
        low |= {"sample_every": max(1, steps // 4), "sample_prompts": ("The ",)}
    if source.out is not None:
        low["out_dir"] = str(source.out / "run")
    if "train_data" not in values:
        if _is_tokens(source.data):
            low["train_data"] = source.data
        else:
            low["train_data"], low["val_data"] = map(str, _parts(source))
    data = values.get("train_data", low.get("train_data"))
    stream = open_stream(data, seq_len=seq_len, seed=0, packing=values.get("packing", "concat"))
    if tokenizer is not None and stream.tokenizer_sha256 != tokenizer_hash(tokenizer):
        raise UserError(f"{data} was written with another tokenizer than {source.tokenizer}: give the one it was")
    shape = {"dim": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 2, "tie_embeddings": True}
    if "model" in arguments.in_files:  # a table that describes a model means the same wherever it is read
        shape = {}
    low["model"] = {**shape, "vocab_size": stream.vocab_size, "max_seq_len": 2 * seq_len}
    return arguments.config(low)
