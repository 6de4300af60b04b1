"""The house: pins in step, lessons and modules in step, an import that stays light, layers that only look down."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
PINS = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
sys.path.insert(0, str(ROOT / "tools"))
import lessons  # noqa: E402


def requirements(*extras):
    lines = PROJECT["dependencies"] + [r for e in extras for r in PROJECT["optional-dependencies"][e]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("need", requirements("notebooks", "test", "docs", "dev"), ids=lambda r: r.name)
def test_every_requirement_is_pinned_inside_its_range(need):
    pin = PINS.get(need.name.lower().replace("_", "-"))
    assert pin is not None, f"constraints.txt does not pin {need.name}"
    assert need.specifier.contains(pin), (
        f"constraints.txt pins {need.name} {pin}, pyproject.toml asks for {need.specifier}"
    )


def test_conda_environment_installs_the_same_pins():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in env["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.split("=")[1])
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert pip == ["--constraint constraints.txt", "--editable .[notebooks,test,docs,dev]"]
    setup = (ROOT / "Makefile").read_text()
    assert "$(SETUP) notebooks test docs dev" in setup


def test_import_is_light():
    code = (
        "import sys, llama_edu, llama_edu.cli.main; print([m for m in sys.modules if m in {'torch', 'numpy', 'numba'}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FLOORS = {
    "config": 0, "errors": 0, "plotting": 0, "_version": 0, "_lazy": 0, "jit": 0, "native": 0, "tokenizer": 1,
    "model": 2, "data": 2, "training": 3, "generation": 3, "scaling": 3, "parallel": 4,
    "exercises": 5, "cli": 6, "train": 6,
}  # fmt: skip


@pytest.mark.parametrize("file", sorted((ROOT / "llama_edu").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_floors_below(file):
    parts = file.relative_to(ROOT / "llama_edu").with_suffix("").parts
    if parts == ("__init__",):
        return
    here = FLOORS[parts[0]]
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = list(("llama_edu", *parts)[: -node.level]) if node.level else []
            names = [".".join([*base, node.module] if node.module else base)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            room = name.split(".")[1] if name.startswith("llama_edu.") else None
            if room is not None and room != parts[0]:
                assert FLOORS[room] < here or FLOORS[room] == 0, f"{file.name} (floor {here}) imports {name}"


# --- the check of the lessons must be able to fail ------------------------------------------------------------------


@pytest.fixture
def lesson(tmp_path):
    """A healthy little lesson, as the tool stores them."""
    v4 = nbformat.v4
    stream = v4.new_output("stream", name="stdout", text="2\n")
    cells = [
        v4.new_markdown_cell("# 99 A lesson"),
        v4.new_code_cell("x = 2", execution_count=1),
        v4.new_code_cell("print(x)", execution_count=2, outputs=[stream]),
    ]
    path = tmp_path / "99_a_lesson.ipynb"

    def save(change=lambda cells: None):
        change(cells)
        lessons.write(v4.new_notebook(cells=cells), path)
        return lessons.faults(path)

    return save


def test_a_healthy_lesson_has_no_fault(lesson):
    assert lesson() == []


def set_count(cells):
    cells[1].execution_count = 3


def clear_output(cells):
    cells[2].outputs = []


def trailing_semicolon(cells):
    cells[1].source = "x = 2;"


def figure_without_alt(cells):
    cells[1].outputs = [nbformat.v4.new_output("display_data", data={"image/png": ""})]


def ignored_output(cells):
    cells[2].metadata["tags"] = ["nbval-ignore-output"]


def stored_error(cells):
    cells[1].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]


@pytest.mark.parametrize(
    "change, words",
    [
        (set_count, "not executed in order"),
        (clear_output, "no output is stored"),
        (trailing_semicolon, "ends in ';'"),
        (figure_without_alt, "without alt text"),
        (ignored_output, "not compared at all"),
        (stored_error, "stored an error"),
    ],
)
def test_a_faulty_lesson_is_named(lesson, change, words):
    found = lesson(change)
    assert len(found) == 1 and words in found[0] and "99_a_lesson.ipynb" in found[0]


@pytest.mark.slow
def test_all_but_the_numbers_of_a_timing_is_compared(tmp_path):
    v4, path = nbformat.v4, tmp_path / "97_timings.ipynb"
    cells = []
    for stored, tags in [("took 1,234.5 ms", ["timing"]), ("used 0.1 ms", ["timing"]), ("took 0.1 ms", [])]:
        stream = v4.new_output("stream", name="stdout", text=stored + "\n")
        cell = v4.new_code_cell("print('took   0.2 ms')", execution_count=len(cells) + 1, outputs=[stream])
        cell.metadata["tags"] = tags
        cells.append(cell)
    lessons.write(v4.new_notebook(cells=cells), path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--nbval", "--nbval-current-env", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = re.findall(r"^FAILED .*::Cell (\d)", done.stdout, re.M)
    assert failed == ["1", "2"] and "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_module_that_differs_from_its_lesson_is_named(tmp_path, monkeypatch):
    package, notebooks = tmp_path / "llama_edu", tmp_path / "notebooks"
    package.mkdir()
    notebooks.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    v4 = nbformat.v4
    cells = [
        v4.new_code_cell("#| default_exp one"),
        v4.new_code_cell("#| export\ndef f():\n    return 1"),
        v4.new_code_cell("#| export sub.two\ndef g():\n    return 2"),
    ]
    path = notebooks / "98_two_modules.ipynb"
    lessons.write(v4.new_notebook(cells=cells), path)
    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    monkeypatch.setattr(lessons, "NOTEBOOKS", notebooks)
    monkeypatch.chdir(tmp_path)
    missing = lessons.stale([path])
    assert len(missing) == 2 and "llama_edu/one.py is missing: notebooks/98_two_modules.ipynb" in missing[0]
    lessons.export(tmp_path, [path])
    lessons.export(tmp_path, [path])  # a second export must not append a second time
    assert lessons.stale([path]) == []
    assert (package / "sub" / "two.py").read_text().count("def g") == 1
    (package / "one.py").write_text((package / "one.py").read_text().replace("return 1", "return 3"))
    differs = lessons.stale([path])
    assert (
        len(differs) == 1 and "llama_edu/one.py differs from what notebooks/98_two_modules.ipynb exports" in differs[0]
    )


def test_a_text_of_the_project_names_no_place_of_this_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        data = (ROOT / name).read_bytes()
        for place in (b"/" + b"root/", b"/" + b"work/", b"/" + b"tmp/"):
            assert place not in data, f"{name} names {place.decode()}"


def test_the_picture_of_the_readme_is_the_lessons():
    import readme_picture

    assert readme_picture.TARGET.read_bytes() == readme_picture.picture(), "run tools/readme_picture.py"
    assert "docs/family.png" in (ROOT / "README.md").read_text()
