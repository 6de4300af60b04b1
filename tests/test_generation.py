"""What a user of the cache and of `generate` relies on."""

import copy
import inspect
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu import KVCache, LlamaConfig, Transformer, generate
from llama_edu.config import RopeScaling
from llama_edu.generation import NonFiniteLogits, Sampler
from llama_edu.generation.cache import dequantize_heads, quantize_heads
from llama_edu.generation.decode import check_prompts
from llama_edu.generation.samples import make_sampler
from tests.bytes_tokenizer import BytesTokenizer

SHAPE = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=48)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def make(dtype=torch.float64, **changes) -> Transformer:
    """A model whose words depend on what it has read; float64, so that only mistakes differ."""
    model = Transformer(LlamaConfig(**{**SHAPE, **changes}))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model.to(dtype)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make()


def by_hand(model, prompt, n):
    """Greedy decoding without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def own_word(rows, row):
    """Index and id of a word that this row alone says, and says once; not its first."""
    others = {i for r, ids in enumerate([*rows, *PROMPTS]) if r != row for i in ids}
    return next((i, w) for i, w in enumerate(rows[row]) if i and w not in others and rows[row].count(w) == 1)


VARIANTS = {
    "grouped": {},
    "full": {"n_kv_heads": 4},
    "one": {"n_kv_heads": 1},
    "wide heads": {"head_dim": 16},
    "scaled rope": {"rope_scaling": RopeScaling(8.0, original_max_seq_len=16)},
    "tied": {"tie_embeddings": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_cached_pieces_give_the_logits_of_one_pass(changes):
    model = make(**changes)
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.cfg, batch_size=2, max_seq_len=20, dtype=torch.float64)
    with torch.no_grad():
        pieces = [model(t, cache=cache) for t in tokens.split([7, 1, 1, 5, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_gets_what_decoding_alone_without_cache_gives(dtype):
    model = make(dtype)
    assert generate(model, PROMPTS, max_new_tokens=20) == [by_hand(model, p, 20) for p in PROMPTS]


def test_bfloat16_model_generates():
    new = generate(make(torch.bfloat16), PROMPTS, max_new_tokens=5, temperature=1.0, seed=0)
    assert [len(row) for row in new] == [5, 5, 5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(dtype):
    model = make(dtype).cuda()
    assert [len(row) for row in generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, seed=0)] == [5, 5, 5]
    if dtype is torch.float32:
        assert generate(model, PROMPTS, max_new_tokens=5) == generate(model.cpu(), PROMPTS, max_new_tokens=5)


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 63), min_size=1, max_size=12), min_size=1, max_size=5),
    stop=st.sets(st.integers(0, 63), max_size=12),
    seed=st.none() | st.integers(0, 2**70),
)
def test_a_row_does_not_depend_on_its_neighbours(model, prompts, stop, seed):
    options = dict(max_new_tokens=8, stop_ids=stop)
    if seed is not None:
        options |= dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=seed)
    together = generate(model, prompts, **options)
    for row, prompt in enumerate(prompts):
        others = [[0]] * row + [prompt]  # the same place in the batch, other company
        assert generate(model, others, **options)[row] == together[row]
        assert not stop & set(together[row])


def test_a_stop_id_ends_its_row_and_is_not_returned(model):
    free = generate(model, PROMPTS, max_new_tokens=20)
    stop = free[0][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, PROMPTS, max_new_tokens=20, stop_ids=[stop]) == cut
    assert generate(model, PROMPTS, max_new_tokens=20, stop_ids={row[0] for row in free}) == [[], [], []]


def test_rows_that_have_ended_are_not_computed(model):
    _, stop = own_word(generate(model, PROMPTS, max_new_tokens=8), 0)
    batches = []
    handle = model.tok_embeddings.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    generate(model, PROMPTS, max_new_tokens=8, stop_ids=[stop])
    handle.remove()
    assert batches[0] == 3 and batches[-1] == 2


def test_stream_yields_the_same_ids_step_by_step(model):
    steps = list(generate(model, PROMPTS, max_new_tokens=4, stream=True))
    assert [row for row, _ in steps] == [0, 1, 2] * 4
    new = generate(model, PROMPTS, max_new_tokens=4)
    assert [[token for r, token in steps if r == row] for row in range(3)] == new


def test_going_on_with_a_cache_reads_only_what_is_new(model):
    read = []
    handle = model.tok_embeddings.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    cache = KVCache(model.cfg, batch_size=1, max_seq_len=40, dtype=torch.float64)
    first = generate(model, [[1, 2, 3]], max_new_tokens=4, cache=cache)[0]
    assert cache.lengths.tolist() == [6] and read == [3, 1, 1, 1]
    second = generate(model, [[first[-1], 5, 6]], max_new_tokens=4, cache=cache)[0]
    handle.remove()
    assert read[4:] == [3, 1, 1, 1]
    assert second == by_hand(model, [1, 2, 3, *first, 5, 6], 4)
    with pytest.raises(ValueError, match=r"3 ids after the 12 in the cache .* context is 40: ask for at most 25"):
        generate(model, [[1, 2, 3]], max_new_tokens=26, cache=cache)
    with pytest.raises(ValueError, match="2 prompts and a cache of 1 sequences"):
        generate(model, [[1], [2]], max_new_tokens=1, cache=cache)
    with pytest.raises(ValueError, match="one or the other"):
        generate(model, [[1]], max_new_tokens=1, cache=cache, cache_dtype=torch.int8)


@pytest.mark.parametrize("end", ["length", "stop id", "stop id at once", "function", "closed stream"])
def test_however_a_text_ends_the_cache_holds_all_but_the_last_new_id(model, end):
    free = by_hand(model, [1, 2, 3], 6)
    at = next(i for i in range(2, 6) if free[i] not in free[:i])
    options = {
        "length": {},
        "stop id": dict(stop_ids=[free[at]]),
        "stop id at once": dict(stop_ids=free[:1]),
        "function": dict(stop=lambda ids: len(ids) == 3),
    }.get(end, {})
    cache = KVCache(model.cfg, batch_size=1, max_seq_len=40, dtype=torch.float64)
    if end == "closed stream":
        steps = generate(model, [[1, 2, 3]], max_new_tokens=6, cache=cache, stream=True)
        first = [next(steps)[1] for _ in range(3)]
        steps.close()
    else:
        (first,) = generate(model, [[1, 2, 3]], max_new_tokens=6, cache=cache, **options)
    assert len(first) == {"length": 6, "stop id": at, "stop id at once": 0}.get(end, 3)
    assert cache.lengths.tolist() == [3 + max(0, len(first) - 1)]
    (second,) = generate(model, [[*first[-1:], 4, 5]], max_new_tokens=6, cache=cache)
    assert second == by_hand(model, [1, 2, 3, *first, 4, 5], 6)


def test_stream_refuses_before_the_first_step(model):
    with pytest.raises(ValueError, match="empty"):
        generate(model, [[]], max_new_tokens=4, stream=True)


def test_no_prompts_and_no_tokens(model):
    assert generate(model, [], max_new_tokens=4) == []
    assert generate(model, PROMPTS, max_new_tokens=0) == [[], [], []]


def test_the_context_can_be_filled_to_its_last_token(model):
    prompt = [1] * 40
    assert generate(model, [prompt], max_new_tokens=8) == [by_hand(model, prompt, 8)]


def test_the_same_seed_draws_the_same_and_another_draws_others(model):
    def say(seed):
        return generate(model, PROMPTS, max_new_tokens=20, temperature=1.5, seed=seed)

    assert say(1) == say(1) != say(2)
    assert generate(model, PROMPTS, max_new_tokens=9, temperature=1.5, seed=1) == [row[:9] for row in say(1)]
    assert generate(model, [[1]] * 2, max_new_tokens=20, temperature=1.5, seed=1)[0] != say(1)[1]
    torch.manual_seed(5)
    first = say(None)
    assert say(None) != first
    torch.manual_seed(5)
    assert say(None) == first


def test_another_choice_can_be_handed_in(model):
    seen = []

    def second(logits, rows, step, ids):
        seen.append((list(rows), step, [list(i) for i in ids]))
        return logits.topk(2).indices[:, 1]

    new = generate(model, PROMPTS, max_new_tokens=3, choose=second)
    assert new != generate(model, PROMPTS, max_new_tokens=3)
    assert seen[2] == ([0, 1, 2], 2, [p + n[:2] for p, n in zip(PROMPTS, new)])
    assert generate(model, PROMPTS, max_new_tokens=3, choose=Sampler()) == generate(model, PROMPTS, max_new_tokens=3)
    with pytest.raises(ValueError, match="temperature and seed would be ignored"):
        generate(model, PROMPTS, max_new_tokens=3, choose=second, temperature=1.0, seed=1)


@pytest.mark.parametrize("options", [dict(temperature=1e-300), dict(temperature=1e-5), dict(temperature=1.0, top_k=1),
                                     dict(temperature=1.0, top_p=1e-9), dict(temperature=1.0, min_p=1.0)])  # fmt: skip
def test_narrow_sampling_is_greedy(model, options):
    assert generate(model, PROMPTS, max_new_tokens=12, seed=0, **options) == generate(model, PROMPTS, max_new_tokens=12)


def test_gradients_are_not_recorded(model):
    generate(model, PROMPTS, max_new_tokens=2)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    steps = generate(model, PROMPTS, max_new_tokens=2, stream=True)
    next(steps)
    assert torch.is_grad_enabled()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 64]], {}, "id 64; the vocabulary has ids 0 to 63"),
        ([[-1]], {}, "id -1"),
        ([[1] * 49], {}, "context is 48: cut it by 1"),
        ([[1], [1] * 45], {}, "at most 3 new tokens"),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens is -1"),
        ([[1]], dict(temperature=-0.5), "temperature is -0.5"),
        ([[1]], dict(temperature=float("nan")), "temperature is nan"),
        ([[1]], dict(temperature=float("inf")), "temperature is inf"),
        ([[1]], dict(top_k=5), "temperature 0 .* so top_k means nothing"),
        ([[1]], dict(top_p=0.9, min_p=0.1), "top_p and min_p"),
        ([[1]], dict(temperature=1.0, top_k=0), "top_k is 0"),
        ([[1]], dict(temperature=1.0, top_p=0.0), "top_p is 0.0"),
        ([[1]], dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        ([[1]], dict(temperature=1.0, min_p=1.1), "min_p is 1.1"),
        ([[1]], dict(temperature=1.0, seed=-3), "seed is -3"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(model, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("prompts", "n", "words"),
    [
        ([[1, 2.5]], 4, "prompt 0 holds the id 2.5; the vocabulary has ids 0 to 63"),
        ([[1], [3.0]], 4, "prompt 1 holds the id 3.0"),
        ([[1, None]], 4, "prompt 0 holds the id None"),
        ([[1]], 2.0, "max_new_tokens is 2.0; it must be a whole number, 0 or more"),
        (torch.tensor([[1, 2]]), 4, r"prompts has the shape \(1, 2\); it must be a list .* prompts.tolist\(\)"),
        (np.array([[1, 2]]), 4, r"prompts has the shape \(1, 2\)"),
    ],
)
def test_prompts_of_another_type_are_refused_in_a_sentence(model, prompts, n, words):
    unchecked = inspect.unwrap(check_prompts)  # tests check annotated types, a program does not
    with pytest.raises(ValueError, match=words):
        unchecked(model.cfg, prompts, n)


def test_whole_numbers_of_any_kind_are_ids(model):
    unchecked = inspect.unwrap(check_prompts)
    unchecked(model.cfg, [np.array([1, 2]), torch.tensor([3]), (4,)], np.int64(2))


def test_nan_is_reported_with_the_layer_where_it_begins(model):
    broken = copy.deepcopy(model)
    broken.layers["1"].feed_forward.w2.weight.data[0, 0] = torch.nan
    with pytest.raises(
        NonFiniteLogits, match=r"row 0 are not finite after 3 ids; the trouble begins at parameter layers\.1"
    ):
        generate(broken, PROMPTS, max_new_tokens=4)


def test_what_was_generated_before_nan_is_kept(model):
    whole = generate(model, PROMPTS, max_new_tokens=8)
    index, poison = own_word(whole, 2)
    broken = copy.deepcopy(model)
    broken.tok_embeddings.weight.data[poison] = torch.nan
    with pytest.raises(NonFiniteLogits, match=r"row 2 .*tok_embeddings") as caught:
        generate(broken, PROMPTS, max_new_tokens=8)
    assert caught.value.ids == [row[: index + 1] for row in whole]


def test_padding_of_a_row_holds_no_id_of_another(model):
    broken = copy.deepcopy(model)
    broken.tok_embeddings.weight.data[0] = torch.inf
    steps = [dict(max_new_tokens=n) for n in (1, 4)]
    assert all(0 not in row for row in generate(model, PROMPTS, max_new_tokens=4))
    assert [generate(broken, PROMPTS, **n) for n in steps] == [generate(model, PROMPTS, **n) for n in steps]


# --- samples of a run ------------------------------------------------------------------------------------------------


def test_a_prompt_without_room_costs_only_its_own_sample():
    class Words(BytesTokenizer):
        def decode(self, ids):
            return self.decode_bytes(ids).decode("utf-8", "replace")

    model, write = make(torch.float32, vocab_size=300), make_sampler(Words())
    good = write(model, ["ab", "c"])
    texts = write(model, ["ab", "x" * 60, "c", ""])
    assert re.match(r"\(prompt 1 has 6\d ids; the model's context is 48: cut it by", texts[1])
    assert texts[0] == good[0] and texts[2] == good[1] and "prompt" not in texts[2]
    full = write(model, ["x" * 60])
    assert len(full) == 1 and full[0].startswith("(prompt 0 has")


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formula(model, dtype):
    cache = KVCache(model.cfg, batch_size=3, max_seq_len=17, dtype=dtype)
    assert cache.nbytes == model.cfg.kv_cache_bytes(17, batch_size=3, dtype=dtype)


def test_a_full_cache_says_so_and_stays_usable(model):
    cache = KVCache(model.cfg, batch_size=1, max_seq_len=4, dtype=torch.float64)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        with pytest.raises(ValueError, match="room for 4 tokens a sequence; 5 are to be stored"):
            model(torch.tensor([[4, 5]]), cache=cache)
        last = model(torch.tensor([[4]]), cache=cache)[0, -1]
        torch.testing.assert_close(last, model(torch.tensor([[1, 2, 3, 4]]))[0, -1], atol=1e-5, rtol=1e-5)


def test_cut_rows_write_over_what_was_behind_their_end(model):
    """Right-padded prefill, cut, then pieces of several tokens into rows of different lengths."""
    cache = KVCache(model.cfg, batch_size=3, max_seq_len=20, dtype=torch.float64)
    lengths = [len(p) for p in PROMPTS]
    more = torch.randint(64, (3, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(torch.tensor([p + [0] * (7 - len(p)) for p in PROMPTS]), cache=cache)
        cache.truncate(lengths)
        got = torch.cat([model(piece, cache=cache) for piece in more.split([3, 1, 2], dim=1)], dim=1)
        assert cache.lengths.tolist() == [n + 6 for n in lengths]
        for row, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([prompt + more[row].tolist()]))[0, -6:]
            torch.testing.assert_close(got[row], alone, atol=1e-5, rtol=1e-5)


def test_kept_rows_go_on_as_if_the_others_had_never_been(model):
    cache = KVCache(model.cfg, batch_size=3, max_seq_len=10, dtype=torch.float64)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), cache=cache)
        cache.keep([0, 2])
        out = model(torch.tensor([[10], [11]]), cache=cache)[:, -1]
        whole = model(torch.tensor([[1, 2, 3, 10], [7, 8, 9, 11]]))[:, -1]
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    assert cache.k.shape[1] == 2


def test_cache_refusals(model):
    cache = KVCache(model.cfg, batch_size=2, max_seq_len=5)
    for rows in ([], [1, 0], [0, 0], [2], [-1]):
        with pytest.raises(ValueError, match="ascending"):
            cache.keep(rows)
    for lengths in ([1, 0], [0, -1], [0]):
        with pytest.raises(ValueError, match="cannot be cut"):
            cache.truncate(lengths)
    with pytest.raises(ValueError, match="at least 1"):
        KVCache(model.cfg, batch_size=0, max_seq_len=5)


def test_static_shapes_give_the_same_answers(model):
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    static = KVCache(model.cfg, batch_size=2, max_seq_len=20, dtype=torch.float64, static=True)
    plain = KVCache(model.cfg, batch_size=2, max_seq_len=20, dtype=torch.float64)
    seen = []
    handle = model.layers["0"].attention.inner.register_forward_pre_hook(lambda m, args: seen.append(args[1].shape[2]))
    with torch.no_grad():
        for piece in tokens.split([7, 1, 4], dim=1):
            a, b = model(piece, cache=static), model(piece, cache=plain)
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert seen == [20, 7, 20, 8, 20, 12]


@settings(max_examples=50, deadline=None)
@given(
    x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=8, max_size=8),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3]),
)
def test_int8_is_off_by_half_a_step_at_most(x, scale):
    x = torch.tensor([x, [0.0] * 8]) * scale
    q, s = quantize_heads(x)
    back = dequantize_heads(q, s, torch.float32)
    assert ((back - x).abs() <= s[:, None] * 0.5001).all() and back[1].eq(0).all()
    assert torch.equal(s, (x.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float64, 1.0),
        (torch.float64, 1e-45),
        (torch.float32, 1e-3),
        (torch.float32, 1e-41),
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 1e-39),
        (torch.float16, 1.0),
        (torch.float16, 1e-5),
        (torch.float16, 3e-7),
    ],
)
def test_int8_is_off_by_half_a_step_at_most_whatever_the_dtype(dtype, size):
    x = (torch.randn(2000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    q, s = quantize_heads(x)
    assert s.dtype == torch.float32
    off = (q.double() * s.double()[:, None] - x.double()).abs() / s.double()[:, None]
    assert float(off.max()) <= 0.5 + 1e-4
    assert size < 1e-38 or torch.allclose(s.double() * 127, x.double().abs().amax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.bfloat16, 0.05), (torch.int8, 0.1), (torch.float32, 1e-5)])
def test_fewer_bits_change_logits_little(dtype, apart):
    model = Transformer(LlamaConfig(**SHAPE)).double()
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.cfg, batch_size=2, max_seq_len=20, dtype=dtype)
    with torch.no_grad():
        got = torch.cat([model(t, cache=cache) for t in tokens.split([7, 1, 12], dim=1)], 1)
        whole = model(tokens)
    assert 0 < (got - whole).abs().max() / whole.abs().max() < apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_narrow_caches_cut_and_keep_rows_like_wide_ones(dtype):
    model = make(torch.float32)
    together = generate(model, PROMPTS, max_new_tokens=8, cache_dtype=dtype)
    assert together == [generate(model, [p], max_new_tokens=8, cache_dtype=dtype)[0] for p in PROMPTS]
    stop = together[0][2]
    cut = [row[: row.index(stop)] if stop in row else row for row in together]
    assert generate(model, PROMPTS, max_new_tokens=8, cache_dtype=dtype, stop_ids=[stop]) == cut


def test_int8_bytes_are_counted_with_their_scales(model):
    cache = KVCache(model.cfg, batch_size=3, max_seq_len=17, dtype=torch.int8)
    numbers = model.cfg.kv_cache_bytes(17, batch_size=3, dtype=torch.int8)
    assert cache.nbytes == numbers + numbers // model.cfg.head_dim * 4
    with pytest.raises(ValueError, match=r"torch.int32; it must be a kind of float, or torch.int8"):
        KVCache(model.cfg, batch_size=3, max_seq_len=17, dtype=torch.int32)
