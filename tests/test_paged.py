"""What a user of the paged cache relies on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu import KVCache, LlamaConfig, Transformer
from llama_edu.generation import BlockPool, OutOfBlocks, PagedCache
from llama_edu.generation.paged import block_keys
from llama_edu.model.attention import Cache

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=48)
TEXT = torch.randint(64, (48,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Words that depend on what was read; float64, so that only mistakes differ."""
    model = Transformer(LlamaConfig(**SHAPE))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model.double().requires_grad_(False)


def make(model, n_blocks=16, block_size=4, **options):
    return PagedCache(model.cfg, n_blocks=n_blocks, block_size=block_size, dtype=torch.float64, **options)


def read(model, cache, sequences, ids):
    """Logits after the last of each sequence's new ids."""
    logits = model(cache.stage(sequences, ids), cache=cache)
    return torch.stack([row[len(new) - 1] for row, new in zip(logits, ids)])


def alone(model, ids):
    return model(torch.tensor([ids]))[0, -1]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def check_books(cache):
    """Every block is used as often as tables name it, or is free; nothing is both."""
    tables = [cache.table(s) for s in cache._sequences]
    users = [sum(block in table for table in tables) for block in range(len(cache.pool.users))]
    assert cache.pool.users == users
    assert cache.pool.n_free == users.count(0) == len(cache.pool._idle)
    assert all(users[block] == 0 for block in cache.pool._idle)
    assert {k: b for b, k in cache.pool._key.items()} == cache.pool._block


