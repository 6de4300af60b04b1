"""A saved model with its tokenizer, as `generate` and `chat` need them: text in, text out."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llama_edu import Transformer
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer, Llama3Tokenizer, SentencePieceTokenizer

Dtype = Literal["float32", "float16", "bfloat16"]
CacheDtype = Literal["model", "bfloat16", "int8"]

# A text ends at one of these, whatever else the folder says; a new beginning ends it too.
_ENDS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>", "<|begin_of_text|>", "<s>")


@dataclass
class TextModel:
    """A network, its tokenizer, and the ids at which a text ends."""

    network: Transformer
    tokenizer: Any
    stop_ids: frozenset[int]

    @property
    def context(self) -> int:
        return self.network.cfg.max_seq_len

    def encode(self, text: str) -> list[int]:
        """Ids of the beginning of a text."""
        return self.tokenizer.encode(text, bos=getattr(self.tokenizer, "bos_id", None) is not None)


def load(folder: Path, dtype: Dtype | None = None, device: str = "auto") -> TextModel:
    """Read a model folder in the layout of Hugging Face or of Meta, with tokenizer.json or tokenizer.model in it.

    Raises:
        UserError: there is no such folder or device, it lacks a tokenizer, or the two do not belong together.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --model takes the folder of a saved model")
    where = find_device(device)
    tokenizer = load_tokenizer(folder)
    network = Transformer.from_pretrained(folder, dtype=dtype and getattr(torch, dtype), device=where)
    network = network.eval().requires_grad_(False)
    vocab_size = network.cfg.vocab_size
    if tokenizer.n_vocab > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.n_vocab} tokens, the model only {vocab_size}: they do not "
            "belong together"
        )
    return TextModel(network, tokenizer, stops(network, tokenizer))


def find_device(name: str) -> torch.device:
    """The device of a name. Raises UserError for one that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"there is no device {name!r} on this machine; --device takes cpu, cuda or auto") from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder: tokenizer.json, or tokenizer.model of Llama 1, 2 or 3.

    Llama 2's folders hold both; their tokenizer.json is of a kind that is not read here, and tokenizer.model is taken.
    """
    hf = folder / "tokenizer.json"
    file = next((f for f in (folder / "tokenizer.model", folder / "original" / "tokenizer.model") if f.exists()), None)
    if hf.exists():
        try:
            return BPETokenizer.from_hf(hf)
        except UserError:
            if file is None:
                raise
    if file is None:
        raise UserError(f"there is no tokenizer.json and no tokenizer.model in {folder}: a model needs its tokenizer")
    with file.open("rb") as f:
        is_ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", f.readline(4096)) is not None
    if not is_ranks:
        return SentencePieceTokenizer(file)
    if file.with_name(file.name + ".json").exists():  # what BPETokenizer.save wrote: it says itself what is special
        return BPETokenizer.load(file)
    return Llama3Tokenizer(file)


def stops(network: Transformer, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: those the tokenizer and the model's own settings name."""
    special = tokenizer.special_tokens
    own = getattr(network, "generation_config", {}).get("eos_token_id")
    own = own if isinstance(own, list) else [own]
    return frozenset(special[name] for name in _ENDS if name in special) | {i for i in own if isinstance(i, int)}


def print_anything() -> None:
    """Let standard output write what its encoding lacks as \\u escapes: no character of an answer ends a program."""
    if hasattr(sys.stdout, "reconfigure"):  # what replaces it in a test or a notebook may have none
        sys.stdout.reconfigure(errors="backslashreplace")


def for_one(sentence: str) -> str:
    """A sentence about a row of a batch, told to somebody who has one text only."""
    sentence = re.sub(r"^prompt \d+ (?=has|is|holds)", "the prompt ", sentence)
    return re.sub(r"^the logits of (row|request) \d+ ", "the logits ", sentence)


def sampling(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, usual_top_p: float
) -> dict[str, Any]:
    """Options for a Sampler. Without any choice of the user's among the likeliest, the usual top-p is taken."""
    if temperature > 0 and top_k is top_p is min_p is None:
        top_p = usual_top_p
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}


def cache_dtype(name: CacheDtype) -> torch.dtype | None:
    return None if name == "model" else getattr(torch, name)
