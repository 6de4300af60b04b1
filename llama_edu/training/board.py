"""The numbers of a run sent to TensorBoard or Weights & Biases, for those who ask for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llama_edu.errors import UserError
from llama_edu.training.config import TrainConfig

__all__ = ["open_boards"]


def open_boards(config: TrainConfig, step: int) -> list[Any]:
    """What `config` asks for; each has `write(entry)` and `close()`.

    Args:
        step: where the run goes on; what a board shows of later steps is no longer true.

    Raises:
        UserError: the package is not installed.
    """
    boards: list[Any] = []
    if config.tensorboard:
        boards.append(_TensorBoard(Path(config.out_dir) / "tensorboard", step))
    if config.wandb:
        boards.append(_WandB(config))
    return boards


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in entry.items() if isinstance(value, (int, float)) and name != "step"}
    return {name: float(value) for name, value in numbers.items()}


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tensorboard is true, but the package is not installed: pip install tensorboard, or leave it out"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, entry: dict[str, Any]) -> None:
        for name, value in _scalars(entry).items():
            self._writer.add_scalar(name, value, entry["step"])
        for number, sample in enumerate(entry.get("samples", [])):
            self._writer.add_text(f"sample {number}", sample["prompt"] + sample["text"], entry["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"wandb is {config.wandb!r}, but the package is not installed: pip install wandb, or leave it out"
            ) from error
        place = Path(config.out_dir).resolve()
        self._run = wandb.init(
            project=config.wandb,
            name=place.name,
            id=hashlib.sha256(str(place).encode()).hexdigest()[:16],  # the same run goes on under the same id
            resume="allow",
            dir=str(place),
            config=config.to_dict(),
        )

    def write(self, entry: dict[str, Any]) -> None:
        self._run.log(_scalars(entry), step=entry["step"])

    def close(self) -> None:
        self._run.finish()
