"""Build the book: gather lessons, pages and what is generated into one folder, and let Sphinx make the site.

    python tools/docs.py            build/book/html/index.html
    python tools/docs.py serve      the same, then a web server on this machine

The lessons appear with the outputs stored in them; nothing is executed. A line under each title links the notebook,
Colab and the modules that the lesson exports; a mention such as "arXiv 2104.09864" becomes a link to the bibliography.
"""

from __future__ import annotations

import http.server
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import docs_figures
import nbformat

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "build" / "book"
REPOSITORY = "llama-edu/llama-edu"
ARXIV = re.compile(r"(?<!\[)arXiv (\d{4}\.\d{4,5})")


def lessons() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def title(path: Path) -> str:
    return re.match(r"# (.+)", nbformat.read(path, as_version=4).cells[0].source).group(1)


def modules(notebook: nbformat.NotebookNode) -> list[str]:
    """The modules that a lesson exports, its main one first."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    found = re.findall(r"^#\| (?:default_exp|exporti?) +([\w.]+)", code, re.M)
    return list(dict.fromkeys(f"llama_edu.{name}" for name in found))


def lesson_page(path: Path) -> nbformat.NotebookNode:
    """A lesson with its line of links; the directives that export code are left out of the code shown."""
    notebook = nbformat.read(path, as_version=4)
    links = [
        f"{{download}}`Download notebook <../notebooks/{path.name}>`",
        f"[Open in Colab](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name})",
    ]
    exported = [f"[`{name}`](#{target(name)})" for name in modules(notebook)]
    if exported:
        links.append("Module this lesson exports: " + ", ".join(exported))
    head, rest = notebook.cells[0].source.split("\n", 1)
    notebook.cells[0].source = f"{head}\n\n{{.lesson-links}}\n{' · '.join(links)}\n{rest}"
    kept = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\| .*\n?", "", cell.source, flags=re.M)
            if not cell.source.strip():
                continue
        else:
            cell.source = link_papers(cell.source)
        kept.append(cell)
    notebook.cells = kept
    return notebook


def link_papers(text: str) -> str:
    """Link every paper that a text names to its entry in the bibliography."""
    return ARXIV.sub(lambda m: f"[arXiv {m[1]}](#arxiv-{m[1].replace('.', '-')})", text)


def target(module: str) -> str:
    """Name of the place in the reference that describes a module."""
    return "api-" + re.sub(r"[._]", "-", module)


def reading_minutes(path: Path) -> tuple[int, int]:
    """Minutes to read a lesson and to do its exercises.

    Reading: 180 words of prose and 20 lines of code a minute. Exercises: the minutes that each one states.
    """
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    prose = re.sub(r"<details>.*?</details>", "", prose, flags=re.S)
    code = sum(len(c.source.splitlines()) for c in cells if c.cell_type == "code")
    exercises = [int(m) for m in re.findall(r"^### Exercise.*?(\d+) minutes\)", prose, re.M)]
    return round(len(prose.split()) / 180 + code / 20), sum(exercises)


def lesson_table() -> str:
    lines = ["| lesson | question | reading | exercises |", "|---|---|---:|---:|"]
    for path in lessons():
        first = nbformat.read(path, as_version=4).cells[0].source
        question = " ".join(re.search(r"\*\*Question\.\*\* (.*?)\n\n", first, re.S).group(1).split())
        reading, exercises = reading_minutes(path)
        lines.append(f"| [{title(path)}](lessons/{path.name}) | {question} | {reading} min | {exercises} min |")
    return "\n".join(lines)


# The way of a text through the house: (number of a lesson, label), in columns of boxes.
BOXES = [
    [("30", "text"), ("10", "BPE"), ("11", "tokenizers")],
    [("20", "norm"), ("21", "positions"), ("22", "attention"), ("23", "SwiGLU")],
    [("00", "the family"), ("24", "model"), ("25", "checkpoints")],
    [("31", "training"), ("32", "scaling laws")],
    [("40", "collectives"), ("41", "FSDP"), ("42", "tensor"), ("43", "pipeline"), ("44", "context"), ("45", "cluster")],
    [("50", "generation"), ("51", "sampling"), ("52", "decoding")],
]


def pipeline() -> str:
    """The pipeline as a picture whose boxes open their lessons: to the right, and downwards for a narrow screen."""
    return "\n".join(_pipeline(tall) for tall in (False, True))


def _pipeline(tall: bool) -> str:
    stems = {path.name[:2]: path.stem for path in lessons()}
    width, height, gap, next_gap = 124, 40, 10, 32
    along, across = (height, width) if tall else (width, height)
    most = 2 if tall else max(len(column) for column in BOXES)
    shapes, place = [], 0
    extent = most * (across + gap) - gap
    for column in BOXES:
        if place:
            shapes.append(_arrow(place - next_gap, extent / 2, next_gap, tall))
        for start in range(0, len(column), most):
            row = column[start : start + most]
            side = (extent - len(row) * (across + gap) + gap) / 2
            for i, (number, label) in enumerate(row):
                x, y = (side + i * (across + gap), place) if tall else (place, side + i * (across + gap))
                shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
                shape += f'<text x="{x + width / 2}" y="{y + height / 2}">{number} {label}</text>'
                shapes.append(f'<a href="lessons/{stems[number]}.html">{shape}</a>')
            place += along + gap
        place += next_gap - gap
    place -= next_gap
    w, h = (extent, place) if tall else (place, extent)
    kind = "tall" if tall else "wide"
    head = (
        f'<svg class="pipeline pipeline-{kind}" viewBox="-2 -2 {w + 4} {h + 4}" role="group" aria-label="The lessons">'
    )
    return "\n".join([head, *shapes, "</svg>"])


def _arrow(at: float, middle: float, length: float, tall: bool) -> str:
    turn = f"translate({middle} {at}) rotate(90)" if tall else f"translate({at} {middle})"
    return f'<path class="arrow" transform="{turn}" d="M7 0 h{length - 14} m-6 -5 l6 5 l-6 5"/>'


def family_table() -> str:
    """Every member, from its configuration."""
    from llama_edu import LlamaConfig

    columns = ["model", "parameters", "cache bytes a token", "dim", "layers", "heads / kv", "feed-forward"]
    columns += ["vocabulary", "rope base", "context"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|"]
    for name in LlamaConfig.preset_names():
        cfg = LlamaConfig.preset(name)
        row = [name, cfg.num_parameters(), cfg.kv_cache_bytes(1), cfg.dim, cfg.n_layers]
        row += [f"{cfg.n_heads} / {cfg.n_kv_heads}", cfg.ffn_dim, cfg.vocab_size, f"{cfg.rope_theta:,.0f}"]
        row += [cfg.max_seq_len]
        lines.append("| " + " | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in row) + " |")
    return "\n".join(lines)


def api_pages(folder: Path) -> None:
    """A page a package, with every public module in it."""
    folder.mkdir(parents=True)
    package = ROOT / "llama_edu"
    rooms = sorted(p.name for p in package.iterdir() if (p / "__init__.py").exists() and p.name not in ("cli",))
    names = []
    for room in ["config", *rooms]:
        path = package / room
        files = sorted(p for p in path.glob("*.py") if not p.stem.startswith("_")) if path.is_dir() else [path]
        wanted = [f"llama_edu.{room}.{p.stem}" for p in files] if path.is_dir() else [f"llama_edu.{room}"]
        if room == "exercises":
            wanted = ["llama_edu.exercises"]
        blocks = [f"# llama_edu.{room}\n"] if len(wanted) > 1 else []
        for name in wanted:
            heading = f"({target(name)})=\n{'##' if blocks else '#'} {name}\n\n"
            blocks.append(f"{heading}```{{eval-rst}}\n.. automodule:: {name}\n```\n")
        (folder / f"{room}.md").write_text("\n".join(blocks))
        names.append(room)
    toctree = "\n".join(names)
    text = "Generated from the docstrings. What a lesson exports is derived there; the rest is written by hand.\n"
    (folder / "index.md").write_text(f"# Reference\n\n{text}\n```{{toctree}}\n:maxdepth: 1\n\n{toctree}\n```\n")


def gather(source: Path) -> None:
    """Write all pages of the book into an empty folder."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source)
    for folder in ("lessons", "notebooks"):
        (source / folder).mkdir()
    for path in lessons():
        nbformat.write(lesson_page(path), source / "lessons" / path.name)
        shutil.copy(path, source / "notebooks")
    made = {"family": family_table, "pipeline": pipeline, "lessons": lesson_table}
    for page in source.rglob("*.md"):
        text = page.read_text().replace("](../notebooks/", "](lessons/")  # where they are in the repository
        text = re.sub(r"<!-- (\w+) -->", lambda m: made[m[1]](), text)
        page.write_text(text if page.stem == "bibliography" else link_papers(text))
    api_pages(source / "api")
    docs_figures.write(source / "_static" / "see")


def build() -> Path:
    """Make the site; a warning of Sphinx's is a fault. Returns the folder of its pages."""
    gather(BOOK / "source")
    html = BOOK / "html"
    shutil.rmtree(html, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "2", "-b", "html"]
    subprocess.run([*command, "-d", str(BOOK / "doctrees"), str(BOOK / "source"), str(html)], check=True)
    return html


def main(argv: list[str]) -> None:
    if argv not in ([], ["serve"]):
        sys.exit(f"docs: {' '.join(argv)!r} is not understood; say nothing, or serve")
    html = build()
    print(f"the book is at {html.relative_to(ROOT) / 'index.html'}")
    if argv == ["serve"]:
        serve(html)


def serve(html: Path, port: int = 8000) -> None:
    """Show the book on this machine until Ctrl-C, at this port or, where it is taken, at another."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=html)
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with server:
        print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main(sys.argv[1:])
