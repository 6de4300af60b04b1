"""Shards built by many processes: the same bytes however it was done, and nothing is lost, mixed or left behind."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from bytes_tokenizer import Bare, BytesTokenizer
from slow_tokenizer import SlowTokenizer

from llama_edu.data import Document, open_stream, open_tokens, write_shards, write_tokens
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer

TEXTS = [f"document {i} \U0001f642 " * (i % 9 + 1) for i in range(120)]


def content(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "shards"
    write_shards(TEXTS, BytesTokenizer(), folder, workers=0, shard_bytes=1000)
    return folder


def test_the_shards_hold_the_documents_in_order(built, tmp_path):
    shards, whole = open_tokens(built), write_tokens(TEXTS, BytesTokenizer(), tmp_path / "whole")
    shards.verify()
    assert len(shards.shards) > 5
    assert (shards.n_tokens, shards.n_bytes) == (whole.n_tokens, whole.n_bytes)
    assert shards.bounds().tolist() == whole.bounds().tolist()
    assert all(1000 <= shard.n_bytes < 1000 + 300 for shard in shards.shards[:-1])
    index = json.loads((built / "index.json").read_text())
    assert index["n_tokens"] == whole.n_tokens and index["tokens_sha256"] == shards.tokens_sha256


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(built, tmp_path, workers):
    documents = [Document(text, str(i)) for i, text in enumerate(TEXTS)]
    write_shards(documents, BytesTokenizer(), tmp_path / "again", workers=workers, shard_bytes=1000)
    assert content(tmp_path / "again") == content(built)


@pytest.mark.slow
def test_a_compiled_tokenizer_travels_to_the_workers(tmp_path):
    tokenizer = BPETokenizer.train(TEXTS, 400, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"])
    list(tokenizer.encode_corpus(TEXTS))  # it has caches now that cannot travel
    for workers in (0, 1):
        write_shards(TEXTS, tokenizer, tmp_path / str(workers), workers=workers, shard_bytes=4000)
    assert content(tmp_path / "0") == content(tmp_path / "1")
    shard = open_tokens(tmp_path / "0").shards[0]
    first = shard.tokens[: shard.documents[1]].tolist()
    assert first == tokenizer.encode(TEXTS[0], bos=True, eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_kill_9_loses_nothing_and_mixes_nothing(tmp_path, workers):
    """Twelve kills of a build in one process, three each of builds with one and two workers."""
    driver = Path(__file__).with_name("build_driver.py")
    path = os.pathsep.join([str(driver.parent), str(driver.parent.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(driver), str(tmp_path), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    text = "x" * 10_000
    tracemalloc.start()
    write_shards((text + str(i) for i in range(800)), BytesTokenizer(), tmp_path / "s", workers=0, shard_bytes=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7_000_000  # of 8 MB of text and 16 MB of tokens; the file's buffer is 4 MB


def test_an_unfinished_build_is_not_opened_and_goes_on(built, tmp_path):
    def broken():
        yield from TEXTS[:70]
        raise ConnectionError("the line is dead")

    out = tmp_path / "out"
    with pytest.raises(ConnectionError):
        write_shards(broken(), BytesTokenizer(), out, workers=0, shard_bytes=1000)
    with pytest.raises(UserError, match=r"unfinished: run the same build again"):
        open_stream(out, seq_len=8, seed=0)
    write_shards(TEXTS, BytesTokenizer(), out, workers=0, shard_bytes=1000)
    assert content(out) == content(built)
    write_shards(TEXTS, BytesTokenizer(), out, workers=0, shard_bytes=1000)  # nothing is left to do
    assert content(out) == content(built)


def test_a_damaged_or_missing_shard_is_made_again(built, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(built, out)
    damaged = out / "shard-00002" / "tokens.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    moved = np.load(out / "shard-00003" / "documents.npy")
    moved[1] -= 1
    np.save(out / "shard-00003" / "documents.npy", moved)
    shutil.rmtree(out / "shard-00004")
    with pytest.raises(UserError, match=r"shard-00004 is missing"):
        open_tokens(out)
    write_shards(TEXTS, BytesTokenizer(), out, workers=0, shard_bytes=1000)
    assert content(out) == content(built)


@pytest.mark.parametrize("index", ['{"shards": [5]}', '{"shards": 5}', "[]", "[" * 100_000])
def test_a_damaged_index_is_told(built, tmp_path, index):
    out = tmp_path / "out"
    shutil.copytree(built, out)
    (out / "index.json").write_text(index)
    with pytest.raises(UserError, match=r"index.json is damaged"):
        open_tokens(out)
    (out / "build.json").write_text("[" * 100_000 if len(index) > 50 else "[]")
    with pytest.raises(UserError, match=r"build.json is damaged"):
        write_shards(TEXTS, BytesTokenizer(), out, workers=0, shard_bytes=1000)


def test_the_home_of_a_user_whom_nobody_knows():
    for use in (open_tokens, lambda place: write_shards(TEXTS, BytesTokenizer(), place, workers=0)):
        with pytest.raises(UserError, match=r"'~nosuch/x' begins with the home of a user"):
            use("~nosuch/x")


def changed_text(out):
    write_shards([*TEXTS[:50], "another", *TEXTS[51:]], BytesTokenizer(), out, workers=0, shard_bytes=1000)


def less_text(out):
    write_shards(TEXTS[:40], BytesTokenizer(), out, workers=0, shard_bytes=1000)


def another_tokenizer(out):
    write_shards(TEXTS, Bare(), out, workers=0, shard_bytes=1000)


def another_size(out):
    write_shards(TEXTS, BytesTokenizer(), out, workers=0, shard_bytes=2000)


@pytest.mark.parametrize(
    "build, words",
    [
        (changed_text, "was made from other text"),
        (less_text, "documents have changed"),
        (another_tokenizer, "was begun with tokenizer_sha256"),
        (another_size, "was begun with shard_bytes 1000 and not 2000"),
    ],
)
def test_what_belongs_to_another_build_is_refused_and_left_alone(built, tmp_path, build, words):
    out = tmp_path / "out"
    shutil.copytree(built, out)
    with pytest.raises(UserError, match=words) as caught:
        build(out)
    assert "\n" not in str(caught.value)
    left = content(out)
    left.pop(".lock", None)
    assert left == content(built)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(UserError, match=r"holds 'letter.txt', which is no part of a build"):
        write_shards(TEXTS, BytesTokenizer(), tmp_path, workers=0)
    with pytest.raises(UserError, match="is a file"):
        write_shards(TEXTS, BytesTokenizer(), tmp_path / "letter.txt", workers=0)
    with pytest.raises(UserError, match="no text to encode"):
        write_shards(["", ""], BytesTokenizer(), tmp_path / "none", workers=0)
    for wrong in ({"workers": -1}, {"shard_bytes": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            write_shards(TEXTS, BytesTokenizer(), tmp_path / "none", **wrong)


def test_a_full_disk_is_told_before_and_while_it_is_written_to(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
        with pytest.raises(UserError, match=r"MB free, and the next shard may need .* make room"):
            write_shards(TEXTS, BytesTokenizer(), tmp_path / "full", workers=0, shard_bytes=1000)
    real = os.rename

    def no_space(source, target):
        if Path(target).name == "shard-00003":
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", no_space)
        with pytest.raises(UserError, match=r"shard-00003 could not be written \(No space left on device\)"):
            write_shards(TEXTS, BytesTokenizer(), tmp_path / "full", workers=0, shard_bytes=1000)
    assert not list((tmp_path / "full").glob(".shard-*"))
    write_shards(TEXTS, BytesTokenizer(), tmp_path / "full", workers=0, shard_bytes=1000)


def test_two_builds_at_once_are_told(tmp_path):
    def nosy():
        yield from TEXTS[:30]
        with pytest.raises(UserError, match="another build is writing to"):
            write_shards(TEXTS, BytesTokenizer(), tmp_path / "out", workers=0, shard_bytes=1000)
        yield from TEXTS[30:]

    write_shards(nosy(), BytesTokenizer(), tmp_path / "out", workers=0, shard_bytes=1000)


class Unsendable(BytesTokenizer):
    def __reduce__(self):
        raise TypeError("I stay here")


@pytest.mark.slow
def test_a_tokenizer_that_cannot_travel_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"Unsendable cannot be sent to another process \(I stay here\); give workers=0"
    ):
        write_shards(TEXTS, Unsendable(), tmp_path / "out", workers=1, shard_bytes=1000)
    hidden = SlowTokenizer(0.0)
    hidden.__class__ = type("Elsewhere", (SlowTokenizer,), {"__module__": "slow_tokenizer"})
    sys.modules["slow_tokenizer"].Elsewhere = type(hidden)
    with pytest.raises(UserError, match="not known in another process"):
        write_shards(TEXTS, hidden, tmp_path / "out", workers=1, shard_bytes=1000)
