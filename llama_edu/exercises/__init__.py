"""Checks for the exercises of the lessons: they say what is wrong, not only that something is.

One module a lesson (`llama_edu.exercises.bpe` for lesson 10). A check is made from a *judge*: a function that takes the
reader's attempt and returns None when it is right, or one sentence that names the mistake and where to look.

    @exercise(lesson="20_rmsnorm", level=1, minutes=5)
    def check_rms(attempt):
        if torch.allclose(attempt(x), x / x.norm(dim=-1, keepdim=True)):
            return "You divided by the length. The root mean square divides by sqrt(dim) as well."

In a lesson, `check_rms(rms)` prints the verdict and never raises, so a lesson with open exercises runs to its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Exercise", "exercise"]

LEVELS = {1: "easy", 2: "medium", 3: "hard"}


@dataclass
class Exercise:
    """A check of one exercise. Call it on an attempt to print the verdict; `diagnose` returns it.

    Args:
        lesson: stem of the notebook it belongs to.
        name: name of what the reader writes (`check_rms` checks `rms`).
        level: 1 easy, 2 medium, 3 hard.
        minutes: time a reader new to the matter should expect.
        judge: attempt -> None when right, else one sentence.
    """

    lesson: str
    name: str
    level: int
    minutes: int
    judge: Callable[[Callable], str | None]

    def diagnose(self, attempt: Callable) -> str | None:
        """None when the attempt is right, else one sentence that says what to look at."""
        try:
            return self.judge(attempt)
        except NotImplementedError:
            return f"`{self.name}` is not written yet: replace `raise NotImplementedError` with your code."
        except Exception as error:  # the reader's code may raise anything; the verdict names it instead of a traceback
            return f"`{self.name}` raised {type(error).__name__}: {error}"

    def __call__(self, attempt: Callable) -> None:
        verdict = self.diagnose(attempt)
        print(f"Right: {self.name}." if verdict is None else f"Not yet: {verdict}")


def exercise(*, lesson: str, level: int, minutes: int) -> Callable[[Callable], Exercise]:
    """Turn a judge named `check_NAME` into the Exercise called NAME."""
    if level not in LEVELS:
        raise ValueError(f"level is {level}; it must be 1 (easy), 2 (medium) or 3 (hard)")

    def wrap(judge: Callable) -> Exercise:
        made = Exercise(lesson, judge.__name__.removeprefix("check_"), level, minutes, judge)
        functools.update_wrapper(made, judge, updated=())
        return made

    return wrap
