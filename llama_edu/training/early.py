"""What the beginning of a run tells: whether the data suffice, whether the first loss is that of a model that knows
nothing, whether the run diverges at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llama_edu.data.stream import TokenStream
from llama_edu.errors import UserError
from llama_edu.training.config import TrainConfig
from llama_edu.training.schedule import batch_size_at

__all__ = ["Watch", "epochs_line", "sequences_of"]

MANY_EPOCHS = 4  # beyond them repeated text teaches little (Muennighoff et al., arXiv 2305.16264)


def sequences_of(config: TrainConfig) -> int:
    """How many sequences the steps of a run read, its ramp included."""
    sequences = step = 0
    for end in (*(at for at, _ in config.batch_ramp), math.inf):
        size = batch_size_at(sequences * config.seq_len, config.batch_size, config.batch_ramp)
        left = config.steps - step
        if end < math.inf:
            left = min(left, max(0, math.ceil((end - sequences * config.seq_len) / (size * config.seq_len))))
        step, sequences = step + left, sequences + left * size
    return sequences


def epochs_line(config: TrainConfig, stream: TokenStream) -> str:
    """How often the run reads its text, in one line."""
    wanted = sequences_of(config)
    line = f"the run reads {wanted:,} sequences of {config.seq_len} tokens"
    if stream.n_sequences is None:
        return f"{line} from a mixture"
    epochs = wanted / stream.n_sequences
    line += f", {epochs:.2f} epochs of the {stream.n_sequences:,} in the data"
    return line if epochs <= MANY_EPOCHS else f"{line}: beyond {MANY_EPOCHS} epochs repeated text teaches little"


class Watch:
    """Looks at the first steps of a run that begins with fresh weights.

    Args:
        inform: takes a sentence that is good to know.
        warn: takes a sentence that should be read.
    """

    def __init__(self, config: TrainConfig, inform: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self.config, self.inform, self.warn = config, inform, warn
        self.uniform = math.log(config.model.vocab_size)
        self.tolerance = 0.5 + 0.1 * self.uniform
        self.until = 100 + 2 * config.warmup
        self.too_high, self.last = 0, ""

    def look(self, entry: dict[str, Any]) -> None:
        """Take in the metrics of a step. Raises UserError where the run has diverged."""
        if entry["step"] == 1:
            self._first(entry)
        if entry["step"] > self.until:
            return
        if entry["loss"] > 2 * self.uniform:
            self.last = f"{entry['loss']:.1f} at step {entry['step']}"
            self.too_high = 3 if entry["loss"] > 10 * self.uniform else self.too_high + 1
        elif not entry["skipped"]:  # what is not finite after a loss that was too high is no better
            self.too_high = 0
        elif self.too_high:
            self.too_high += 1
        if self.too_high >= 3:
            raise UserError(
                f"the run diverges: the loss is {self.last}, and a model that knows nothing has {self.uniform:.2f}; "
                f"lower lr (now {self.config.lr}), to a tenth to begin with, or lengthen warmup (now "
                f"{self.config.warmup})"
            )

    def _first(self, entry: dict[str, Any]) -> None:
        expected = f"log V = {self.uniform:.2f} is expected of fresh weights, within {self.tolerance:.2f}"
        if entry["skipped"]:
            self.warn("the first loss or its gradient is not finite: the model cannot learn from the start")
        elif abs(entry["loss"] - self.uniform) > self.tolerance:
            self.warn(f"the first loss is {entry['loss']:.2f}; {expected}: look at the weights and the targets")
        else:
            self.inform(
                f"the first loss is {entry['loss']:.2f} ({expected}), the gradient has norm {entry['grad_norm']:.2f}"
            )
