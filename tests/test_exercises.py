"""Every exercise of every lesson: the skeleton is recognised, the solution passes, each planted mistake is named."""

import importlib
import importlib.util
import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest

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
    return "\n".join(line for line in lines if "exercises" not in line)


ALL = [(topic, exercise) for topic in TOPICS for exercise in exercises(topic).values()]


def test_every_lesson_has_three_exercises_or_more():
    counts = Counter(exercise.lesson for _, exercise in ALL)
    assert {p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb")} == set(counts)
    assert not {lesson: n for lesson, n in counts.items() if n < 3}


@pytest.mark.parametrize("topic, exercise", ALL, ids=[f"{t}-{e.name}" for t, e in ALL])
def test_skeleton_is_open_and_the_printed_solution_passes(topic, exercise):
    notebook = nbformat.read(ROOT / "notebooks" / f"{exercise.lesson}.ipynb", as_version=4)
    skeletons = [c.source for c in notebook.cells if re.search(rf"^def {exercise.name}\(", c.source, re.M)]
    skeletons = [s for s in skeletons if "raise NotImplementedError" in s]
    assert len(skeletons) == 1, f"lesson {exercise.lesson} has {len(skeletons)} skeletons of {exercise.name}"
    known = imports(notebook)
    assert "not written yet" in exercise.diagnose(define(known + "\n" + skeletons[0], exercise.name))

    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    solutions = dict(SOLUTION.findall(text))
    assert exercise.name in solutions, f"lesson {exercise.lesson} folds away no solution of {exercise.name}"
    assert exercise.diagnose(define(known + "\n" + solutions[exercise.name], exercise.name)) is None


@pytest.mark.parametrize("topic, exercise", ALL, ids=[f"{t}-{e.name}" for t, e in ALL])
def test_two_hints_and_the_solution_follow_the_check(topic, exercise):
    cells = nbformat.read(ROOT / "notebooks" / f"{exercise.lesson}.ipynb", as_version=4).cells
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
