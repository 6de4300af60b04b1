"""What a user of the byte-level BPE tokenizer relies on: any text, any corpus, any file."""

import base64
import inspect
import json
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from tiktoken.load import load_tiktoken_bpe

from llama_edu.errors import UserError
from llama_edu.tokenizer import LLAMA3_PATTERN, BPETokenizer
from llama_edu.tokenizer import trainer as trainer_module
from llama_edu.tokenizer.formats import byte_to_char
from llama_edu.tokenizer.scanner import class_table, need_texts, split
from llama_edu.tokenizer.trainer import WordCounts, chunks, count_words_of, learn_merges

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")
TEXT = (Path(trainer_module.__file__).read_text() + "naïve Zürich 猫も🐈 don't I'LL 12345 \t\n\n  x" * 5)[:20_000]
# Characters of every general category, and those that the pattern treats alone.
AWKWARD = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c % 997 < 2] + list(
    " \n\r\t\x0b\x1c\x85\xa0\u2028\u2003'sStTrReEvVlLdDmM\u017f\u01f2149\u0661½.,!-_aé中🐈\u0301\u05d0\u200d\ufe0f"
)
anything = st.text() | st.text(st.sampled_from(AWKWARD)) | st.text(st.sampled_from("'sStrRevVlL \n\r\t1a.\u017f"))


@pytest.fixture(scope="module")
def tok():
    return BPETokenizer.train([TEXT], 600, special_tokens=SPECIAL)


def slow_merges(texts, n_merges, pattern=LLAMA3_PATTERN):
    """The definition: count all pairs again before every merge; ties by the smaller pair of ids."""
    pieces = [list(p.encode()) for text in texts for p in regex.findall(pattern, text)]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter(pair for ids in pieces for pair in pairwise(ids))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(list(best))
        for ids in pieces:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [255 + len(merges)]
                i += 1
    return merges


# --- pre-tokens ------------------------------------------------------------------------------------------------------


@given(anything)
@settings(max_examples=300, deadline=None)
def test_the_scanner_reads_the_pattern_as_the_regex_module_does(text):
    assert split(text) == regex.findall(LLAMA3_PATTERN, text)


def test_the_scanner_agrees_on_every_code_point():
    text = "".join(f"{chr(c)}a {chr(c)}1{chr(c)}'{chr(c)}\n" for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert split(text) == regex.findall(LLAMA3_PATTERN, text)
    assert set(class_table()) == {0, 1, 2, 3, 4}


@given(st.lists(anything, max_size=5))
@settings(max_examples=50, deadline=None)
def test_cutting_a_long_text_moves_no_border(texts):
    texts = [t * 20 for t in texts]
    want = Counter(p.encode() for t in texts for p in regex.findall(LLAMA3_PATTERN, t))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "CHUNK", 16)
        words = count_words_of(texts)
        assert b"".join(data.tobytes() for data, _ in chunks(texts)) == "".join(texts).encode()
    got = {
        words.arena[words.offsets[i] : words.offsets[i + 1]].tobytes(): int(words.counts[i]) for i in range(len(words))
    }
    assert got == want


# --- training --------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.sampled_from("ab c\n'")) | st.text(max_size=40), max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_trainer_agrees_with_the_definition_merge_by_merge(texts):
    assert learn_merges(count_words_of(texts), 60).tolist() == slow_merges(texts, 60)


@pytest.mark.parametrize("pattern", [LLAMA3_PATTERN, r"\s+|\w+|[^\s\w]+", r"[\s\S]+"])
def test_real_text_and_other_patterns_agree_with_the_definition(pattern):
    text = TEXT[:4000]
    assert learn_merges(count_words_of([text], pattern), 200).tolist() == slow_merges([text], 200, pattern)


def test_merges_equal_those_of_tokenizers():
    """`tokenizers` breaks ties by ids too. Bytes are handed to it as characters in the same order."""
    letters = lambda data: "".join(chr(0x100 + b) for b in data)
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Split("\n", "removed")
    how = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=[chr(0x100 + b) for b in range(256)], show_progress=False
    )
    peer.train_from_iterator((letters(p.encode()) for p in regex.findall(LLAMA3_PATTERN, TEXT)), how)
    theirs = [a + b for a, b in json.loads(peer.to_str())["model"]["merges"]]
    ours = sorted(BPETokenizer.train([TEXT], 1500).ranks.items(), key=lambda item: item[1])
    assert theirs == [letters(token) for token, _ in ours[256:]]


