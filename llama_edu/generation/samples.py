"""What a training run writes when it is asked for samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_edu.generation.decode import generate

__all__ = ["make_sampler"]

SAMPLE_TOKENS = 60


def make_sampler(tokenizer: Any) -> Callable[[Any, list[str]], list[str]]:
    """The writer of a run's samples: text drawn at temperature 0.8, always with the same dice.

    Args:
        tokenizer: the model's; has `encode`, `decode`, `bos_id` and `special_tokens`.
    """

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
