"""Every exercise of every lesson: the skeleton is recognised, the solution passes, each planted mistake is named."""

import importlib
import importlib.util
import re
from collections import Counter
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from llama_edu.errors import UserError
from llama_edu.exercises import Exercise

ROOT = Path(__file__).resolve().parent.parent
TOPICS = sorted(p.stem for p in (ROOT / "llama_edu" / "exercises").glob("*.py") if p.stem != "__init__")
SOLUTION = re.compile(r"<summary>Solution: `?(\w+)`?</summary>\s*```python\n(.*?)```", re.S)


def exercises(topic: str) -> dict[str, Exercise]:
    module = importlib.import_module(f"llama_edu.exercises.{topic}")
    return {e.name: e for e in vars(module).values() if isinstance(e, Exercise)}


def mistakes(topic: str) -> list:
    file = Path(__file__).parent / "exercises" / f"{topic}.py"
    spec = importlib.util.spec_from_file_location(f"mistakes_{topic}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MISTAKES


def define(source: str, name: str):
    """The function `name` that `source` defines, in a namespace of its own as in a fresh notebook."""
    namespace: dict = {}
    exec(compile(source, f"<{name}>", "exec"), namespace)
    return namespace[name]


def imports(notebook: nbformat.NotebookNode) -> str:
    """The import lines of a lesson: what its solutions may use."""
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    lines = re.findall(r"^(?:from [\w.]+ import (?:\([^)]*\)|.+)|import .+)$", code, re.M)
    lines.sort(key=lambda line: "__future__" not in line)  # a file must begin with it; a cell of a lesson need not
    return "\n".join(line for line in lines if "exercises" not in line)


ALL = [(topic, exercise) for topic in TOPICS for exercise in exercises(topic).values()]


def test_every_lesson_has_three_exercises_or_more():
    counts = Counter(exercise.lesson for _, exercise in ALL)
    assert {p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb")} == set(counts)
    assert not {lesson: n for lesson, n in counts.items() if n < 3}


@cache
def lesson(stem: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)


def solution(exercise: Exercise):
    """The function of the solution that the lesson folds away."""
    notebook = lesson(exercise.lesson)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    solutions = dict(SOLUTION.findall(text))
    assert exercise.name in solutions, f"lesson {exercise.lesson} folds away no solution of {exercise.name}"
    return define(imports(notebook) + "\n" + solutions[exercise.name], exercise.name)


@pytest.mark.parametrize("topic, exercise", ALL, ids=[f"{t}-{e.name}" for t, e in ALL])
def test_skeleton_is_open_and_the_printed_solution_passes(topic, exercise):
    notebook = lesson(exercise.lesson)
    skeletons = [c.source for c in notebook.cells if re.search(rf"^def {exercise.name}\(", c.source, re.M)]
    skeletons = [s for s in skeletons if "raise NotImplementedError" in s]
    assert len(skeletons) == 1, f"lesson {exercise.lesson} has {len(skeletons)} skeletons of {exercise.name}"
    known = imports(notebook)
    assert "not written yet" in exercise.diagnose(define(known + "\n" + skeletons[0], exercise.name))
    assert exercise.diagnose(solution(exercise)) is None


@pytest.mark.parametrize("topic, exercise", ALL, ids=[f"{t}-{e.name}" for t, e in ALL])
def test_a_forgotten_value_is_said_to_be_missing(topic, exercise):
    assert exercise.diagnose(lambda *args: None) == f"`{exercise.name}` returned nothing: does it end with `return`?"

    solve, several = solution(exercise), False

    def some(kept: slice):
        """The solution, with None for each of its values but the kept ones."""

        def attempt(*args):
            nonlocal several
            answer = solve(*args)
            if not isinstance(answer, tuple | list):
                return answer
            several = several or bool(answer)
            return type(answer)(v if i in range(len(answer))[kept] else None for i, v in enumerate(answer))

        return attempt

    for kept in (slice(0), slice(1), slice(1, None)):
        verdict = exercise.diagnose(some(kept))
        if not several:
            assert verdict is None
        elif verdict is not None:
            assert not verdict.startswith(f"`{exercise.name}` raised"), verdict
            assert "that the check cannot use" not in verdict, verdict
    if several:
        assert re.search(r"returned \d+ values, and number 1 is None", exercise.diagnose(some(slice(0))))


def test_an_exception_is_blamed_on_who_raised_it():
    made = Exercise("10_bpe", "double", 1, 5, lambda attempt: None if attempt(2).real == 4 else "no")
    assert made.diagnose(lambda x: 2 * x) is None and made.diagnose(lambda x: x) == "no"
    assert made.diagnose(lambda x: x / 0) == "`double` raised ZeroDivisionError: division by zero"
    assert "returned a value of type str that the check cannot use" in made.diagnose(lambda x: "4")
    assert made.diagnose(4) == "Hand over the function itself, without calling it: `check_double(double)`."

    def no_kernel(x):
        raise NotImplementedError("'rsqrt' not implemented for 'Half'")

    assert made.diagnose(no_kernel) == "`double` raised NotImplementedError: 'rsqrt' not implemented for 'Half'"
    twice = Exercise("10_bpe", "twice", 1, 5, lambda attempt: None if attempt(1) + attempt(2) == 6 else "no")
    assert "returned nothing for some arguments" in twice.diagnose(lambda x: 2 if x == 1 else None)


MODEL = [e for _, e in ALL if e.lesson[:2] in ("20", "21", "22", "23", "24", "25")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("exercise", MODEL, ids=[e.name for e in MODEL])
def test_a_right_answer_is_right_in_either_precision_and_as_a_list(exercise, dtype):
    solve = solution(exercise)

    def other(value):
        if isinstance(value, dict):
            return {name: other(v) for name, v in value.items()}
        if isinstance(value, tuple):
            return [other(v) for v in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    if exercise.name != "rms_norm":  # whose result must have the dtype of x
        assert exercise.diagnose(lambda *args: other(solve(*args))) is None


@pytest.mark.parametrize("topic, exercise", ALL, ids=[f"{t}-{e.name}" for t, e in ALL])
def test_two_hints_and_the_solution_follow_the_check(topic, exercise):
    cells = lesson(exercise.lesson).cells
    call = f"check_{exercise.name}({exercise.name})"
    (place,) = [i for i, c in enumerate(cells) if c.cell_type == "code" and call in c.source.splitlines()]
    folded = cells[place + 1]
    assert folded.cell_type == "markdown", f"lesson {exercise.lesson}: no hints right after {call}"
    own = re.split(r"^#+ ", folded.source, maxsplit=1, flags=re.M)[0]
    ladder = ["Hint 1: where to look", "Hint 2: the next step", f"Solution: {exercise.name}"]
    assert re.findall(r"<summary>(.*?)</summary>", own) == ladder
    texts = re.findall(r"<details><summary>Hint [12].*?</summary>\n\n(.+?)\n\n</details>", own, re.S)
    assert len(texts) == len(set(texts)) == 2, f"lesson {exercise.lesson}: the hints of {exercise.name} must differ"


def test_what_is_solved_is_remembered_and_shown(tmp_path, monkeypatch, capsys):
    from llama_edu.cli.main import run
    from llama_edu.exercises import all_exercises, solved

    monkeypatch.setenv("LLAMA_EDU_PROGRESS", str(tmp_path / "deep" / "progress.json"))
    assert len(all_exercises()) == len(ALL) and {e.name for e in all_exercises()} == {e.name for _, e in ALL}
    passing = Exercise("10_bpe", all_exercises()[0].name, 1, 5, lambda attempt: None)
    first = next(e for e in all_exercises() if e.lesson == "10_bpe")
    Exercise("10_bpe", first.name, 1, 5, lambda attempt: "no")(print)
    assert solved() == set()
    Exercise("10_bpe", first.name, 1, 5, passing.judge)(print)
    assert solved() == {("10_bpe", first.name)}
    capsys.readouterr()
    assert run(["exercises", "--lesson", "10"]) == 0
    shown = capsys.readouterr().out
    assert f"[x] {first.name} " in shown and "10_bpe  1 of" in shown and shown.count("[x]") == 1
    (tmp_path / "deep" / "progress.json").write_text("[1, 2")
    assert solved() == set()
    with pytest.raises(UserError, match="no lesson begins with '99'; those with exercises are 00_llama_family, 10_bpe"):
        run(["exercises", "--lesson", "99"])


def test_a_verdict_is_given_even_where_it_cannot_be_noted(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_EDU_PROGRESS", str(tmp_path / "file" / "progress.json"))
    Exercise("10_bpe", "anything", 1, 5, lambda attempt: None)(print)
    said = capsys.readouterr().out
    assert said.startswith("Right: anything.") and "could not be noted" in said


@pytest.mark.parametrize("topic", TOPICS)
def test_planted_mistakes_are_named(topic):
    named: dict[str, set[str]] = {}
    for check, source, words in mistakes(topic):
        diagnosis = check.diagnose(define(source, check.name))
        assert diagnosis is not None, f"{check.name}: a wrong answer passes:\n{source}"
        assert words in diagnosis, f"{check.name}: expected {words!r} in {diagnosis!r} for:\n{source}"
        named.setdefault(check.name, set()).add(diagnosis)
    for name in exercises(topic):
        assert len(named.get(name, ())) >= 2, f"{topic}: fewer than two mistakes of {name} are told apart"


def _plain_quotas(weights, n):
    """Largest remainders without a guard against rounding."""
    counts = [int(w * n) for w in weights]
    order = sorted(range(len(weights)), key=lambda i: counts[i] - weights[i] * n)
    return [c + (i in order[: n - sum(counts)]) for i, c in enumerate(counts)]


def _split(kind):
    def split_decay(shapes):
        two = {name: len(shape) > 1 for name, shape in shapes.items()}
        return tuple(kind(name for name, decays in two.items() if decays is wanted) for wanted in (True, False))

    return split_decay


RIGHT = [
    ("data", "quotas", _plain_quotas),
    *(("training", "split_decay", _split(kind)) for kind in (tuple, set, dict.fromkeys)),
]


@pytest.mark.parametrize("topic, name, attempt", RIGHT, ids=[f"{n}-{i}" for i, (_, n, _) in enumerate(RIGHT)])
def test_a_right_answer_is_right_in_any_form(topic, name, attempt):
    assert exercises(topic)[name].diagnose(attempt) is None


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_a_token_may_be_any_whole_number(kind):
    accept = exercises("fast_decoding")["accept"]
    solve = solution(accept)
    assert accept.diagnose(lambda *args: kind(solve(*args))) is None
