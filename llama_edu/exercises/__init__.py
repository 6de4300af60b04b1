"""Checks for the exercises of the lessons: they say what is wrong, not only that something is.

One module a lesson (`llama_edu.exercises.bpe` for lesson 10). A check is made from a *judge*: a function that takes the
reader's attempt and returns None when it is right, or one sentence that names the mistake and where to look::

    @exercise(lesson="20_rmsnorm", level=1, minutes=5)
    def check_rms(attempt):
        if torch.allclose(attempt(x), x / x.norm(dim=-1, keepdim=True)):
            return "You divided by the length. The root mean square divides by sqrt(dim) as well."

In a lesson, `check_rms(rms)` prints the verdict and never raises, so a lesson with open exercises runs to its end.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Exercise", "all_exercises", "exercise", "ignored_argument", "progress_file", "solved"]

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

    def diagnose(self, attempt: object) -> str | None:
        """None when the attempt is right, else one sentence that says what to look at."""
        if not callable(attempt):
            return f"Hand over the function itself, without calling it: `check_{self.name}({self.name})`."
        answers, raised = [], []

        def watched(*args, **kwargs):
            try:
                answer = attempt(*args, **kwargs)
            except Exception as error:
                raised.append(error)
                raise
            answers.append(answer)
            return answer

        try:
            verdict = self.judge(watched)
            return verdict and (_missing(self.name, answers, all) or verdict)
        except Exception as error:  # the reader's code may raise anything; the verdict names it instead of a traceback
            if isinstance(error, NotImplementedError) and not error.args:  # PyTorch's own comes with words
                return f"`{self.name}` is not written yet: replace `raise NotImplementedError` with your code."
            if not answers or any(error is own for own in raised):
                return f"`{self.name}` raised {type(error).__name__}: {error}"
            return _missing(self.name, answers, any) or (
                f"`{self.name}` returned a value of type {type(answers[-1]).__name__} that the check cannot use "
                f"({error}): what does the exercise ask for?"
            )

    def __call__(self, attempt: object) -> None:
        verdict = self.diagnose(attempt)
        print(f"Right: {self.name}." if verdict is None else f"Not yet: {verdict}")
        if verdict is None:
            _remember(self)


def _missing(name: str, answers: list, enough: Callable) -> str | None:
    """A sentence if all (or any, whichever `enough` is) of the answers, or of the values in one of them, are None."""
    if answers and enough(answer is None for answer in answers):
        if all(answer is None for answer in answers):
            return f"`{name}` returned nothing: does it end with `return`?"
        return f"`{name}` returned nothing for some arguments: does every way through it end with `return`?"
    for answer in answers:
        if isinstance(answer, tuple | list) and answer and enough(value is None for value in answer):
            place = next(i for i, value in enumerate(answer, 1) if value is None)
            return f"`{name}` returned {len(answer)} values, and number {place} is None: it is still missing."
    return None


def exercise(*, lesson: str, level: int, minutes: int) -> Callable[[Callable], Exercise]:
    """Turn a judge named `check_NAME` into the Exercise called NAME."""
    if level not in LEVELS:
        raise ValueError(f"level is {level}; it must be 1 (easy), 2 (medium) or 3 (hard)")

    def wrap(judge: Callable) -> Exercise:
        made = Exercise(lesson, judge.__name__.removeprefix("check_"), level, minutes, judge)
        functools.update_wrapper(made, judge, updated=())
        return made

    return wrap


def ignored_argument(first: dict, second: dict, right: Callable[[dict], bool]) -> str | None:
    """Which argument an attempt that is right for `first` does not use: they get the values of `second` in turn."""
    for name, value in second.items():
        if not right(first | {name: value}):
            return f"Right for one value of `{name}`, wrong for another: the argument `{name}` seems to be ignored."
    return None if right(second) else "Right for one set of arguments, wrong for another: do not write in constants."


def all_exercises() -> list[Exercise]:
    """Every exercise of every lesson, in the order of the lessons."""
    found = []
    for topic in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{topic.name}")
        found += [value for value in vars(module).values() if isinstance(value, Exercise)]
    return sorted(found, key=lambda e: e.lesson)  # within a lesson they stay in the order of their module


def progress_file() -> Path:
    """Where the solved exercises are noted: `$LLAMA_EDU_PROGRESS`, else a file in the user's folder for such state."""
    import platformdirs

    named = os.environ.get("LLAMA_EDU_PROGRESS")
    return Path(named) if named else platformdirs.user_state_path("llama_edu") / "exercises.json"


def solved() -> set[tuple[str, str]]:
    """(lesson, name) of each exercise that has been solved. A file that cannot be understood counts as empty."""
    try:
        return {(lesson, name) for lesson, name in json.loads(progress_file().read_text())}
    except (OSError, ValueError, TypeError):
        return set()


def _remember(done: Exercise) -> None:
    """Note a solved exercise. A verdict must not fail because the note cannot be written: then it says so."""
    before = solved()
    if (done.lesson, done.name) in before:
        return
    file = progress_file()
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(sorted(before | {(done.lesson, done.name)}), indent=1))
        os.replace(partial, file)
    except OSError as error:
        print(f"(your progress could not be noted in {file}: {error.strerror or error})")
