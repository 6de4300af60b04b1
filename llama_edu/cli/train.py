"""`llama-edu train`: a model from your text."""

from __future__ import annotations

from llama_edu.generation.samples import make_sampler
from llama_edu.training.command import run_command


def train_model(argv: list[str]) -> int:
    """Train a Llama from a configuration file and options; see `llama_edu.training.command`."""
    return run_command(argv, prog="llama-edu train", make_sampler=make_sampler)


train_model.parses_itself = True