def test_it_is_a_cache_for_the_model(model):
    assert isinstance(make(model), Cache)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_the_same_logits_as_the_contiguous_cache(model, block_size):
    tokens = torch.tensor([TEXT[:20], TEXT[20:40]])
    paged = make(model, n_blocks=2 * -(-20 // block_size), block_size=block_size, batch_size=2)
    plain = KVCache(model.cfg, batch_size=2, max_seq_len=20, dtype=torch.float64)
    for piece in tokens.split([7, 1, 1, 5, 6], dim=1):
        close(model(piece, cache=paged), model(piece, cache=plain))
    check_books(paged)


def test_rows_of_different_lengths_each_read_as_much_as_they_like(model):
    cache = make(model)
    a, b = cache.open(), cache.open()
    close(read(model, cache, [a], [TEXT[:3]])[0], alone(model, TEXT[:3]))
    # b is fresh and as long as the whole batch: the query of a must not be taken for a fresh one too
    got = read(model, cache, [a, b], [TEXT[3:5], TEXT[10:15]])
    close(got, torch.stack([alone(model, TEXT[:5]), alone(model, TEXT[10:15])]))
    got = read(model, cache, [b, a], [TEXT[15:16], TEXT[5:14]])
    close(got, torch.stack([alone(model, TEXT[10:16]), alone(model, TEXT[:14])]))


def test_padding_never_reaches_past_the_models_context(model):
    cache = make(model)
    a, b = cache.open(), cache.open()
    read(model, cache, [a], [TEXT[:46]])
    got = read(model, cache, [a, b], [TEXT[46:48], TEXT[:5]])
    close(got, torch.stack([alone(model, TEXT[:48]), alone(model, TEXT[:5])]))


def test_blocks_are_taken_when_tokens_come_and_given_back(model):
    cache = make(model, n_blocks=4)
    a = cache.open()
    assert cache.pool.n_free == 4
    read(model, cache, [a], [TEXT[:4]])
    assert cache.pool.n_free == 3
    read(model, cache, [a], [TEXT[4:5]])
    assert cache.pool.n_free == 2 and cache.length(a) == 5
    with pytest.raises(OutOfBlocks, match="all 4 blocks are in use"):
        cache.stage([a], [TEXT[5:17]])
    assert cache.length(a) == 5
    close(read(model, cache, [a], [TEXT[5:16]])[0], alone(model, TEXT[:16]))
    cache.close(a)
    assert cache.pool.n_free == 4
    check_books(cache)


def test_a_beginning_that_was_read_is_not_read_again(model):
    cache = make(model)
    a = cache.open(TEXT[:10])
    assert cache.length(a) == 0
    read(model, cache, [a], [TEXT[:10]])
    b = cache.open([*TEXT[:9], 5])
    assert cache.length(b) == 8 and cache.table(b) == cache.table(a)[:2]
    close(read(model, cache, [b], [[TEXT[8], 5]])[0], alone(model, [*TEXT[:9], 5]))
    cache.close(a)
    cache.close(b)
    c = cache.open(TEXT[:9])  # all are closed, but nobody took the blocks
    assert cache.length(c) == 8
    other = cache.open([*TEXT[:2], 63, *TEXT[3:9]])
    assert cache.length(other) == 0
    check_books(cache)


def test_the_last_id_is_always_left_to_read(model):
    cache = make(model)
    read(model, cache, [cache.open()], [TEXT[:8]])
    again = cache.open(TEXT[:8])
    assert cache.length(again) == 4
    close(read(model, cache, [again], [TEXT[4:8]])[0], alone(model, TEXT[:8]))


def test_what_was_written_without_ids_is_not_shared(model):
    cache = make(model, batch_size=1)
    model(torch.tensor([TEXT[:8]]), cache=cache)
    assert cache.length(cache.open(TEXT[:9])) == 0


def test_a_fork_goes_its_own_way(model):
    cache = make(model)
    a = cache.open()
    read(model, cache, [a], [TEXT[:6]])
    b = cache.fork(a)
    assert cache.table(b) == cache.table(a) and cache.pool.n_free == 14
    got = read(model, cache, [a, b], [[1, 2], [3, 4]])
    close(got, torch.stack([alone(model, [*TEXT[:6], 1, 2]), alone(model, [*TEXT[:6], 3, 4])]))
    assert cache.table(a)[0] == cache.table(b)[0] and cache.table(a)[1] != cache.table(b)[1]
    assert cache.pool.n_free == 13
    cache.close(a)
    close(read(model, cache, [b], [[9]])[0], alone(model, [*TEXT[:6], 3, 4, 9]))
    check_books(cache)


def test_cutting_and_writing_does_not_spoil_what_others_may_share(model):
    cache = make(model)
    a = cache.open()
    read(model, cache, [a], [TEXT[:9]])
    cache.truncate(a, 6)
    close(read(model, cache, [a], [[60]])[0], alone(model, [*TEXT[:6], 60]))
    b = cache.open(TEXT[:9])  # the second block still has room, so it has no new name either
    assert cache.length(b) == 4
    close(read(model, cache, [b], [TEXT[4:9]])[0], alone(model, TEXT[:9]))
    check_books(cache)


def test_a_nan_in_one_sequence_stays_there(model):
    cache = make(model, n_blocks=6)
    a = cache.open()
    read(model, cache, [a], [TEXT[:8]])
    for numbers in (cache.k, cache.v):
        numbers[:, : 2 * 4] = torch.nan  # the first two blocks, which are a's
    assert cache.table(a) == [0, 1]
    cache.close(a)
    b, c = cache.open(), cache.open()
    got = read(model, cache, [b, c], [TEXT[:2], TEXT[:9]])
    close(got, torch.stack([alone(model, TEXT[:2]), alone(model, TEXT[:9])]))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_size=st.integers(1, 5))
def test_any_order_of_events_keeps_answers_and_books_right(model, data, block_size):
    cache = make(model, n_blocks=20, block_size=block_size)
    texts: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        event = data.draw(st.sampled_from(["open", "read", "fork", "close", "truncate"] if texts else ["open"]))
        number = data.draw(st.sampled_from(sorted(texts))) if texts else None
        if event == "open":
            start = data.draw(st.sampled_from([0, 20]))
            ids = TEXT[start : start + data.draw(st.integers(1, 9))]
            number = cache.open(ids)
            texts[number] = ids[: cache.length(number)]
        elif event == "fork":
            texts[cache.fork(number)] = list(texts[number])
        elif event == "close":
            cache.close(number)
            del texts[number]
        elif event == "truncate":
            texts[number] = texts[number][: data.draw(st.integers(0, len(texts[number])))]
            cache.truncate(number, len(texts[number]))
        else:
            rows = data.draw(st.lists(st.sampled_from(sorted(texts)), min_size=1, max_size=3, unique=True))
            news = [data.draw(st.sampled_from([TEXT[len(texts[r]) :], TEXT[7:]]))[: data.draw(st.integers(1, 5))]
                    for r in rows]  # fmt: skip
            news = [new or [1] for new in news]
            if any(len(texts[r]) + len(new) > 40 for r, new in zip(rows, news)):
                continue
            try:
                got = read(model, cache, rows, news)
            except OutOfBlocks:
                check_books(cache)
                continue
            for row, new, logits in zip(rows, news, got):
                texts[row] = texts[row] + new
                close(logits, alone(model, texts[row]))
        check_books(cache)
        assert {n: cache.length(n) for n in texts} == {n: len(t) for n, t in texts.items()}
    for number in list(texts):
        cache.close(number)
    assert cache.pool.n_free == 20 and not any(cache.pool.users)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes(model, dtype):
    cache = PagedCache(model.cfg, n_blocks=5, block_size=4, dtype=dtype)
    scales = 2 * 2 * 2 * 20 * 4 if dtype == torch.int8 else 0
    assert cache.nbytes == model.cfg.kv_cache_bytes(20, dtype=dtype) + scales


def test_narrow_numbers_are_those_of_the_contiguous_cache(model):
    for dtype in (torch.bfloat16, torch.int8):
        paged = PagedCache(model.cfg, n_blocks=5, block_size=4, batch_size=1, dtype=dtype)
        plain = KVCache(model.cfg, batch_size=1, max_seq_len=20, dtype=dtype)
        for piece in torch.tensor([TEXT[:12]]).split([8, 1, 3], dim=1):
            close(model(piece, cache=paged), model(piece, cache=plain))


def test_names_depend_on_everything_before():
    a, b = block_keys([1, 2, 3, 4], 2), block_keys([9, 2, 3, 4], 2)
    assert a[0] != b[0] and a[1] != b[1]
    assert block_keys([1, 2, 3, 4, 5], 2) == a and block_keys([3, 4], 2, a[0]) == a[1:]


def test_refusals(model):
    cache = make(model)
    a = cache.open()
    for action, words in [
        (lambda: PagedCache(model.cfg, n_blocks=0), "0 blocks"),
        (lambda: PagedCache(model.cfg, n_blocks=2, block_size=0), "block_size is 0"),
        (lambda: PagedCache(model.cfg, n_blocks=2, dtype=torch.int32), "torch.int32"),
        (lambda: cache.stage([a, a], [[1], [2]]), "each once"),
        (lambda: cache.stage([a], [[]]), "1 or more"),
        (lambda: cache.stage([7], [[1]]), "no sequence 7"),
        (lambda: cache.truncate(a, 1), "cannot be cut to 1"),
        (lambda: cache.close(99), "no sequence 99"),
        (lambda: BlockPool(2).release(0), "nobody uses it"),
    ]:
        with pytest.raises(ValueError, match=words):
            action()
