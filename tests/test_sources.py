"""Reading documents: every format comes out as it went in, and damaged files are named."""

import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu.data.sources import Document, held_out, read_documents
from llama_edu.errors import UserError

TEXTS = ["first text\nwith two lines", "zweiter Text: Größe", "三つ目 🙂 e\u0301"]


def texts(spec):
    return [d.text for d in read_documents(spec)]


def jsonl(rows):
    return "".join(json.dumps({"text": r}, ensure_ascii=False) + "\n" for r in rows).encode()


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": rows, "other": [1] * len(rows)}), sink)
    return sink.getvalue().to_pybytes()


PACK = {"": lambda b: b, ".gz": gzip.compress, ".zst": lambda b: zstandard.ZstdCompressor().compress(b)}


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("kind, data", [(".jsonl", jsonl(TEXTS)), (".parquet", parquet(TEXTS))])
def test_rows_are_documents(tmp_path, kind, data, compression):
    file = tmp_path / f"rows{kind}{compression}"
    file.write_bytes(PACK[compression](data))
    assert texts(file) == TEXTS


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("kind", [".txt", ".md"])
def test_a_file_is_a_document(tmp_path, kind, compression):
    file = tmp_path / f"one{kind}{compression}"
    file.write_bytes(PACK[compression](TEXTS[2].encode()))
    assert list(read_documents(file)) == [Document(TEXTS[2], file.as_posix())]


def test_frames_of_zstd_are_read_on_and_a_missing_end_is_told(tmp_path):
    rows = "".join(f"line {i} {i * 7**40 % 10**30}\n" for i in range(20_000))
    pack = zstandard.ZstdCompressor().compress
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    file = tmp_path / "t.txt.zst"
    file.write_bytes(pack(rows[:500_000].encode()) + pack(b"") + skipped + pack(rows[500_000:].encode()))
    assert texts(file) == [rows]
    whole = pack(rows.encode())
    for data in (whole[:-5000], whole[:-1], whole + pack(b"more")[:-1], b""):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"t.txt.zst is no whole zstd file: it ends inside a frame"):
            texts(file)


