"""The numbers of a run, step by step: a file of lines always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_edu.errors import UserError

__all__ = ["Metrics", "read_metrics"]


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, up to one that is damaged: the one being written when the program was killed."""
    path = Path(path)
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            entry["step"] += 0
        except (ValueError, KeyError, TypeError):
            return
        yield entry


class Metrics:
    """`metrics.jsonl`: one line a step, each step once, however often the run was interrupted.

    What the disk refuses in the course of a run is kept until all ranks are told: `failed`, then `check`.

    Attributes:
        history: its lines.
    """

    def __init__(self, folder: Path | None, keep: int, *, rewinds: int = 0, boards: Sequence[Any] = ()) -> None:
        """Open the file in `folder` (None: only remember), dropping lines after step `keep` and what is damaged.

        Args:
            rewinds: how many there were up to step `keep`; lines that later ones discarded are dropped.
            boards: take each line as well.

        Raises:
            UserError: the file cannot be read or written.
        """
        self.file, self.boards = None, boards
        self._error: OSError | None = None
        self.history: list[dict[str, Any]] = []
        if folder is None:
            return
        self.path = folder / "metrics.jsonl"
        self.discarded = self.path.with_name("discarded.jsonl")
        self._try(lambda: self._open(keep, rewinds))
        self.check()

    def _open(self, keep: int, rewinds: int) -> None:
        self.history = [line for line in read_metrics(self.path) if line["step"] <= keep]
        if self.discarded.exists():
            self._discard(rewinds, [])
        self._rewrite()

    def _try(self, write: Callable[[], None]) -> None:
        if self._error is None:
            try:
                write()
            except OSError as error:
                self._error = error

    @property
    def failed(self) -> bool:
        """The disk has refused something; `check` raises its sentence."""
        return self._error is not None

    def check(self) -> None:
        """Raise what went wrong on the disk."""
        if self._error is not None:
            reason = self._error.strerror or self._error
            raise UserError(
                f"{self.path} could not be written: {reason}; make room for it, and the same run goes on from its "
                "newest checkpoint"
            ) from self._error

    def _rewrite(self) -> None:
        """The file as the history is: whole before and after."""
        if self.file is not None:
            self.file.close()
        self._replace(self.path, self.history)
        self.file = open(self.path, "a")

    def _replace(self, path: Path, entries: Sequence[dict[str, Any]]) -> None:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(self._line(entry) for entry in entries))
        os.replace(partial, path)

    def _discard(self, rewinds: int, entries: Sequence[dict[str, Any]]) -> None:
        """Lines of `discarded.jsonl` that belong to the first rewinds, and further ones."""
        before = [entry for entry in read_metrics(self.discarded) if entry.get("rewind", 0) <= rewinds]
        self._replace(self.discarded, [*before, *entries])

    @staticmethod
    def _line(entry: dict[str, Any]) -> str:
        return json.dumps(entry, allow_nan=False) + "\n"

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line; what is not finite, and so no JSON, becomes None."""
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self.history.append(entry)
        if self.file is not None:
            self._try(lambda: self._append(entry))
        for board in self.boards:
            board.write(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        self.file.write(self._line(entry))
        self.file.flush()

    def rewind(self, step: int, number: int) -> None:
        """Move the lines after `step` into `discarded.jsonl`, marked with the number of the rewind."""
        gone = [entry for entry in self.history if entry["step"] > step]
        self.history[:] = [entry for entry in self.history if entry["step"] <= step]
        if self.file is None:
            return
        self._try(lambda: self._discard(number - 1, [{**entry, "rewind": number} for entry in gone]))
        self._try(self._rewrite)

    def sync(self) -> None:
        """Bring all lines to the disk: a checkpoint knows no step that the metrics do not, unless the disk fails."""
        if self.file is not None:
            self._try(lambda: os.fsync(self.file.fileno()))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.file is not None:
            with suppress(OSError):  # what could not be written is tried once more, and has been told
                self.file.close()
        for board in self.boards:
            board.close()