def test_the_corpus_may_be_an_iterator_and_its_cuts_do_not_matter(tok, monkeypatch):
    monkeypatch.setattr(trainer_module, "CHUNK", 1000)
    again = BPETokenizer.train(iter([TEXT]), 600, special_tokens=SPECIAL)
    assert again.ranks == tok.ranks and again.n_vocab == 600
    assert again.bos_id == 598 and again.eos_id == 599 and again.special_tokens == tok.special_tokens


def test_memory_does_not_grow_with_the_corpus():
    words = count_words_of("the same words again and again\n" * 100 for _ in range(5000))
    assert len(words) == 6 and words.counts[:6].sum() == 5000 * 700
    assert len(words.counts) == 1 << 16


def test_a_corpus_without_enough_pairs_gives_fewer_tokens():
    assert BPETokenizer.train(["ab"], 300).n_vocab == 257
    assert BPETokenizer.train([], 300).n_vocab == 256


@pytest.mark.parametrize("size", [0, 255, 257])
def test_a_vocabulary_too_small_is_refused(size):
    with pytest.raises(UserError, match="at least 258"):
        BPETokenizer.train(["x"], size, special_tokens=SPECIAL)


# --- encoding --------------------------------------------------------------------------------------------------------


@given(text=anything)
@settings(max_examples=200, deadline=None)
def test_three_encoders_agree_and_decoding_gives_the_text_back(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert ids == tok.encoding.encode_ordinary(text)
    assert tok.encode_batch([text, "x", text]) == [ids, tok.encode("x"), ids]
    assert b"".join(tok.decode_bytes([i]) for i in tok.encode_readably(text)).decode() == text
    stream = tok.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text and all("\ufffd" not in p for p in pieces if "\ufffd" not in text)


def test_the_readable_encoder_gives_the_same_ids(tok):
    assert tok.encode_readably(TEXT) == tok.encode(TEXT) == tok.encode_batch([TEXT])[0]


@given(st.binary(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_ids_decode(tok, data):
    ids = [tok.ranks[bytes([b])] for b in data]
    assert tok.decode_bytes(ids) == data
    assert tok.decode(ids) == data.decode(errors="replace")
    stream = tok.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == data.decode(errors="replace")


@pytest.mark.parametrize("run", ["a", " ", "é", "\n", "ab", "🐈", " a", "\u0301", "1"])
@pytest.mark.parametrize("pattern", [LLAMA3_PATTERN, r"\S+|\s+(?!\S)|\s+"])
def test_a_million_characters_are_no_trouble(tok, run, pattern):
    tok = tok if pattern == LLAMA3_PATTERN else BPETokenizer(tok.ranks, pattern=pattern)
    text = run * (1_000_000 // len(run))
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    if pattern == LLAMA3_PATTERN:
        assert tok.encode(text[:60_000]) == tok.encode_batch([text[:60_000]])[0]
        assert tok.encode_readably(text[:100_000]) == tok.encode(text[:100_000])


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "x" * 100_000 + "\ud83d"])
def test_a_lone_surrogate_is_an_error_that_says_so(tok, text):
    batch, train = lambda t: tok.encode_batch([t]), lambda t: BPETokenizer.train([t], 300)
    for work in (tok.encode, tok.encode_readably, batch, train):
        with pytest.raises(UserError, match=rf"lone surrogate U\+D.* at character {len(text) - 1}"):
            work(text)


def test_special_text_is_ordinary_text_unless_allowed(tok):
    text = f"a{SPECIAL[0]}b{SPECIAL[1]}"
    assert not {598, 599} & set(tok.encode(text))
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode(text, allowed_special={SPECIAL[0]})[:2] == [97, 598]
    assert 599 not in tok.encode(text, allowed_special={SPECIAL[0]})
    assert tok.encode(text, allowed_special=set(SPECIAL)) == [97, 598, 98, 599]
    assert tok.encode_batch([text], allowed_special=set(SPECIAL), bos=True) == [[598, 97, 598, 98, 599]]
    assert tok.encode("a", bos=True, eos=True) == [598, 97, 599] == tok.encode_batch(["a"], bos=True, eos=True)[0]
    assert tok.decode([598, 97]) == SPECIAL[0] + "a"
    assert not {598, 599} & set(np.concatenate(list(tok.encode_corpus([text] * 3))).tolist())


def test_bad_requests_are_sentences(tok):
    plain = BPETokenizer(tok.ranks)
    for work, words in (
        (lambda: plain.encode("a", bos=True), "begin of a text"),
        (lambda: plain.encode_batch(["a"], eos=True), "end of a text"),
        (lambda: plain.encode("a", allowed_special={"<x>"}), "'<x>' is no special token"),
        (lambda: tok.decode([600]), "600 is no id"),
        (lambda: tok.decode([-1]), "-1 is no id"),
        (lambda: BPETokenizer({b"a": 0}), "lack 255 of the 256"),
        (lambda: BPETokenizer(tok.ranks | {b"zzzzzz": 9999}), "each once"),
        (lambda: BPETokenizer(tok.ranks, special_tokens={"<x>": 5}), "ids of their own"),
        (lambda: BPETokenizer(tok.ranks, bos="<x>"), "no special token"),
    ):
        with pytest.raises(UserError, match=words):
            work()


def test_many_texts_keep_their_order(tok):
    rng = random.Random(0)
    texts = ["".join(rng.choices(AWKWARD, k=rng.randrange(300))) for _ in range(2000)] + ["", TEXT * 300, ""]
    got = tok.encode_batch(iter(texts))
    assert [tok.decode(ids) for ids in got] == texts
    assert got[:200] == [tok.encoding.encode_ordinary(t) for t in texts[:200]]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_rank_file_comes_back_whole(tok, tmp_path):
    tok.save(tmp_path / "t.model")
    again = BPETokenizer.load(tmp_path / "t.model")
    assert (again.ranks, again.pattern, again.special_tokens) == (tok.ranks, tok.pattern, tok.special_tokens)
    assert (again.bos_id, again.eos_id) == (598, 599)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.model", "t.model.json"]
    assert load_tiktoken_bpe(str(tmp_path / "t.model")) == tok.ranks


@given(text=anything)
@settings(max_examples=100, deadline=None)
def test_tokenizers_reads_our_json_with_the_same_ids(hf, tok, text):
    assert hf.encode(text).ids == tok.encode(text)


@pytest.fixture(scope="module")
def hf(tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tok.to_hf(path)
    again = BPETokenizer.from_hf(path)
    assert (again.ranks, again.pattern, again.special_tokens) == (tok.ranks, tok.pattern, tok.special_tokens)
    assert again.bos_id == 598 and again.eos_id == 599
    return tokenizers.Tokenizer.from_file(str(path))


def lines(ranks):
    return [base64.b64encode(t) + b" %d" % i for t, i in sorted(ranks.items(), key=lambda item: item[1])]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda x: x[:40], "ends after line 40 without the byte 0x28"),
        (lambda x: [*x[:300], b"YW"], "line 301"),
        (lambda x: [*x[:9], b"*** 9", *x[10:]], r"line 10: b'\*\*\*' is no base64"),
        (lambda x: x[:300] + x[299:], "line 301: this token already has rank 299"),
        (lambda x: [*x[:300], b"enp6 299", *x[301:]], "line 301: rank 299 stands for a second time"),
        (lambda x: x[:300] + x[301:], "line 301: rank 301 leaves a gap; 300 was expected"),
        (lambda x: [*x, b"enp6 -1"], "line 599: b'-1' is no rank"),
        (lambda x: [*x, b"enp6 99999999999999999999"], "is no rank"),
        (lambda x: [*x, b""], "line 599"),
        (lambda x: [b"\x1f\x8b\x08 zip"], "line 1"),
        (lambda x: [], "line 1: a token in base64"),
    ],
)
def test_a_damaged_rank_file_is_one_sentence(tok, tmp_path, damage, words):
    path = tmp_path / "t.model"
    path.write_bytes(b"\n".join(damage(lines(tok.ranks))) + b"\n")
    with pytest.raises(UserError, match=words) as error:
        BPETokenizer.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def change(**new):
    return lambda data: data | new


