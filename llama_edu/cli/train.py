"""`llama-edu train`: a model from your text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_edu.generation import generate
from llama_edu.training.command import run_command

SAMPLE_TOKENS = 60


def train_model(argv: list[str]) -> int:
    """Train a Llama from a configuration file and options; see `llama_edu.training.command`."""
    return run_command(argv, prog="llama-edu train", make_sampler=make_sampler)


train_model.parses_itself = True


def make_sampler(tokenizer: Any) -> Callable[[Any, list[str]], list[str]]:
    """What writes the samples of a run: text drawn at temperature 0.8, always with the same dice."""

    def sample(model: Any, prompts: list[str]) -> list[str]:
        ids = [tokenizer.encode(prompt, bos=tokenizer.bos_id is not None) for prompt in prompts]
        room = model.cfg.max_seq_len - max(map(len, ids))
        stop = tuple(tokenizer.special_tokens.values())
        try:
            new = generate(
                model, ids, max_new_tokens=min(SAMPLE_TOKENS, room), temperature=0.8, top_p=0.95, seed=0, stop_ids=stop
            )
        except ValueError as error:  # a prompt that is too long, weights that are not finite: no reason to stop a run
            return [f"({error})"] * len(prompts)
        return [tokenizer.decode(row) for row in new]

    return sample
