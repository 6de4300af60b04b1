"""SentencePiece from scratch against the package: the same ids, the same text, the same files."""

import io
import struct
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_edu.errors import UserError
from llama_edu.tokenizer.sentencepiece import (
    Piece,
    PieceKind,
    SentencePieceModel,
    SentencePieceTokenizer,
    _decode_utf8,
    _field,
    _may_be_piece,
    _merge,
    _number,
    _varint,
    train_sentencepiece,
)

spm = pytest.importorskip("sentencepiece", reason="the sentencepiece package is not installed")

LINES = [
    *["the cat sat on the mat", "it's 1 don't,  a   b", "aaaa aaa baaa cabab ababab"] * 4,
    *["日本語とカナ、漢字 ー 2024年", "مرحبا بالعالم", "e\u0301te\u0301 नमस्ते"] * 3,
    *["def f(x):    return x + 10", "привет мир"] * 3,
    "rare☺ <s> </s> <0x41> <unk>",
]
LLAMA = {
    "model_type": "bpe",
    "split_digits": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 1.0,
    "minloglevel": 2,
}


def package_file(lines=LINES, vocab_size=420, **changes) -> bytes:
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=vocab_size, **{**LLAMA, **changes}
    )
    return out.getvalue()


SETTINGS = {
    "llama": {},
    "rare characters to bytes": {"character_coverage": 0.98},
    "no dummy prefix": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 170},
    "digits together": {"split_digits": False},
    "user-defined": {"user_defined_symbols": ["<step>", "<st", "▁cat"], "vocab_size": 425},
    "control": {"control_symbols": ["<pad2>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], "vocab_size": 425},
    "other ids": {"unk_id": 5, "bos_id": 0, "eos_id": 1, "pad_id": 2, "unk_surface": "?"},
}


@pytest.fixture(scope="module")
def pairs() -> dict:
    """Every kind of model the package trains under settings like Llama's, read by the package and by us."""
    files = {name: package_file(**changes) for name, changes in SETTINGS.items()}
    return {
        name: (
            spm.SentencePieceProcessor(model_proto=data),
            SentencePieceTokenizer(SentencePieceModel.from_bytes(data)),
        )
        for name, data in files.items()
    }


# Arbitrary Unicode, and text made of what the vocabulary knows, so that merges happen.
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
familiar = st.lists(
    st.sampled_from(
        [
            *"abcdeht 0123▁\t\n\0☺🏽\u200dé\u0301日本ーカمر",
            "the",
            " cat",
            "  ",
            "aaa",
            "<step>",
            "<s>",
            "</s>",
            "<0x41>",
        ]
    ),
    max_size=40,
).map("".join)


@pytest.mark.parametrize("name", SETTINGS)
@given(text=anything | familiar)
@settings(max_examples=80, deadline=None)
@example(text="")
@example(text=" ")
@example(text="▁")
@example(text="\u2585 \ufffd \ufeff \U0010ffff")
@example(text="👩‍👩‍👧‍👦 🏳️‍🌈 שָׁלוֹם a\u0301\u0323")
def test_encode_and_decode_as_the_package(pairs, name, text):
    theirs, ours = pairs[name]
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", SETTINGS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_decode_any_ids_as_the_package(pairs, name, data):
    theirs, ours = pairs[name]
    byte = st.sampled_from([i for i, p in enumerate(ours.model.pieces) if p.kind == PieceKind.BYTE] or [0])
    ids = data.draw(st.lists(st.integers(0, ours.n_vocab - 1) | byte, max_size=12))
    assert ours.decode(ids) == theirs.decode(ids)
    stream = ours.stream()
    parts = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(parts) == ours.decode(ids)


@given(text=anything | familiar)
@settings(deadline=None)
def test_text_comes_back(pairs, text):
    ours = pairs["llama"][1]
    ids = ours.encode(text)
    assert ours.decode(ids) == text.replace("▁", " ")  # the one character that stands for another
    assert ours.decode_bytes(ids).decode() == ours.decode(ids)
    assert not set(ids) & set(ours.special_tokens.values())


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "ab" * 500_000, "🦙" * 250_000, "cat " * 250_000])
def test_long_runs(pairs, text):
    theirs, ours = pairs["llama"]
    assert ours.encode(text) == theirs.encode(text)


