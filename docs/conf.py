"""Sphinx settings of the book. `tools/docs.py` gathers the pages into build/book/source and builds from there."""

import importlib.util
from pathlib import Path

from llama_edu import __version__

project = "llama_edu"
author = "The llama_edu authors"
release = __version__
copyright = "the llama_edu authors, Apache 2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["notebooks"]  # what readers download, as it is in the repository
nb_execution_mode = "off"  # the stored outputs are the lesson; nbval has compared them
nb_merge_streams = True
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"  # a block that names no language is a diagram or a command; code cells name theirs
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = "The Llama family, step by step"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_css_files = ["book.css"]
html_theme_options = {
    "repository_url": "https://github.com/llama-edu/llama-edu",
    "use_repository_button": True,
    "use_download_button": False,  # every lesson has its own line of links, which says what each one is
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search field stands in the side bar
    "home_page_in_toc": True,
    "search_bar_text": "Search this book",
}
html_use_index = html_domain_indices = False  # the search and the reference do this better
html_copy_source = False
html_show_sourcelink = False

# Formulas are set by the reader's browser from files of this site: no page asks another machine for anything.
_MATHJAX = Path(importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0], "static", "mathjax")
mathjax_path = "mathjax/tex-chtml.js"
mathjax_options = {"defer": "defer"}

default_role = "literal"  # a name between single backticks in a docstring
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of a docstring and of the class are one entry, not two


def _copy_mathjax(app, exception):
    """MathJax's one file and its fonts, from the package that ships them."""
    from sphinx.util.fileutil import copy_asset

    if exception is None and app.builder.format == "html":
        for part in ("tex-chtml.js", "output/chtml/fonts/woff-v2"):
            copy_asset(_MATHJAX / part, Path(app.outdir, "_static", "mathjax", part).parent)
            if (_MATHJAX / part).is_dir():
                copy_asset(_MATHJAX / part, Path(app.outdir, "_static", "mathjax", part))


def _name_toggles(app, exception):
    """Say what the arrows of the side bar do: the theme leaves them without a name for those who do not see them."""
    if exception is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text()
            page.write_text(text.replace("<summary><span", '<summary aria-label="Show or hide what is inside"><span'))


def setup(app):
    app.connect("build-finished", _copy_mathjax)
    app.connect("build-finished", _name_toggles)
