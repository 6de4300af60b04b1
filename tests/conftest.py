"""Shared fixtures; shapes and types of every public function are enforced while tests run."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before the package is imported anywhere: jaxtyping checks shapes, beartype checks types.
install_import_hook("llama_edu", "typecheck.check")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real files (a Llama 3 tokenizer, text, scaling-law points); tests that need it skip without it."""
    folder = Path(os.environ.get("LLAMA_EDU_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set LLAMA_EDU_TEST_DATA to the folder that has it")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _progress_elsewhere(tmp_path_factory):
    """Exercises solved by a test are not the reader's."""
    os.environ["LLAMA_EDU_PROGRESS"] = str(tmp_path_factory.mktemp("progress") / "exercises.json")
