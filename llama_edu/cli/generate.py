"""`llama-edu generate`: continue a prompt with a saved model."""

from __future__ import annotations

import sys
from pathlib import Path

from llama_edu import Transformer, generate
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer


def generate_text(
    model: Path,
    prompt: str | None = None,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
) -> int:
    """Continue a prompt, printing text as it comes.

    Args:
        model: folder of a saved model with its tokenizer.json (`llama-edu tour` makes one).
        prompt: text to go on from; standard input when left out.
        max_new_tokens: most tokens to add.
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: the same seed draws the same text.
    """
    file = model / "tokenizer.json"
    if not file.exists():
        raise UserError(f"there is no {file}: a saved model needs its tokenizer beside it")
    tokenizer = BPETokenizer.from_hf(file)
    network = Transformer.from_pretrained(model).eval()
    ids = tokenizer.encode(sys.stdin.read() if prompt is None else prompt, bos=True)
    draw = {} if temperature == 0 else {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    stop = tuple(tokenizer.special_tokens.values())
    text = tokenizer.stream()
    for _, token in generate(network, [ids], max_new_tokens=max_new_tokens, stop_ids=stop, stream=True, **draw):
        print(text.push(token), end="", flush=True)
    print(text.finish())
    return 0
