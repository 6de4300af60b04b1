"""Batches read ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llama_edu.data.tokens import Batch
from llama_edu.training.engine import Engine, agreed

__all__ = ["Reader"]


class Reader:
    """This rank's part of each global batch, read by threads ahead of time.

    What is read follows from the numbers of the sequences alone, so the number of threads changes nothing but the time.

    Args:
        stream: has `rows(first, count)`.
        workers: threads; 0 reads when asked.
    """

    def __init__(self, stream: Any, engine: Engine, workers: int) -> None:
        self.stream, self.engine, self.workers = stream, engine, workers
        self._pool = ThreadPoolExecutor(workers, "reader") if workers else None
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}
        self._batch: Batch | None = None
        self._error: Exception | None = None

    def fetch(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Get the first of the global batches (first, count) in `wanted` ready, and begin with the others.

        An error is kept until all ranks are told: `failed`, then `take`.
        """
        try:
            if self._pool is None:
                self._batch = self._rows(*wanted[0])
                return
            for batch in [b for b in self._ahead if b not in wanted]:
                self._ahead.pop(batch).cancel()
            for batch in wanted:
                if batch not in self._ahead:
                    self._ahead[batch] = self._pool.submit(self._rows, *batch)
            self._batch = self._ahead.pop(wanted[0]).result()
        except Exception as error:
            self._error = error

    @property
    def failed(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raise, on all ranks, what went wrong on one."""
        with agreed(self.engine):
            if self._error is not None:
                raise self._error

    def take(self) -> Batch:
        """The batch that was fetched."""
        batch, self._batch = self._batch, None
        return batch

    def _rows(self, first: int, count: int) -> Batch:
        return self.stream.rows(*self.engine.share(first, count))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
