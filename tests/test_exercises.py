"""Every exercise of every lesson: the skeleton is recognised, the solution passes, each planted mistake is named."""

import importlib
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

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


@pytest.mark.parametrize("topic", TOPICS)
def test_planted_mistakes_are_named(topic):
    planted: dict[str, int] = {}
    for check, source, words in mistakes(topic):
        diagnosis = check.diagnose(define(source, check.name))
        assert diagnosis is not None, f"{check.name}: a wrong answer passes:\n{source}"
        assert words in diagnosis, f"{check.name}: expected {words!r} in {diagnosis!r} for:\n{source}"
        planted[check.name] = planted.get(check.name, 0) + 1
    for name in exercises(topic):
        assert planted.get(name, 0) >= 2, f"{topic}: fewer than two mistakes are planted for {name}"