def steps(of):
    def change(d):
        pre = d["pre_tokenizer"]
        return d | {"pre_tokenizer": pre | {"pretokenizers": of(*pre["pretokenizers"])}}

    return change


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: json.dumps(d)[:5000], "no JSON at line 1, column"),
        (lambda d: "[1]", "no JSON object"),
        (lambda d: "[" * 100_000, "nested too deeply|no JSON"),
        (lambda d: b"\xff\xfe", "no UTF-8 at byte 0"),
        (change(model={"type": "Unigram"}), "another kind"),
        (change(normalizer={"type": "NFC"}), "normalizer"),
        (change(pre_tokenizer=None), "lacks"),
        (change(pre_tokenizer={"type": "Whitespace"}), "does not split text by a pattern"),
        (steps(lambda split, level: [split, split, level]), "and that alone"),
        (steps(lambda split, level: [split | {"behavior": "Removed"}, level]), "drops, joins or adds"),
        (steps(lambda split, level: [split, level | {"add_prefix_space": True}]), "drops, joins or adds"),
        (steps(lambda split, level: [split, level | {"use_regex": True}]), "GPT-2"),
        (lambda d: d | {"model": d["model"] | {"end_of_word_suffix": "</w>"}}, "option end_of_word_suffix"),
        (lambda d: d | {"model": d["model"] | {"ignore_merges": False, "merges": []}}, "no merge for 342 of its"),
        (lambda d: d | {"added_tokens": [{"id": "600", "content": "<a>"}]}, "'600', no whole number"),
        (lambda d: d | {"added_tokens": [{"id": 10**9, "content": "<a>"}]}, "too far behind"),
        (lambda d: d | {"model": d["model"] | {"vocab": d["model"]["vocab"] | {"日": 9999}}}, "stands for no byte"),
        (lambda d: d | {"model": d["model"] | {"merges": d["model"]["merges"][::-1]}}, "another order"),
        (lambda d: d | {"model": d["model"] | {"vocab": {"a": 0}, "merges": []}}, "lack 255"),
        (lambda d: {}, "lacks"),
    ],
)
def test_a_damaged_json_is_one_sentence(tok, tmp_path, damage, words):
    path = tmp_path / "tokenizer.json"
    tok.to_hf(path)
    damaged = damage(json.loads(path.read_text()))
    data = json.dumps(damaged) if isinstance(damaged, dict) else damaged
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError, match=words) as error:
        BPETokenizer.from_hf(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "extra, words",
    [
        ("{", "no JSON at line 1"),
        ('{"pattern": 3}', "wrong type"),
        ('{"pattern": "(" }', "no regular expression"),
        ('{"special_tokens": {"a": "b"}}', "no whole number"),
        ('{"colour": "red"}', "unknown field 'colour'"),
    ],
)
def test_a_damaged_companion_is_one_sentence(tok, tmp_path, extra, words):
    tok.save(tmp_path / "t.model")
    (tmp_path / "t.model.json").write_text(extra)
    with pytest.raises(UserError, match=words):
        BPETokenizer.load(tmp_path / "t.model")