def test_folders_and_globs_are_read_in_order_and_other_files_left(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(tmp_path) == ["a", "b", "c"]
    assert texts(f"{tmp_path}/*.txt") == ["b"]
    assert texts(f"{tmp_path}/**/*.txt") == ["b", "c"]


def test_the_interpreters_own_text_is_there_and_in_a_fixed_order():
    first = list(read_documents("builtin"))
    assert sum(len(d.text) for d in first) > 1_000_000
    assert [d.name for d in first] == [d.name for d in read_documents("builtin")]
    assert len({d.name for d in first}) == len(first)


FLIPPED = bytearray(gzip.compress(b"x" * 1000))
FLIPPED[10] |= 6  # a kind of block that there is not
BAD = {
    "missing.txt": (None, "no file, folder or match"),
    "latin.txt": (b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
    "list.jsonl": (b"[1]\n", "line 1 has no text"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "byte 0xe9 at line 2, byte 10"),
    "nofield.jsonl": (b'{"body": "a"}\n', "line 1 has no text"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "ab\\ud83d"}\n', r"line 2 .* character 2 is U\+D83D, one half"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "line 1 cannot be read: .* too many digits"),
    "deep.jsonl": (b"\n" + b"[" * 100_000 + b"\n", "line 2 cannot be read: .* nested too deep"),
    "flip.txt.gz": (FLIPPED, "no whole gzip file"),
    "cut.txt.gz": (gzip.compress(b"x" * 1000)[:-9], "no whole gzip file"),
    "not.txt.gz": (b"plain", "no whole gzip file"),
    "not.txt.zst": (b"plain text, not zstd", "no whole zstd file"),
    "not.parquet": (b"PAR1 but no more", "no readable parquet file"),
    "photo.png": (b"\x89PNG", "no known format"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name):
    data, words = BAD[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        texts(tmp_path / name)
    assert name in str(caught.value)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column 'text'; its columns are body, id"):
        texts(tmp_path / "x.parquet")


def test_damage_inside_a_parquet_file_is_told(tmp_path):
    file = tmp_path / "x.parquet"
    latin = pa.array([b"a", b"caf\xe9 au lait"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": latin}), file)
    with pytest.raises(UserError, match=r"x.parquet is not UTF-8: one of the rows 1 to 2 .* byte 0xe9 at offset 3"):
        texts(file)
    pq.write_table(pa.table({"text": [f"{i} text" * 9 for i in range(3000)]}), file, compression="zstd")
    data = bytearray(file.read_bytes())
    data[40:4000] = b"\xff" * 3960
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"x.parquet is no readable parquet file"):
        texts(file)
    pq.write_table(pa.table({"text": ["a"], "zweig": [1]}), file)
    file.write_bytes(file.read_bytes().replace(b"zweig", b"zwei\xe9"))
    with pytest.raises(UserError, match=r"x.parquet is no readable parquet file"):
        texts(file)


def test_the_home_of_a_user_whom_nobody_knows():
    with pytest.raises(UserError, match=r"'~nosuch/x' begins with the home of a user"):
        texts("~nosuch/x")


def test_a_few_long_documents_give_no_more_than_their_share():
    long_line = ("a" * 60 + "\n") * 20_000 + "b" * 1_100_000
    assert len(held_out([Document(long_line, "a")]).held_out[0].text) == len(long_line) - int(len(long_line) * 0.95)
    lines = ("a" * 60 + "\n") * 20_000
    aside = held_out([Document(lines, "a")]).held_out[0].text
    assert len(aside) % 61 == 0 and 0.05 * len(lines) <= len(aside) <= 0.055 * len(lines)


def test_an_empty_folder_and_an_empty_corpus_say_so(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        texts(tmp_path)
    with pytest.raises(UserError, match="the corpus is empty"):
        held_out([])


def test_a_hub_data_set_is_streamed_row_by_row(monkeypatch):
    calls = []

    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        return iter([{"text": t} for t in TEXTS])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:some/data") == TEXTS
    assert calls == [("some/data", "train", True)]


def test_config_split_and_revision_of_a_hub_data_set_are_chosen_in_the_name(monkeypatch):
    calls = []
    load = lambda *args, **kwargs: calls.append((args, kwargs)) or iter([{"body": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    found = list(read_documents("hf:some/data?config=en&split=test&revision=v1", field="body"))
    assert [d.text for d in found] == ["a"]
    assert calls == [(("some/data",), {"name": "en", "split": "test", "revision": "v1", "streaming": True})]
    with pytest.raises(UserError, match="chooses 'spilt'; a data set has config, split and revision"):
        texts("hf:some/data?spilt=test")
    with pytest.raises(UserError, match="no string field 'text'; its fields are body"):
        texts("hf:some/data")


@pytest.mark.slow
@pytest.mark.parametrize("kind, make", [("jsonl", jsonl), ("parquet", parquet)])
def test_a_local_folder_is_streamed_through_datasets(tmp_path, kind, make):
    """The real `datasets`, without a network: several files of one kind, read as a stream in order."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for part in range(2):
        rows = [f"{part} {text}" for text in TEXTS]
        (tmp_path / f"train-{part}.{kind}").write_bytes(make(rows))
    assert texts(f"hf:{tmp_path}") == [f"{part} {text}" for part in range(2) for text in TEXTS]
    with pytest.raises(UserError, match="could not be read from the Hub"):
        texts(f"hf:{tmp_path}?split=test")
    with pytest.raises(UserError, match="could not be read from the Hub"):
        texts(f"hf:{tmp_path}/none")


def test_a_row_may_have_its_text_elsewhere_and_sources_may_be_several(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a", "text": "no"}\n')
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "b.parquet")
    found = read_documents([tmp_path / "b.parquet", str(tmp_path / "a.jsonl")], field="body")
    assert [d.text for d in found] == ["b", "a"]
    with pytest.raises(UserError, match='a string under "content"'):
        list(read_documents(tmp_path / "a.jsonl", field="content"))


def test_a_hub_data_set_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"llama-edu\[hub\]"):
        texts("hf:some/data")


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40).filter(str.strip), min_size=20, max_size=80, unique=True))
def test_split_loses_nothing_and_shares_nothing(rows):
    documents = [Document(t, f"{i}") for i, t in enumerate(rows)]
    try:
        split = held_out(documents, fraction=0.3)
    except UserError:
        return
    assert sorted(d.name for d in split.train + split.held_out) == sorted(d.name for d in documents)
    again = held_out([*documents, Document("one more", "new")], fraction=0.3)
    assert {d.name for d in split.held_out} <= {d.name for d in again.held_out}


@settings(deadline=None)
@given(st.text(min_size=200, max_size=2000).filter(str.strip))
def test_one_long_text_is_cut_near_its_end(text):
    try:
        split = held_out([Document(text, "one")])
    except UserError:
        return
    assert split.train[0].text + split.held_out[0].text == text
    assert len(split.held_out[0].text) < len(text)
