"""What a training run writes when it is asked for samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_edu.generation.decode import check_prompts, generate

__all__ = ["make_sampler"]

SAMPLE_TOKENS = 60


def make_sampler(tokenizer: Any) -> Callable[[Any, list[str]], list[str]]:
    """The writer of a run's samples: text drawn at temperature 0.8, always with the same dice.

    Args:
        tokenizer: the model's; has `encode`, `decode`, `bos_id` and `special_tokens`.
    """

    def sample(model: Any, prompts: list[str]) -> list[str]:
        ids = [tokenizer.encode(prompt, bos=tokenizer.bos_id is not None) for prompt in prompts]
        texts, rows = [""] * len(ids), []
        for row, prompt in enumerate(ids):
            try:
                check_prompts(model.cfg, [prompt], 1, first=row)
                rows.append(row)
            except ValueError as error:  # too long, for instance: no reason to stop a run
                texts[row] = f"({error})"
        room = model.cfg.max_seq_len - max((len(ids[row]) for row in rows), default=0)
        options = dict(temperature=0.8, top_p=0.95, seed=0, stop_ids=tuple(tokenizer.special_tokens.values()))
        try:
            new = generate(model, [ids[row] for row in rows], max_new_tokens=min(SAMPLE_TOKENS, room), **options)
        except ValueError as error:  # weights that are not finite: no reason either
            return [f"({error})"] * len(prompts)
        for row, text in zip(rows, new):
            texts[row] = tokenizer.decode(text)
        return texts

    return sample