def test_what_cannot_be_read_or_written_is_one_sentence(tok, tmp_path):
    with pytest.raises(UserError, match="no tokenizer file"):
        BPETokenizer.load(tmp_path / "none")
    with pytest.raises(UserError, match="cannot write"):
        tok.save(tmp_path / "no folder" / "t.model")
    with open(tmp_path / "huge.model", "wb") as file:
        os.truncate(file.fileno(), 1 << 33)
    with pytest.raises(UserError, match="8,589,934,592 bytes"):
        BPETokenizer.load(tmp_path / "huge.model")


def test_the_real_llama3_ranks(data_dir, tmp_path):
    path = data_dir / "llama3" / "tokenizer.model"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    tok = BPETokenizer.load(path)
    assert len(tok.ranks) == 128_000
    texts = [TEXT, "".join(AWKWARD), "a" * 5000, " " * 5000]
    for text, ids in zip(texts, tok.encode_batch(texts)):
        assert ids == tok.encode(text) == tok.encoding.encode_ordinary(text)
    tok.to_hf(tmp_path / "tokenizer.json")
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [peer.encode(t).ids for t in texts] == tok.encode_batch(texts)


def test_a_json_with_every_way_to_split_a_token_as_llama_3s_own(tok, tmp_path):
    path = tmp_path / "tokenizer.json"
    tok.to_hf(path)
    data, byte = json.loads(path.read_text()), byte_to_char()
    text = lambda token: "".join(byte[b] for b in token)
    splits = [(t[:i], t[i:]) for t in sorted(tok.ranks, key=tok.ranks.get) for i in range(1, len(t))]
    data["model"]["merges"] = [[text(a), text(b)] for a, b in splits if a in tok.ranks and b in tok.ranks]
    assert len(data["model"]["merges"]) > len(tok.ranks) - 256
    path.write_text(json.dumps(data))
    again = BPETokenizer.from_hf(path)
    assert (again.ranks, again.special_tokens) == (tok.ranks, tok.special_tokens)


