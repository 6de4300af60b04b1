"""The book: it builds without a warning, and a real browser finds nothing wrong with any of its pages."""

import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("sphinx", reason="the book needs the extra 'docs'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def html():
    """The site, built as `make docs` builds it: a warning of Sphinx's fails."""
    done = subprocess.run([sys.executable, "tools/docs.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return ROOT / "build" / "book" / "html"


@pytest.fixture(scope="module")
def pages(html):
    found = {p.relative_to(html).as_posix(): p.read_text() for p in sorted(html.rglob("*.html"))}
    return {name: text for name, text in found.items() if not name.startswith("_static")}


def test_every_lesson_has_its_page_and_its_links(pages):
    for lesson in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        page = pages[f"lessons/{lesson.stem}.html"]
        assert re.search(rf'href="[^"]*_downloads/\w+/{lesson.name}"', page)
        assert f"colab.research.google.com/github/llama-edu/llama-edu/blob/main/notebooks/{lesson.name}" in page
        assert "Module this lesson exports" in page


def test_what_is_downloaded_is_the_lesson(html):
    for lesson in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        (copy,) = (html / "_downloads").glob(f"*/{lesson.name}")
        assert copy.read_bytes() == lesson.read_bytes()


def test_every_box_of_the_pipeline_opens_a_lesson(pages):
    picture = re.search(r'<svg class="pipeline pipeline-wide".*?</svg>', pages["index.html"], re.S).group()
    opened = re.findall(r'<a href="lessons/(\w+)\.html"><rect', picture)
    assert picture.count("<rect") == len(opened) == len(set(opened))
    assert set(opened) == {p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb")}


def test_every_figure_has_a_still_picture_and_says_in_words_what_it_shows(html, pages):
    figures = {name: text for name, text in pages.items() if name.startswith("figures/") and "index" not in name}
    assert len(figures) >= 5
    for name, text in figures.items():
        still = re.search(r'<div class="see" id="see-\w+"><img src="([^"]+)" alt="([^"]+)">', text)
        assert (html / name).parent.joinpath(still[1]).stat().st_size > 1000, name
        assert len(still[2]) > 50 and len(re.search(r"In words\..*?</p>", text, re.S).group()) > 300, name


def test_every_link_and_anchor_inside_the_book_resolves(html, pages):
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in pages.items()}
    broken = []
    for name, text in pages.items():
        for href in set(re.findall(r'<a\b[^>]*?\bhref="([^"]*)"', text)):
            if re.match(r"[a-z]+:", href):
                continue
            path, fragment = urldefrag(unquote(href))
            there = (html / name).parent / path if path else html / name
            key = there.resolve().relative_to(html).as_posix()
            if not there.exists() or (fragment and key in ids and fragment not in ids[key]):
                broken.append(f"{name}: {href}")
    assert not broken


def test_the_bibliography_has_every_paper_once_and_no_other():
    listed = re.findall(r"^\(arxiv-(\d{4})-(\d{4,5})\)=$", (ROOT / "docs/bibliography.md").read_text(), re.M)
    texts = [p for folder in ("notebooks", "llama_edu", "docs") for p in (ROOT / folder).rglob("*")]
    texts = [p.read_text() for p in texts if p.suffix in (".ipynb", ".py", ".md") and p.name != "bibliography.md"]
    cited = {tuple(c) for text in texts for c in re.findall(r'arXiv(?:\s+|\\n",\s+")(\d{4})\.(\d{4,5})', text)}
    assert Counter(listed) == Counter(cited)


def test_every_picture_says_what_it_shows(pages):
    for name, text in pages.items():
        for tag in re.findall(r"<img\b[^>]*>", text):
            assert re.search(r'\balt="[^"]{3,}"', tag), f"{name}: {tag[:200]}"


# --- in a browser ----------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(html):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=html)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: the extra 'docs' has it")
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    names += ["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]
    with playwright.sync_playwright() as p:
        names.append(p.chromium.executable_path)  # what `playwright install chromium` brings
        found = next((path for path in map(shutil.which, names) if path), None)
        if found is None:
            pytest.skip(f"no browser here: none of {', '.join(names)} is there")
        yield p.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def open_page(browser, site):
    """Open a page of the book; what the console and the network complain of lands in `.faults`."""
    contexts = {}

    def open_page(name, width=1200, scheme="light"):
        if (width, scheme) not in contexts:
            size = {"width": width, "height": 900}
            contexts[width, scheme] = browser.new_context(viewport=size, color_scheme=scheme)
        page = contexts[width, scheme].new_page()
        page.faults = []
        page.on("console", lambda m: page.faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: page.faults.append(str(e)))
        page.on("requestfailed", lambda r: page.faults.append(f"failed: {r.url}"))
        inside = ("data:", "blob:", site)
        page.on("request", lambda r: None if r.url.startswith(inside) else page.faults.append(f"asked for {r.url}"))
        page.goto(site + name, wait_until="load")
        page.wait_for_function("!document.querySelector('.math') || document.querySelector('mjx-container, merror')")
        return page

    return open_page


def test_every_page_loads_whole_and_fits_a_phone(pages, open_page):
    faults = []
    for name, text in pages.items():
        page = open_page(name, width=390)
        faults += [f"{name}: {fault}" for fault in page.faults]
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > 390:
            faults.append(f"{name} is {wide} pixels wide on a screen of 390")
        formulas = len(re.findall(r'class="math ', text))
        typeset = page.evaluate("document.querySelectorAll('.math mjx-container').length")
        wrong = page.evaluate("[...document.querySelectorAll('[data-mjx-error]')].map(e => e.dataset.mjxError)")
        if typeset < formulas or wrong:
            faults.append(f"{name}: {typeset} of {formulas} formulas were set; {wrong}")
        page.close()
    assert not faults


@pytest.mark.parametrize("scheme, width", [("light", 390), ("dark", 1200)])
def test_axe_finds_nothing(pages, open_page, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    # A page of each kind: pages of a kind repeat one template. Every figure is a kind of its own.
    kinds = ["index.html", "start.html", "glossary.html", "family.html", "bibliography.html", "parts/2_model.html"]
    kinds += ["api/config.html", "lessons/21_rope.html"]
    names = [n for n in pages if n in kinds or n.startswith("figures/")]
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa"], "resultTypes": ["violations"]}
    faults = set()
    for name in names:
        page = open_page(name, width=width, scheme=scheme)
        for violation in axe.run(page, options=options).response["violations"]:
            faults |= {f"{violation['id']}: {node['html'][:150]} ({name})" for node in violation["nodes"]}
        page.close()
    assert not faults, "\n".join(sorted(faults))


def test_the_keyboard_reaches_everything_in_a_figure(open_page):
    page = open_page("figures/pipeline.html")
    wanted = page.evaluate("[...document.querySelectorAll('.see :is(select, input):enabled')].map(e => e.id)")
    reached = []
    for _ in range(200):
        page.keyboard.press("Tab")
        here = page.evaluate("document.activeElement.id")
        if here in wanted:
            reached.append(here)
            outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outlined != "none"
        if len(reached) == len(wanted):
            break
    assert reached == wanted
    before = page.inner_text(".see-said")
    page.keyboard.press("Home")  # the last one reached holds the micro-batches
    assert page.inner_text(".see-said") != before


@pytest.mark.parametrize("figure", ["bpe", "rope", "masks", "pipeline", "cache"])
def test_every_control_of_a_figure_changes_what_it_shows(open_page, figure):
    """With the keyboard alone, from the first to the last. One that can change nothing must be disabled."""
    page = open_page(f"figures/{figure}.html")
    shown = (
        "[...document.querySelectorAll('.see .see-said, .see .see-tokens, .see svg, .see tbody')].map(e => e.outerHTML)"
    )
    used = 0
    for control in page.query_selector_all(".see select, .see input, .see textarea"):
        if control.is_disabled():
            continue
        before = page.evaluate(shown)
        control.focus()
        page.keyboard.press("End")
        kind = control.evaluate("e => e.tagName")
        page.keyboard.type(" the rat, the rat" if kind == "TEXTAREA" else "")
        assert page.evaluate(shown) != before, f"{figure}: {control.evaluate('e => e.labels[0].textContent')}"
        used += 1
    assert used == len(page.query_selector_all(".see select, .see input, .see textarea"))
    assert not page.faults


# --- the figures compute what the package computes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "the cat sat on the mat, and that was that: the cat sat there",
        "Straße straße, déjà vu déjà 12345 12345\n\n  x  x",
    ],
)
def test_merges_are_those_of_our_trainer(open_page, text):
    from llama_edu.tokenizer import BPETokenizer

    page = open_page("figures/bpe.html")
    steps = page.evaluate("([text, n]) => BPE.train(text, n)", [text, 20])
    n = len(steps) - 1
    assert n > 3
    tok = BPETokenizer.train([text], 256 + n)
    pieces = page.evaluate("([text, n]) => BPE.pieces(BPE.train(text, n))", [text, n])
    assert [bytes(p) for p in pieces] == [tok.decode_bytes([i]) for i in range(256 + n)]
    assert [i for word in steps[-1]["words"] for i in word] == tok.encode(text)


def test_scores_are_those_of_our_frequencies(open_page):
    from llama_edu import LlamaConfig
    from llama_edu.model.rope import rope_frequencies

    page = open_page("figures/rope.html")
    for name in page.evaluate("Object.keys(LLAMA_EDU.rope)"):
        frequencies = rope_frequencies(LlamaConfig.preset(name)).double()
        for distance in (0, 1, 100, 8192):
            found = page.evaluate("([m, d]) => Rope.score(LLAMA_EDU.rope[m], d)", [name, distance])
            assert found == pytest.approx((distance * frequencies).cos().mean().item(), abs=1e-9)


def test_masks_are_those_of_our_attention(open_page):
    import torch

    from llama_edu.model.attention import causal_mask, document_mask

    page = open_page("figures/masks.html")
    documents = page.evaluate("Masks.documents(24, [7, 10, 7])")
    assert documents == [0] * 7 + [1] * 10 + [2] * 7
    for kind, mask in (
        ("document", document_mask(torch.tensor([documents]))[0, 0]),
        ("causal", causal_mask(torch.arange(24)[None], 24)[0, 0]),
    ):
        assert page.evaluate("([d, k]) => Masks.visible(d, k)", [documents, kind]) == mask.tolist()
    assert page.evaluate("Masks.ranks(8, 2, true)") == [0, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("stages", "count", "chunks"),
    [(2, 2, 1), (4, 8, 1), (8, 3, 1), (16, 64, 1), (5, 7, 1), (4, 8, 2), (4, 4, 3), (8, 32, 4), (13, 13, 2)],
)
def test_bubbles_are_those_of_the_formula(open_page, stages, count, chunks):
    page = open_page("figures/pipeline.html")
    for kind in ("gpipe", "1f1b") if chunks == 1 else ("interleaved",):
        found = page.evaluate("([k, p, m, v]) => Pipe.simulate(k, p, m, v)", [kind, stages, count, chunks])
        assert found["bubble"] == pytest.approx((stages - 1) / (chunks * count), abs=1e-9)
        assert len(found["bars"]) == 2 * stages * count * chunks


def test_memory_is_that_of_our_configuration(open_page):
    import torch

    from llama_edu import LlamaConfig

    page = open_page("figures/cache.html")
    for name in LlamaConfig.preset_names():
        found = page.evaluate("m => Cache.bytes(LLAMA_EDU.family[m], 4096, 3, 2)", name)
        assert found == LlamaConfig.preset(name).kv_cache_bytes(4096, batch_size=3, dtype=torch.bfloat16)