def test_lone_surrogate_is_named(pairs):
    with pytest.raises(UserError, match=r"character 2 of the text is U\+D800, half of a surrogate pair"):
        pairs["llama"][1].encode("a\ud800b")
    with pytest.raises(UserError, match="surrogate"):
        train_sentencepiece(["\udfff"], 300)


def test_begin_end_and_special_names(pairs):
    ours = pairs["llama"][1]
    assert ours.encode_batch(["a", "b"], eos=True) == [[*ours.encode("a"), 2], [*ours.encode("b"), 2]]
    plain = ours.encode("the cat")
    assert ours.encode("the cat", bos=True, eos=True) == [1, *plain, 2]
    assert ours.encode("</s>") == pairs["llama"][0].encode("</s>")
    assert ours.encode("<s>the cat</s>", allowed_special={"<s>", "</s>"})[0::99] == [1]
    assert ours.encode("the cat</s>", allowed_special={"</s>"}) == [*plain, 2]
    with pytest.raises(UserError, match="'<pad>' is no special piece"):
        ours.encode("x", allowed_special={"<pad>"})
    with pytest.raises(UserError, match="id 420 is not in the vocabulary"):
        ours.decode([420])
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (0, 1, 2, -1, {2})


@pytest.fixture(scope="module")
def hugging_face(pairs):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pieces = pairs["llama"][1].model.pieces
    ids = {p.text: i for i, p in enumerate(pieces)}
    merges = [
        (p.text[:k], p.text[k:])
        for p in pieces
        if p.kind == PieceKind.NORMAL
        for k in range(1, len(p.text))
        if p.text[:k] in ids and p.text[k:] in ids
    ]
    return transformers.LlamaTokenizer(vocab=ids, merges=merges, legacy=False)


@given(text=familiar.filter(lambda t: "s>" not in t))
@settings(max_examples=100, deadline=None)
def test_ids_are_transformers(pairs, hugging_face, text):
    """Its LlamaTokenizer departs from SentencePiece where a text begins with a space: it adds no second one."""
    ours = pairs["llama"][1]
    text = text.lstrip(" ▁")
    ids = hugging_face.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids
    if text:
        assert hugging_face.encode(" " + text, add_special_tokens=False) == ids


def test_a_vocabulary_without_begin():
    tok = SentencePieceTokenizer(SentencePieceModel.from_bytes(package_file(bos_id=-1)))
    assert tok.bos_id is None and tok.encode("a", eos=True)[-1] == tok.eos_id
    with pytest.raises(UserError, match="no special piece '<s>'"):
        tok.encode("a", bos=True)


# --- infilling ----------------------------------------------------------------------------------------


@given(text=familiar)
@settings(deadline=None)
def test_infilling_is_metas_smiley(pairs, text):
    """Code Llama's own code encodes a smiley before the text and drops two ids: the space and the smiley."""
    theirs, ours = pairs["llama"]
    assert len(theirs.encode("☺")) == 2
    ids = theirs.encode("☺" + text)[2:]
    assert ours.encode_infilling(text) == ids
    assert ours.decode_infilling(ids) == theirs.decode([theirs.piece_to_id("☺"), *ids])[1:]


