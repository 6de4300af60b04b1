"""Token shards and batches: nothing is lost, nothing is seen twice, damage is told, order is a function of the step."""

import hashlib
import json
import math
import os
import tracemalloc

import numpy as np
import pytest
import torch
from bytes_tokenizer import Bare, BytesTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu.data import Batches, TokenFile, TokenShards, sequential_batches, tokenizer_hash, write_tokens
from llama_edu.data.tokens import IGNORE, shuffled
from llama_edu.errors import UserError


@pytest.fixture
def shard(tmp_path):
    return write_tokens([f"document {i} " * (i % 7 + 1) for i in range(40)], BytesTokenizer(), tmp_path / "shard")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=40)))
def test_documents_come_back(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tokens") / "shard"
    if not any(texts):
        with pytest.raises(UserError, match="no text"):
            write_tokens(texts, BytesTokenizer(), folder)
        assert not list(folder.parent.iterdir())
        return
    file = write_tokens(texts, BytesTokenizer(), folder)
    file.verify()
    back = [file.tokens[a:b].tolist() for a, b in zip(file.documents[:-1], file.documents[1:])]
    kept = [text for text in texts if text]
    assert back == [[256, *text.encode("utf-8", "surrogatepass"), 257] for text in kept]
    assert file.n_bytes == sum(len(text.encode("utf-8", "surrogatepass")) for text in kept)
    assert (file.n_documents, file.n_tokens) == (len(kept), file.n_bytes + 2 * len(kept))


def test_width_of_an_id_follows_the_vocabulary(tmp_path, shard):
    assert shard.tokens.dtype == np.uint16
    wide = write_tokens(["abc", "d"], Bare(), tmp_path / "wide")
    assert wide.tokens.dtype == np.uint32
    assert wide.tokens.tolist() == [69_097, 69_098, 69_099, 69_100]
    assert wide.documents.tolist() == [0, 3, 4]


def test_memory_does_not_grow_with_the_text(tmp_path):
    text = "x" * 100_000
    tracemalloc.start()
    write_tokens((text for _ in range(100)), BytesTokenizer(), tmp_path / "shard")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000  # 20 MB of tokens were written; the buffer is 4 MB, a document and its ids 2 MB


def test_a_failure_leaves_nothing_and_what_stands_is_never_overwritten(tmp_path, shard):
    def broken():
        yield "one"
        raise RuntimeError("the source fell over")

    with pytest.raises(RuntimeError):
        write_tokens(broken(), BytesTokenizer(), tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["shard"]
    before = (shard.path / "tokens.bin").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        write_tokens(["new"], BytesTokenizer(), shard.path)
    assert (shard.path / "tokens.bin").read_bytes() == before
    (tmp_path / ".third.partial").mkdir()
    (tmp_path / ".third.partial" / "tokens.bin").write_bytes(b"left by a killed run")
    assert write_tokens(["a"], BytesTokenizer(), tmp_path / "third").n_tokens == 3


def test_the_place_is_looked_at_before_anything_is_encoded(tmp_path, monkeypatch):
    def never():
        raise AssertionError("a document was read")
        yield

    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("a")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    monkeypatch.chdir(tmp_path / "here")
    for place, words in ((".", "in use"), ("../file/x", "cannot be written"), ("../round", "already exists")):
        with pytest.raises(UserError, match=words):
            write_tokens(never(), BytesTokenizer(), place)
    assert sorted(os.listdir(tmp_path)) == ["file", "here", "round"]


def test_a_link_to_a_place_that_is_free_is_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    for target in ("empty", "new"):
        (tmp_path / f"to-{target}").symlink_to(target)
        assert write_tokens(["a"], BytesTokenizer(), tmp_path / f"to-{target}").n_tokens == 3
        assert TokenFile(tmp_path / target).n_tokens == 3


def test_documents_without_an_id_leave_nothing(tmp_path):
    class Silent(Bare):
        def encode(self, text, *, bos=False, eos=False):
            return []

    with pytest.raises(UserError, match="made no ids of 3 bytes"):
        write_tokens(["abc"], Silent(), tmp_path / "shard")
    assert not list(tmp_path.iterdir())


def swap_bounds(folder):
    bounds = np.load(folder / "documents.npy")
    bounds[[1, 2]] = bounds[[2, 1]]
    np.save(folder / "documents.npy", bounds)


def edit_meta(**changes):
    def edit(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return edit


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "meta.json").unlink(), "no meta.json"),
        (lambda f: (f / "meta.json").write_text("{"), "damaged"),
        (lambda f: (f / "meta.json").write_text("[]"), "damaged"),
        (edit_meta(version=99), "version 99"),
        (edit_meta(dtype="float64"), "damaged"),
        (lambda f: (f / "tokens.bin").write_bytes((f / "tokens.bin").read_bytes()[:-1]), "meta.json says"),
        (edit_meta(n_tokens="abc"), "damaged .*n_tokens is 'abc'"),
        (edit_meta(n_tokens=math.inf), "damaged .*n_tokens is inf"),
        (edit_meta(vocab_size=-5), "damaged .*vocab_size is -5"),
        (lambda f: (f / "meta.json").write_text("[" * 100_000), "damaged .*RecursionError"),
        (lambda f: (f / "tokens.bin").unlink(), "has 0 bytes"),
        (lambda f: (f / "documents.npy").write_bytes(b""), "documents.npy"),
        (lambda f: np.savez((f / "documents.npy").open("wb"), a=np.arange(3)), "does not fit"),
        (lambda f: (f / "documents.npy").write_bytes(b"PK\x03\x04 no archive"), "documents.npy"),
        (swap_bounds, "does not fit"),
        (lambda f: (f / "documents.npy").unlink(), "documents.npy"),
        (lambda f: (f / "documents.npy").write_bytes(b"no array"), "documents.npy"),
        (lambda f: np.save(f / "documents.npy", np.arange(3)), "does not fit"),
        (lambda f: np.save(f / "documents.npy", np.array(0)), "does not fit"),
    ],
)
def test_a_damaged_shard_is_refused_in_a_sentence(shard, damage, words):
    damage(shard.path)
    with pytest.raises(UserError, match=words) as caught:
        TokenFile(shard.path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found(shard):
    data = bytearray((shard.path / "tokens.bin").read_bytes())
    data[100] ^= 4
    (shard.path / "tokens.bin").write_bytes(data)
    with pytest.raises(UserError, match="changed"):
        TokenFile(shard.path).verify()


def move_a_bound(folder):
    bounds = np.load(folder / "documents.npy")
    bounds[1] -= 2
    np.save(folder / "documents.npy", bounds)


def test_a_moved_bound_is_found_and_changes_the_fingerprint(shard):
    before = Batches(shard, 1, 8, 0).fingerprint()
    move_a_bound(shard.path)
    with pytest.raises(UserError, match=r"documents.npy has changed"):
        TokenFile(shard.path).verify()
    edit_meta(documents_sha256="of the other bounds")(shard.path)
    assert Batches(TokenFile(shard.path), 1, 8, 0).fingerprint() != before


def test_a_shard_from_before_there_was_a_hash_of_the_bounds_keeps_its_fingerprint(shard):
    meta = json.loads((shard.path / "meta.json").read_text())
    del meta["documents_sha256"]
    (shard.path / "meta.json").write_text(json.dumps(meta))
    old = TokenFile(shard.path)
    old.verify()
    parts = ["windows", old.tokens_sha256, old.tokenizer_sha256, 8, 0]
    assert Batches(old, 1, 8, 0).fingerprint() == hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    assert TokenShards([shard.path]).documents_sha256 is None


def test_tokenizers_are_told_apart():
    other, swapped = BytesTokenizer(), BytesTokenizer()
    other.pattern = "x"
    swapped.special_tokens = {"<|begin|>": 257, "<|end|>": 256}
    assert tokenizer_hash(BytesTokenizer()) == tokenizer_hash(BytesTokenizer())
    assert len({tokenizer_hash(t) for t in (BytesTokenizer(), other, swapped, Bare())}) == 4


def test_ids_that_no_token_has_do_not_disturb_the_hash():
    from llama_edu.tokenizer import BPETokenizer

    ranks = {bytes([b]): b for b in range(256)}
    near, far = (BPETokenizer(ranks, special_tokens={"<|end_of_text|>": i}) for i in (256, 300))
    assert tokenizer_hash(near) != tokenizer_hash(far) == tokenizer_hash(far)


def test_the_compiled_way_writes_what_encode_gives(tmp_path):
    from llama_edu.tokenizer import BPETokenizer, Llama3Tokenizer

    texts = ["a", "The mills stood still. " * 40, "\U0001f642 " * 30, "x" * 60_000, "  \n\n end"]
    plain = BPETokenizer.train(texts, 300, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"])
    for name, tokenizer in (("plain", plain), ("llama3", Llama3Tokenizer(plain.ranks))):
        file = write_tokens(texts, tokenizer, tmp_path / name)
        expected = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
        assert [file.tokens[a:b].tolist() for a, b in zip(file.documents[:-1], file.documents[1:])] == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 2**40))
