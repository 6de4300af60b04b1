"""Streams and mixtures: the same sequences by any way of reading, exact shares, and mistakes told in a sentence."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from bytes_tokenizer import Bare, BytesTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu.data import (
    Batches,
    PackedSequences,
    TokenFile,
    TokenShards,
    TokenStream,
    best_fit,
    document_positions,
    open_stream,
    open_tokens,
    read_ahead,
    sequential_batches,
    write_tokens,
)
from llama_edu.data.mixture import BLOCK, Mixture, reversed_below, reversed_bits
from llama_edu.data.shuffle import shuffled
from llama_edu.data.tokens import IGNORE
from llama_edu.errors import UserError


class Numbers:
    """A source whose only content is the number of a sequence."""

    seq_len = 1

    def __init__(self, n_sequences: int) -> None:
        self.n_sequences = n_sequences

    def take(self, numbers):
        return tuple(torch.from_numpy(numbers)[:, None] for _ in range(3))

    def fingerprint(self, until=None):
        return str(self.n_sequences)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The same documents as one shard and as four, and two further sources."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"document {i} " * (i % 7 + 1) for i in range(60)]
    write_tokens(texts, BytesTokenizer(), folder / "whole")
    for part in range(4):
        write_tokens(texts[15 * part : 15 * part + 15], BytesTokenizer(), folder / "parts" / f"shard-{part}")
    write_tokens([f"code {i}; " * 9 for i in range(20)], BytesTokenizer(), folder / "code")
    write_tokens([f"other {i}" for i in range(20)], Bare(), folder / "other")
    return folder


def same(one, two) -> bool:
    return all(map(torch.equal, one, two))


# --- shards -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 300))
def test_shards_read_as_the_whole(corpus, start, seq_len):
    whole, shards = TokenFile(corpus / "whole"), open_tokens(corpus / "parts")
    starts = np.array([start, max(0, start - 7), whole.n_tokens - 1])
    assert same(whole.windows(starts, seq_len), shards.windows(starts, seq_len))


def test_shards_know_what_the_whole_knows(corpus):
    whole, shards = TokenFile(corpus / "whole"), open_tokens(corpus / "parts")
    for name in ("n_tokens", "n_documents", "n_bytes", "vocab_size", "tokenizer_sha256"):
        assert getattr(whole, name) == getattr(shards, name)
    assert whole.bounds().tolist() == shards.bounds().tolist()
    pairs = zip(sequential_batches(whole, 3, 50), sequential_batches(shards, 3, 50))
    assert all(same(a, b) for a, b in pairs)
    shards.verify()
    listed = open_tokens([corpus / "parts" / f"shard-{i}" for i in range(4)])
    assert listed.tokens_sha256 == shards.tokens_sha256


def test_shards_of_two_tokenizers_are_not_mixed(corpus):
    with pytest.raises(UserError, match="two tokenizers"):
        open_tokens([corpus / "whole", corpus / "other"])
    with pytest.raises(UserError, match="'a' and 'b' were written by two tokenizers"):
        sources = {"a": str(corpus / "whole"), "b": str(corpus / "other")}
        open_stream({"sources": sources, "weights": {"a": 0.5, "b": 0.5}}, seq_len=8, seed=0)


def test_a_flipped_bit_in_a_shard_is_found(corpus, tmp_path):
    folder = tmp_path / "set"
    for i in range(2):
        write_tokens(["some text"], BytesTokenizer(), folder / f"shard-{i}")
    data = bytearray((folder / "shard-1" / "tokens.bin").read_bytes())
    data[3] ^= 16
    (folder / "shard-1" / "tokens.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"shard-1.*changed"):
        open_tokens(folder).verify()
    (folder / "shard-1" / "tokens.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"meta.json says"):
        open_tokens(folder)


# --- rows -------------------------------------------------------------------------------------------------------------


def mixture_spec(corpus, **more):
    sources = {"prose": str(corpus / "parts"), "code": [str(corpus / "code")]}
    return {"sources": sources, "weights": {"prose": 0.8, "code": 0.2}, **more}


def streams(corpus):
    changes = [{"at": 16 * 100, "weights": {"prose": 0.3, "code": 0.7}}, {"at": 16 * 333 - 3, "weights": {"code": 1.0}}]
    return {
        "file": open_stream(corpus / "whole", seq_len=16, seed=3),
        "shards": open_stream(corpus / "parts", seq_len=16, seed=3),
        "packed": open_stream(corpus / "parts", seq_len=16, seed=3, packing="best-fit"),
        "mixture": open_stream(mixture_spec(corpus, changes=changes), seq_len=16, seed=3),
        "packed mixture": open_stream(mixture_spec(corpus, changes=changes), seq_len=16, seed=3, packing="best-fit"),
    }


@pytest.mark.parametrize("kind", ["file", "shards", "packed", "mixture", "packed mixture"])
def test_a_sequence_is_a_function_of_its_number(corpus, kind):
    one, two = streams(corpus)[kind], streams(corpus)[kind]
    assert isinstance(one, TokenStream)
    assert one.fingerprint() == two.fingerprint()
    whole = one.rows(0, 500)
    for first, count in ((0, 1), (99, 3), (332, 2), (64, 64), (499, 1), (130, 300)):
        assert same(two.rows(first, count), tuple(part[first : first + count] for part in whole))
    far = one.rows(10**9, 4)
    assert far.tokens.shape == (4, 16) and same(far, two.rows(10**9, 4))


def test_rows_of_shards_and_of_the_whole_are_the_same(corpus):
    found = streams(corpus)
    assert same(found["file"].rows(123, 77), found["shards"].rows(123, 77))


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_any_number_of_readers_gives_the_same_order(corpus, readers):
    stream = streams(corpus)["mixture"]
    shares = [(10 * i, 10) for i in range(12)]
    assert all(
        same(batch, stream.rows(first, count))
        for batch, (first, count) in zip(
            read_ahead(stream, iter(shares), readers=readers, ahead=3), shares, strict=True
        )
    )
    endless = read_ahead(stream, ((i, 1) for i in itertools.count()), readers=readers)
    assert same(next(endless), stream.rows(0, 1))
    endless.close()


def test_every_fingerprint_differs_and_the_future_may_change(corpus):
    prints = [stream.fingerprint() for stream in streams(corpus).values()]
    prints += [open_stream(corpus / "whole", seq_len=16, seed=4).fingerprint()]
    prints += [open_stream(corpus / "whole", seq_len=8, seed=3).fingerprint()]
    prints += [open_stream(mixture_spec(corpus), seq_len=16, seed=3).fingerprint()]
    assert len(set(prints)) == len(prints)
    plain = open_stream(mixture_spec(corpus), seq_len=16, seed=3)
    sources = {**mixture_spec(corpus)["sources"], "late": str(corpus / "whole")}
    later = [{"at": 1600, "weights": {"late": 1.0}}]
    changed = open_stream({**mixture_spec(corpus, changes=later), "sources": sources}, seq_len=16, seed=3)
    assert plain.fingerprint(until=100) == changed.fingerprint(until=100)
    assert plain.fingerprint(until=101) != changed.fingerprint(until=101)
    assert same(plain.rows(0, 100), changed.rows(0, 100))


# --- mixtures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3000))
def test_counting_reversed_numbers(limit, n):
    assert reversed_below(limit, n) == (reversed_bits(np.arange(n)) < limit).sum()


parts = st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(any)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(parts, min_size=1, max_size=3), st.lists(st.integers(1, 700), min_size=2, max_size=2), st.integers(0, 99)
)
def test_shares_are_exact_and_nothing_is_skipped_or_repeated(shares, lengths, seed):
    k = max(map(len, shares))
    shares = [share + [0] * (k - len(share)) for share in shares]
    used = [any(share[i] for share in shares) for i in range(k)]
    names = [f"s{i}" for i in range(k) if used[i]]
    starts = [0, *itertools.accumulate(lengths)][: len(shares)]
    phases = [
        (start, {f"s{i}": share[i] / sum(share) for i in range(k) if used[i]}) for start, share in zip(starts, shares)
    ]
    mixture = Mixture({name: Numbers(5 + i) for i, name in enumerate(names)}, phases, seed)
    n = starts[-1] + 500
    which, number = mixture.draw(0, n)
    for i, name in enumerate(names):
        assert np.sort(number[which == i]).tolist() == list(range((which == i).sum()))
        assert mixture.drawn(n)[name] == (which == i).sum()
        for (start, weights), end in zip(phases, [*starts[1:], n]):
            whole = (end - start) // BLOCK * BLOCK
            drawn = (which[start : start + whole] == i).sum()
            assert abs(drawn - whole * weights[name]) <= 2 + math.log2(whole // BLOCK + 1)
    first, count = n // 3, n // 2
    assert all(np.array_equal(a, b[first : first + count]) for a, b in zip(mixture.draw(first, count), (which, number)))


def test_shares_stay_exact_far_away():
    weights = dict(zip("abcdefg", (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02)))
    mixture = Mixture({name: Numbers(1000) for name in weights}, [(0, weights)], 0)
    for n in (64, 6400, 10**6, 10**9 + 7):
        drawn = mixture.drawn(n)
        assert sum(drawn.values()) == n
        assert all(abs(drawn[name] - n * w) < 10 for name, w in weights.items())
    assert mixture.epochs(1000)["a"] == mixture.drawn(1000)["a"] / 1000


def test_the_order_of_today_is_the_order_of_tomorrow():
    """A run is resumed by its number alone: another order in a later version would repeat and skip data unseen."""
    assert shuffled(np.arange(10), 10, 0, 0).tolist() == [4, 8, 5, 6, 7, 9, 2, 0, 1, 3]
    assert shuffled(np.arange(3), 10**6, 5, 7).tolist() == [481476, 701615, 848967]
    mixture = Mixture({"a": Numbers(9), "b": Numbers(9)}, [(0, {"a": 0.75, "b": 0.25}), (100, {"a": 0.5, "b": 0.5})], 0)
    which, number = mixture.draw(96, 10)
    assert which.tolist() == [1, 0, 1, 1, 1, 1, 1, 0, 0, 1]
    assert number.tolist() == [21, 75, 22, 23, 24, 25, 26, 76, 77, 27]


def test_llama_1_epochs_follow_from_its_weights(corpus):
    """arXiv 2302.13971, table 1, for 1.4T tokens: with sources of that many tokens come out that many epochs."""
    table = {"cc": (0.67, 1.10), "github": (0.045, 0.64), "wikipedia": (0.045, 2.45), "rest": (0.24, 1.05)}
    n = 10**6
    sources = {name: Numbers(round(weight * n / epochs)) for name, (weight, epochs) in table.items()}
    found = Mixture(sources, [(0, {name: weight for name, (weight, _) in table.items()})], 1).epochs(n)
    assert all(abs(found[name] - epochs) < 1e-3 for name, (_, epochs) in table.items())


W = {"prose": 0.8, "code": 0.2}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weights": {"prose": 0.8, "code": 0.3}}, r"sum to 1.1, not to 1; divide each by 1.1"),
        ({"weights": {"prose": 80, "code": 20}}, r"sum to 100, not to 1; divide each by 100"),
        ({"weights": {"prose": 0.8, "cod": 0.2}}, r"a weight for 'cod', but its sources are prose, code"),
        ({"weights": {"prose": 1.2, "code": -0.2}}, r"weight of 'code' is -0.2; it must be a number, 0 or larger"),
        ({"weights": {"prose": math.nan, "code": 1}}, r"weight of 'prose' is nan"),
        ({"weights": {"prose": "0.8", "code": 0.2}}, r"weight of 'prose' is '0.8'"),
        ({"weights": {"prose": 1.0}}, r"'code' never has a weight above 0"),
        ({"weights": {"prose": 10**400, "code": 1}}, r"weight of 'prose' is 10+; it must be"),
        ({"sources": {"prose": "a", "code": 5}}, r"source 'code' of the mixture is 5; it must be a path"),
        ({"sources": {"prose": "a", "code": None}}, r"source 'code' of the mixture is None"),
        ({"sources": {"prose": "a", "code": [5]}}, r"source 'code' of the mixture is 5"),
        ({"changes": 5}, r"changes of the mixture are 5; they must be a list"),
        ({"changes": None}, r"changes of the mixture are None"),
        ({"changes": [{"at": 160, "weights": 5}]}, r"has the weights 5; give it a number for each source"),
        ({"changes": [{"at": 1e30, "weights": W}]}, r"at 1e\+30; a mixture of sequences of 16 tokens ends at"),
        ({5: 1}, r"a mixture has no field 5"),
        ({"weights": {}}, r"sum to 0, not to 1"),
        ({"weights": None}, r"has no weights"),
        ({"sources": {}}, r"mixture is empty"),
        ({"wieghts": {}}, r"no field 'wieghts'"),
        ({"changes": [{"at": 320, "weights": W}, {"at": 160, "weights": W}]}, r"at 160 tokens, after a change at 320"),
        ({"changes": [{"at": 0, "weights": W}]}, r"changes at 0 tokens"),
        ({"changes": [{"at": 33, "weights": W}, {"at": 34, "weights": W}]}, r"a sequence of 16 tokens apart"),
        ({"changes": [{"at": 1.5, "weights": W}]}, r"at 1.5; it must be a whole number"),
        ({"changes": [{"weights": W}]}, r"two fields, 'at' \(tokens\) and 'weights'"),
        ({"changes": [{"at": 160, "weights": {"prose": 0.5}}]}, r"sum to 0.5"),
        ({"sources": {"prose": "/no/where", "code": "/no/where"}}, r"there is no folder /no/where"),
    ],
)
def test_a_bad_mixture_is_refused_in_a_sentence(corpus, change, words):
    with pytest.raises(UserError, match=words) as caught:
        open_stream({**mixture_spec(corpus), **change}, seq_len=16, seed=0)
    assert "\n" not in str(caught.value)


def test_a_mixture_may_be_a_plain_mapping_or_a_file(corpus):
    plain = open_stream({str(corpus / "parts"): 0.8, str(corpus / "code"): 0.2}, seq_len=16, seed=0)
    assert plain.rows(0, 10).tokens.shape == (10, 16)
    expected = open_stream(mixture_spec(corpus, changes=[{"at": 640, "weights": {"code": 1}}]), seq_len=16, seed=0)
    spec = {"sources": {"prose": "parts", "code": ["code"]}, "weights": W}
    (corpus / "mix.json").write_text(json.dumps({**spec, "changes": [{"at": 640, "weights": {"code": 1}}]}))
    (corpus / "mix.toml").write_text(
        'sources = {prose = "parts", code = ["code"]}\nweights = {prose = 0.8, code = 0.2}\n'
        "[[changes]]\nat = 640\nweights = {code = 1}\n"
    )
    (corpus / "mix.yaml").write_text(
        "sources: {prose: parts, code: [code]}\nweights: {prose: 0.8, code: 0.2}\n"
        "changes:\n- at: 640\n  weights: {code: 1}\n"
    )
    for suffix in ("json", "toml", "yaml"):
        stream = open_stream(corpus / f"mix.{suffix}", seq_len=16, seed=0)
        assert stream.fingerprint() == expected.fingerprint()
    (corpus / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad.json is no json"):
        open_stream(corpus / "bad.json", seq_len=16, seed=0)
    (corpus / "list.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        open_stream(corpus / "list.json", seq_len=16, seed=0)
    for content, words in (("sources: {a: 5}", "'a' of the mixture is 5"), ("5: 1.0", "has 5 where a path is due")):
        (corpus / "odd.yaml").write_text(content)
        with pytest.raises(UserError, match=words):
            open_stream(corpus / "odd.yaml", seq_len=16, seed=0)


# --- too little -------------------------------------------------------------------------------------------------------


class OneToken(BytesTokenizer):
    bos_id = eos_id = None

    def encode(self, text, *, bos=False, eos=False):
        return list(text.encode())


def test_a_corpus_of_one_token_and_a_sequence_longer_than_the_data(tmp_path, corpus):
    write_tokens(["a"], OneToken(), tmp_path / "one")
    with pytest.raises(UserError, match="has 1 tokens, less than the 5"):
        open_stream(tmp_path / "one", seq_len=4, seed=0)
    with pytest.raises(UserError, match=r"no document in .* has two tokens"):
        open_stream(tmp_path / "one", seq_len=4, seed=0, packing="best-fit")
    with pytest.raises(UserError, match="less than the 1000001"):
        open_stream(corpus / "whole", seq_len=1_000_000, seed=0)
    for seq_len, words in ((0, "seq_len is 0"), (-1, "seq_len is -1")):
        with pytest.raises(UserError, match=words):
            open_stream(corpus / "whole", seq_len=seq_len, seed=0)
    with pytest.raises(UserError, match="packing is 'first-fit'"):
        open_stream(corpus / "whole", seq_len=4, seed=0, packing="first-fit")


def test_an_id_outside_of_the_vocabulary_is_refused(tmp_path):
    class Wild(BytesTokenizer):
        def encode(self, text, *, bos=False, eos=False):
            return [70_000]

    with pytest.raises(UserError, match=r"the id 70000, but its vocabulary has 258 tokens"):
        write_tokens(["a"], Wild(), tmp_path / "wild")
    assert not list(tmp_path.iterdir())


# --- packing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_keeps_every_piece_within_the_capacity(lengths):
    array = np.array(lengths, dtype=np.int64)
    bins = best_fit(array, 20)
    assert sorted(piece for one in bins for piece in one) == list(range(len(lengths)))
    assert all(array[one].sum() <= 20 for one in bins)
    half_empty = sum(array[one].sum() <= 10 for one in bins)
    assert half_empty <= 1  # two such bins would have been one


@pytest.mark.parametrize("seq_len", [1, 7, 16, 64, 500])
def test_packed_rows_ask_every_question_once_and_mix_no_documents(corpus, seq_len):
    tokens = open_tokens(corpus / "parts")
    stream = PackedSequences(tokens, seq_len, seed=1)
    batch = stream.rows(0, stream.n_sequences)
    real = batch.targets != IGNORE
    assert torch.equal(real, batch.document_ids >= 0)
    bounds, text = tokens.bounds(), TokenFile(corpus / "whole").tokens
    asked = sorted(zip(batch.document_ids[real].tolist(), batch.tokens[real].tolist(), batch.targets[real].tolist()))
    expected = [(d, int(text[i]), int(text[i + 1])) for d in range(60) for i in range(bounds[d], bounds[d + 1] - 1)]
    assert asked == sorted(expected)
    assert stream.waste == pytest.approx(1 - len(expected) / batch.tokens.numel())
    fits = {d for d in range(60) if bounds[d + 1] - bounds[d] - 1 <= seq_len}
    rows = [set(row.tolist()) - {-1} for row in batch.document_ids]
    assert all(sum(d in row for row in rows) == 1 for d in fits)


def test_positions_restart_at_each_document():
    ids = torch.tensor([[4, 4, 5, 5, 5, -1], [1, 2, 2, 1, 1, 1]])
    assert document_positions(ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]]
    assert document_positions(ids[:, :1]).tolist() == [[0], [0]]


def test_no_shards_at_all(tmp_path):
    with pytest.raises(UserError, match="no shards"):
        TokenShards([])
    with pytest.raises(UserError, match="holds no tokens"):
        open_tokens(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        open_tokens(tmp_path / "none")


def test_a_stream_of_a_file_is_what_batches_gives(corpus):
    file = TokenFile(corpus / "whole")
    assert same(Batches(file, 4, 16, seed=3).batch(9), open_stream(corpus / "whole", seq_len=16, seed=3).rows(36, 4))