def test_special_ids_behind_a_gap_are_the_same_in_hugging_faces_file(tok, tmp_path):
    special = {"<a>": len(tok.ranks), "<a>b": len(tok.ranks) + 1, "<z>": len(tok.ranks) + 44}
    ours = BPETokenizer(tok.ranks, special_tokens=special)
    ours.to_hf(tmp_path / "t.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    for name, i in special.items():
        assert theirs.encode(name).ids == ours.encode(name, allowed_special=[name]) == [i]
    assert BPETokenizer.from_hf(tmp_path / "t.json").special_tokens == special


@pytest.mark.parametrize("pattern", [r"(\w)\w*|\s+", r"(\w)+|\s+|[^\w\s]"])
def test_a_pattern_with_groups_loses_no_text(tok, pattern):
    grouped = BPETokenizer(tok.ranks, pattern=pattern)
    for text in ("hello world", "hello" + " " * 70_000):
        assert grouped.decode(grouped.encode(text)) == grouped.decode(grouped.encode_readably(text)) == text


@pytest.mark.parametrize("pattern", ["x?", "", "(", "(?r)a"])
def test_a_pattern_that_cannot_split_is_refused(tok, pattern):
    with pytest.raises(UserError, match="the split pattern"):
        BPETokenizer(tok.ranks, pattern=pattern)
    with pytest.raises(UserError, match="the split pattern"):
        BPETokenizer.train([TEXT], 300, pattern=pattern)


OUTSIDE = {
    "an end beyond the bytes": ([1, 2, 3], [0, 30_000_000]),
    "a begin before them": ([1, 2, 3], [-(10**9), 3]),
    "the same bytes again and again": ([97] * 600, [0, 600] * 30),
    "numbers that are no bytes": (np.array([10**9] * 4), [0, 4]),
    "every second byte": (np.zeros(8, np.uint8)[::2], [0, 4]),
    "no bounds": ([1, 2, 3], []),
    "bounds that are no whole numbers": ([1, 2, 3], [0.0, 3.0]),
}


@pytest.mark.parametrize(("data", "bounds"), OUTSIDE.values(), ids=OUTSIDE)
def test_kernels_get_no_bounds_beyond_the_bytes(tok, data, bounds):
    data = np.array(data, np.uint8) if isinstance(data, list) else data
    bounds = np.array(bounds) if bounds else np.array([], np.int64)
    with pytest.raises(ValueError, match="bounds whole numbers that rise from 0 or more to their end or less"):
        inspect.unwrap(need_texts)(data, bounds)
    for call in (tok._corpus.encode, WordCounts().count, lambda d, b: WordCounts().add(d, b, np.ones(1, np.int64))):
        with pytest.raises((ValueError, TypeCheckError)):
            call(data, bounds)


def test_as_many_counts_as_words():
    with pytest.raises(ValueError, match="3 counts for 2 words"):
        WordCounts().add(np.frombuffer(b"abcd", np.uint8), np.array([0, 2, 4]), np.ones(3, np.int64))


@pytest.mark.parametrize(("name", "words"), [("", "has no name"), ("<\ud83d>", "lone surrogate")])
def test_names_of_special_tokens_that_no_text_can_hold_are_refused(tok, name, words):
    with pytest.raises(UserError, match=words):
        BPETokenizer(tok.ranks, special_tokens={name: len(tok.ranks)})
    assert BPETokenizer(tok.ranks, special_tokens={"\t\t": len(tok.ranks)}).encode("\t\t", allowed_special=["\t\t"])