def test_infill_prompt(pairs):
    theirs, ours = pairs["control"]
    pre, suf, mid, eot = (theirs.piece_to_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID", "EOT"))
    before, after = theirs.encode("def f("), theirs.encode("☺):")[2:]
    assert ours.infill_prompt("def f(", "):") == [1, pre, *before, suf, *after, mid]
    assert ours.infill_prompt("def f(", "):", suffix_first=True) == [1, pre, suf, *after, mid, *before]
    assert ours.special_tokens["▁<EOT>"] == eot
    with pytest.raises(UserError, match="no piece '▁<PRE>'"):
        pairs["llama"][1].infill_prompt("a", "b")


def test_infilling_names_in_text_stay_text():
    """Even where the file calls them user-defined, for which the package would find them in text."""
    data = package_file(vocab_size=425, user_defined_symbols=["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    theirs = spm.SentencePieceProcessor(model_proto=data)
    ours = SentencePieceTokenizer(SentencePieceModel.from_bytes(data))
    assert theirs.piece_to_id("▁<MID>") in theirs.encode("a <MID>")
    assert not set(ours.encode("a <MID>")) & set(ours.special_tokens.values())


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_files_come_back_byte_for_byte(name, tmp_path):
    data = package_file(**SETTINGS[name])
    tok = SentencePieceTokenizer(SentencePieceModel.from_bytes(data))
    tok.save(tmp_path / "x.model")
    assert (tmp_path / "x.model").read_bytes() == data
    assert SentencePieceTokenizer.load(tmp_path / "x.model").model == tok.model


@given(text=anything | familiar)
@settings(max_examples=60, deadline=None)
def test_the_package_reads_our_files(ours_read_by_both, text):
    theirs, ours = ours_read_by_both
    assert theirs.encode(text) == ours.encode(text)


@pytest.fixture(scope="module")
def ours_read_by_both(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ours.model"
    SentencePieceTokenizer.train(LINES, 380).save(path)
    return spm.SentencePieceProcessor(model_file=str(path)), SentencePieceTokenizer(path)


@pytest.mark.parametrize("vocab_size", [350, 395])
def test_trainer_writes_the_packages_file(vocab_size):
    lines = [line for line in LINES if "<s>" not in line]
    ours = train_sentencepiece(["\n".join(lines)], vocab_size, character_coverage=1.0).to_bytes()
    assert ours == package_file(lines, vocab_size)


@pytest.mark.parametrize("vocab_size", [400, 1000, pytest.param(4000, marks=pytest.mark.slow)])
def test_trainer_writes_the_packages_file_for_shakespeare(data_dir, vocab_size):
    lines = [line for line in (data_dir / "tinyshakespeare.txt").read_text()[:200_000].split("\n") if line]
    ours = train_sentencepiece(lines, vocab_size, character_coverage=0.9995).to_bytes()
    assert ours == package_file(lines, vocab_size, character_coverage=0.9995)


def test_training_never_makes_a_special_name_a_piece():
    model = train_sentencepiece(["<s> </s> <s>" for _ in range(50)] + ["ss ss s/ /s"] * 9, 265)
    assert [p.kind for p in model.pieces if p.text == "<s>"] == [PieceKind.CONTROL]
    with pytest.raises(UserError, match=r"vocab_size is 260, but 259 special pieces and \d+ characters need"):
        train_sentencepiece(LINES, 260)
    with pytest.raises(UserError, match=r"the text gives 2\d\d pieces"):
        train_sentencepiece(["abab"], 300)


GOOD = train_sentencepiece(LINES, 380).to_bytes()
START = SentencePieceModel.from_bytes(GOOD).pieces
DAMAGE = {
    "empty": (b"", "byte 0 of one is 0x0a, and this is empty"),
    "rank file": (b"IQ== 0\nIg== 1\n", "begins with 0x49; rank files.* are read by Llama3Tokenizer"),
    "cut in a piece": (GOOD[:100], "announces .* bytes at byte .*, but .* follow"),
    "cut between pieces": (GOOD[:16], "ends at byte 16 without its settings"),
    "two gigabytes": (b"\n\x0e\n" + _varint(2**31) + GOOD[3:], "announces 2,147,483,648 bytes at byte 2"),
    "2**70": (b"\n" + b"\xff" * 10 + GOOD[3:], "a number of more than ten bytes at byte 1"),
    "ends in a number": (GOOD + b"\x80", f"ends inside a number, at byte {len(GOOD)}"),
    "wire type": (GOOD + b"\x0b", f"unknown wire type 3 at byte {len(GOOD)}"),
    "piece as a number": (GOOD + b"\x08\x01", f"another type than the format says, at byte {len(GOOD)}"),
    "twice": (GOOD + _field(1, _field(1, "▁the".encode())), f"has the piece '▁the' twice, as id .*at byte {len(GOOD)}"),
    "no text": (GOOD + _field(1, _field(2, 1.0)), f"a piece without text at byte {len(GOOD)}"),
    "no UTF-8": (GOOD + _field(1, _field(1, b"ab\xff")), f"no UTF-8 at byte {len(GOOD) + 6}"),
    "nan": (GOOD + _field(1, _field(1, b"xyz") + _field(2, float("nan"))), "the score nan; a score is a finite number"),
    "inf": (GOOD + _field(1, _field(1, b"xyz") + _field(2, float("-inf"))), "the score -inf"),
    "score of 8 bytes": (GOOD + _field(1, b"\n\x01q" + b"\x11" + struct.pack("<d", 1)), "field 2 of another type"),
    "kind 9": (GOOD + _field(1, _field(1, b"xyz") + _field(3, 9)), "the kind 9; known are 1 to 4 and 6"),
    "second unknown": (GOOD + _field(1, _field(1, b"xyz") + _field(3, 2)), "has 2 pieces of kind UNKNOWN"),
    "odd byte": (GOOD + _field(1, _field(1, b"xyz") + _field(3, 6)), "257 byte pieces .* 'xyz' is out of place"),
    "byte missing": (GOOD.replace(b"<0x41>", b"<0x4g>"), "'<0x41>' is missing|'<0x4g>' is out of place"),
    "unigram": (GOOD + _field(2, _field(3, 1)), "says model type unigram"),
    "suffix": (GOOD + _field(2, _field(24, 1)), "treat_whitespace_as_suffix"),
    "normalizer": (GOOD + _field(3, _field(2, b"map")), "holds a normalizer of 3 bytes"),
    "denormalizer": (GOOD + _field(5, _field(2, b"map")), "holds a normalizer of 3 bytes"),
    "extra spaces": (GOOD + _field(3, _field(4, 1)), "remove_extra_whitespaces"),
    "unescaped": (GOOD + _field(3, _field(5, 0)), "not to escape spaces"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_sentence_with_the_place(what, tmp_path):
    data, words = DAMAGE[what]
    path = tmp_path / "bad.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        SentencePieceTokenizer(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@given(st.integers(0, len(GOOD)), st.binary(max_size=4))
@settings(max_examples=60, deadline=None)
def test_damage_anywhere_is_a_user_error_or_a_tokenizer(at, junk):
    try:
        model = SentencePieceModel.from_bytes(GOOD[:at] + junk + GOOD[at + len(junk) :])
        SentencePieceTokenizer(model).encode("the cat")
    except UserError:
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "holds a normalizer"),
        ({"model_type": "unigram", "vocab_size": 334}, "says model type unigram"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
    ],
)
def test_files_of_other_kinds_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        SentencePieceModel.from_bytes(package_file(**changes))


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.model"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(UserError, match="larger than 67,108,864 bytes"):
        SentencePieceTokenizer(path)


# --- parts --------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1))
def test_numbers_come_back(n):
    data = _varint(n)
    assert _number(data, 0, len(data), "x") == (n, len(data))


@given(st.text("abc", max_size=30), st.dictionaries(st.text("abc", min_size=2, max_size=5), st.integers(-5, 5)))
def test_merge_is_the_plain_rule(text, priority):
    priority = {piece: float(p) for piece, p in priority.items()}
    plain = list(text)
    while pairs := [(priority[a + b], i) for i, (a, b) in enumerate(pairwise(plain)) if a + b in priority]:
        i = min(pairs)[1]
        plain[i : i + 2] = [plain[i] + plain[i + 1]]
    assert _merge(list(text), priority) == plain


@given(st.binary(max_size=12))
def test_utf8_whole_characters_only(data):
    text, held = _decode_utf8(data)
    assert data.endswith(held) and len(held) < 4
    assert _decode_utf8(text.encode()) == (text, b"")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("▁the", 1), ("the,", 0), ("▁▁", 1), ("▁▁a", 0), ("12", 0), ("e\u0301", 1), ("かカ漢", 1), ("a" * 17, 0)],
)
def test_what_may_be_a_piece(text, allowed):
    assert _may_be_piece(text) == allowed


def test_piece_defaults():
    assert Piece("a") == Piece("a", 0.0, PieceKind.NORMAL)
    assert START[0] == Piece("<unk>", 0.0, PieceKind.UNKNOWN)
