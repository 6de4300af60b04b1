"""Llama 3's tokenizer: ids as tiktoken gives them under Meta's cuts, on the real file where it is present."""

import base64
import itertools
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_edu.errors import UserError
from llama_edu.tokenizer import LLAMA3_PATTERN, BPETokenizer
from llama_edu.tokenizer.llama3 import Llama3Tokenizer, _limited, llama3_special_tokens

TEXT = [
    "The river rises in the hills. def f(x):\n    return x + 2024\n",
    "Привет, мир! 日本語 नमस्ते \r\n\n don't I'LL",
] * 3


@pytest.fixture(scope="module")
def small() -> Llama3Tokenizer:
    return Llama3Tokenizer.train(TEXT, 600)


@pytest.fixture(scope="session")
def real_file(data_dir) -> Path:
    path = data_dir / "llama3" / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no Llama 3 tokenizer at {path}")
    return path


@pytest.fixture(scope="session")
def real(real_file) -> Llama3Tokenizer:
    return Llama3Tokenizer(real_file)


def metas_cuts(text: str, longest: int, run: int):
    """Meta's way to cut: count along the text and cut where a run of (non-)space grows too long."""
    for start in range(0, len(text), longest):
        part = text[start : start + longest]
        length, is_space, begin = 0, part[0].isspace(), 0
        for i, c in enumerate(part):
            if c.isspace() == is_space:
                length += 1
                if length > run:
                    yield part[begin:i]
                    begin, length = i, 1
            else:
                length, is_space = 1, c.isspace()
        yield part[begin:]


@given(st.text(st.sampled_from("ab \n\t\x1c\u00a0\u2028\u200b☺")), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=500, deadline=None)
@example("a" * 12, 12, 4)
@example("", 1, 1)
def test_cuts_are_metas(text, longest, run):
    assert list(_limited(text, longest, run)) == list(metas_cuts(text, longest, run))


def test_special_tokens_of_both_releases():
    first, later = llama3_special_tokens(128_000, "3.0"), llama3_special_tokens(128_000, "3.1")
    for special in (first, later):
        assert sorted(special.values()) == list(range(128_000, 128_256))
        assert special["<|begin_of_text|>"] == 128_000 and special["<|end_of_text|>"] == 128_001
        assert special["<|start_header_id|>"] == 128_006 and special["<|end_header_id|>"] == 128_007
        assert special["<|eot_id|>"] == 128_009
        assert special["<|reserved_special_token_1|>"] == 128_003
    assert [first[f"<|reserved_special_token_{i}|>"] for i in (0, 3, 4, 5, 250)] == [
        128_002, 128_005, 128_008, 128_010, 128_255,
    ]  # fmt: skip
    named = ["finetune_right_pad_id", "step_id", "eom_id", "python_tag", "image", "reserved_special_token_2"]
    assert [later[f"<|{name}|>"] for name in named] == [128_004, 128_005, 128_008, 128_010, 128_011, 128_012]
    assert later["<|reserved_special_token_245|>"] == 128_255
    there = llama3_special_tokens(128_000, "3.1-hf")  # published: 128005 is a reserved token, and there is no image
    assert there["<|reserved_special_token_2|>"] == 128_005 and there["<|python_tag|>"] == 128_010
    assert there["<|reserved_special_token_247|>"] == 128_255 and "<|image|>" not in there
    with pytest.raises(UserError, match=r"version is '3\.3'; it must be '3\.0'"):
        Llama3Tokenizer({}, version="3.3")


def test_ids_that_generation_needs(small):
    n = len(small.ranks)
    assert (small.n_vocab, small.bos_id, small.eos_id, small.pad_id) == (n + 256, n, n + 1, n + 4)
    assert small.stop_ids == {n + 1, n + 8, n + 9}
    first = Llama3Tokenizer(small.ranks, version="3.0")
    assert first.pad_id == -1 and first.stop_ids == {n + 1, n + 9}