def test_an_order_is_a_permutation(n, seed, epoch):
    assert sorted(shuffled(np.arange(n), n, seed, epoch)) == list(range(n))


def test_every_order_of_four_is_as_likely():
    seen: dict[tuple, int] = {}
    for seed in range(4800):
        order = tuple(shuffled(np.arange(4), 4, seed, 0))
        seen[order] = seen.get(order, 0) + 1
    chi2 = sum((count - 200) ** 2 / 200 for count in seen.values())
    assert len(seen) == 24 and chi2 < 49.7  # 99.9 % of fair draws, 23 degrees of freedom


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(shard):
    batches = Batches(shard, 3, 16, seed=5)
    rows = torch.cat([batches.batch(step).tokens for step in range(2 * batches.n_windows // 3 + 1)])
    windows = shard.tokens[: batches.n_windows * 16].astype(np.int64).reshape(-1, 16)
    expected = sorted(map(tuple, windows.tolist()))
    first, second = rows[: batches.n_windows].tolist(), rows[batches.n_windows : 2 * batches.n_windows].tolist()
    assert sorted(map(tuple, first)) == sorted(map(tuple, second)) == expected
    assert first != second and first != windows.tolist()


def test_a_batch_depends_on_seed_and_step_alone(shard):
    one, two = Batches(shard, 4, 16, seed=1), Batches(TokenFile(shard.path), 4, 16, seed=1)
    for step in (7, 0, 7, 123_456_789):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(step), two.batch(step)))
    assert not torch.equal(one.batch(0).tokens, Batches(shard, 4, 16, seed=2).batch(0).tokens)


def test_halves_of_a_batch_are_the_batches_of_half_the_size(shard):
    """So that readers may share a batch: sample i is the same however many are read at a time."""
    whole, half = Batches(shard, 6, 8, seed=3), Batches(shard, 3, 8, seed=3)
    assert torch.equal(whole.batch(4).tokens, torch.cat([half.batch(8).tokens, half.batch(9).tokens]))


def test_targets_are_the_next_tokens_and_documents_are_told(shard):
    tokens, targets, documents = Batches(shard, 5, 24, seed=0).batch(0)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    text = shard.tokens.astype(np.int64)
    starts = [next(i for i in range(0, len(text), 24) if text[i : i + 24].tolist() == row.tolist()) for row in tokens]
    for start, last, row in zip(starts, targets[:, -1], documents):
        assert last == text[start + 24]
        ends = np.flatnonzero(text == 257)
        assert row.tolist() == [int((ends < i).sum()) for i in range(start, start + 24)]


@pytest.mark.parametrize("batch_size, seq_len", [(1, 1), (3, 16), (4, 1000), (64, 64)])
def test_evaluation_scores_every_token_but_the_first_once(shard, batch_size, seq_len):
    targets = []
    for batch in sequential_batches(shard, batch_size, seq_len):
        assert batch.tokens.shape == (batch_size, seq_len)
        targets += batch.targets.flatten().tolist()
    assert [t for t in targets if t != IGNORE] == shard.tokens[1:].tolist()


def test_a_part_of_an_evaluation_is_spread_over_the_file(shard):
    parts = list(sequential_batches(shard, 2, 16, max_batches=5))
    assert len(parts) == 5
    documents = torch.cat([p.document_ids[:, 0] for p in parts]).tolist()
    assert documents == sorted(set(documents)) and documents[0] == 0 and documents[-1] > 30


def test_a_corpus_shorter_than_a_batch_is_refused_with_the_numbers(tmp_path):
    file = write_tokens(["short"], BytesTokenizer(), tmp_path / "shard")
    with pytest.raises(UserError, match=r"7 tokens, less than the 129 of one batch of 8 sequences of 16"):
        Batches(file, 8, 16, seed=0)
    assert Batches(file, 1, 6, seed=0).batch(3).tokens.shape == (1, 6)