def test_files_and_kin(small, tmp_path):
    small.save(tmp_path / "tokenizer.model")
    for again in (
        Llama3Tokenizer(tmp_path / "tokenizer.model"),
        Llama3Tokenizer.load(str(tmp_path / "tokenizer.model")),
    ):
        assert again.ranks == small.ranks and again.special_tokens == small.special_tokens
    old = Llama3Tokenizer.load(tmp_path / "tokenizer.model", version="3.0")
    old.to_hf(tmp_path / "tokenizer.json")
    again = Llama3Tokenizer.from_hf(tmp_path / "tokenizer.json")
    assert again.version == "3.0" and again.special_tokens == old.special_tokens
    for version in ("3.0", "3.1-hf"):
        one = Llama3Tokenizer(small.ranks, version=version)
        one.save(tmp_path / "one.model")
        one.to_hf(tmp_path / "one.json")
        for again in (Llama3Tokenizer(tmp_path / "one.model"), Llama3Tokenizer.from_hf(tmp_path / "one.json")):
            assert again.version == version and again.special_tokens == one.special_tokens
    BPETokenizer(small.ranks, pattern=r"\S+|\s+").save(tmp_path / "other.model")
    with pytest.raises(UserError, match="another pattern than Llama 3"):
        Llama3Tokenizer(tmp_path / "other.model")
    BPETokenizer.train(TEXT, 300).to_hf(tmp_path / "other.json")
    with pytest.raises(UserError, match="special tokens of no release of Llama 3"):
        Llama3Tokenizer.from_hf(tmp_path / "other.json")
    with pytest.raises(UserError, match="vocab_size is 500"):
        Llama3Tokenizer.train(TEXT, 500)


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@given(anything)
@settings(deadline=None)
@example("👩‍👩‍👧‍👦 🏳️‍🌈 שָׁלוֹם مرحبا a\u0301\u0323 \u0000\u0007\ufeff")
@example("<|eot_id|><|begin_of_text|>")
def test_text_comes_back_and_never_makes_a_special_id(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(i < len(small.ranks) for i in ids)
    stream = small.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == text
    assert small.encode(text, bos=True, eos=True) == [small.bos_id, *ids, small.eos_id]
    assert small.encode_batch([text, "a"], bos=True) == [[small.bos_id, *ids], small.encode("a", bos=True)]


def test_special_names_only_when_allowed(small):
    assert small.encode("a<|eot_id|>", allowed_special={"<|eot_id|>"})[-1] == small.special_tokens["<|eot_id|>"]
    with pytest.raises(UserError, match=r"U\+D83D"):
        small.encode("\ud83d")


def test_long_runs_are_cut(small):
    text = "a" * 60_000
    assert small.encode(text) == small.encode("a" * 25_000) * 2 + small.encode("a" * 10_000)
    assert small.encode_batch([text, "b"], eos=True) == [
        [*small.encode(text), small.eos_id],
        small.encode("b", eos=True),
    ]


def test_a_corpus_is_cut_as_each_text_is(small):
    """Runs of either kind, a text above the limit of characters, empty ones, and more than one group of the encoder."""
    texts = ["", "a" * 60_000, "b", " " * 25_001, "", "lorem ipsum " * 70_000, "é" * 25_000, "a b" * 1_500_000, "c"]
    assert [ids.tolist() for ids in small.encode_corpus(iter(texts))] == [small.encode(text) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "\n" * 1_000_000, "a b" * 333_333, "🦙" * 250_000])
def test_million_character_runs(small, text):
    assert small.decode(small.encode(text)) == text


# --- the real file ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def meta(real_file) -> tiktoken.Encoding:
    """As Meta's code builds it."""
    ranks = {}
    for line in real_file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=llama3_special_tokens(len(ranks))
    )


def test_real_file(real, meta):
    assert real.n_vocab == 128_256 and real.bos_id == 128_000 and real.pad_id == 128_004
    assert real.stop_ids == {128_001, 128_008, 128_009}
    assert real.encode("Hello world", bos=True) == [128_000, 9906, 1917]
    assert meta.encode("Hello world") == [9906, 1917]


def test_every_number_of_up_to_three_digits_is_a_token(real):
    numbers = ["".join(digits) for n in (1, 2, 3) for digits in itertools.product("0123456789", repeat=n)]
    assert all(number.encode() in real.ranks for number in numbers)
    assert [real.decode([i]) for i in real.encode("2024")] == ["202", "4"]


@given(anything)
@settings(deadline=None, max_examples=200)
@example("👩‍👩‍👧‍👦 שָׁלוֹם مرحبا a\u0301 \u0000 <|eot_id|>")
def test_real_ids_are_tiktokens(real, meta, text):
    ids = meta.encode(text, disallowed_special=())
    assert real.encode(text) == ids
    assert real.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a" * 60_000, " " * 60_000, "lorem ipsum " * 70_000])
def test_real_long_texts_are_metas(real, meta, text):
    parts = metas_cuts(text, 400_000, 25_000)
    ids = [i for part in parts for i in meta.encode(part, disallowed_special=())]
    assert real.encode(text) == ids
    assert [found.tolist() for found in real.encode_corpus([text, text])] == [ids, ids]


def test_real_compression_of_english(real, data_dir):
    """Prose of Shakespeare is harder than the sample of the paper, 3.94 characters a token."""
    text = (data_dir / "tinyshakespeare.txt").read_text()[:200_000]
    assert 3.0 < len(text) / len(real.encode(text)) < 4.5
