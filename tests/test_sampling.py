"""What a user of the choice of the next token, of stops and of log-probabilities relies on."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare

from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.generation import (
    Sampler,
    StopText,
    cut_at_stop,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    penalise_repetition,
    stream_text,
    temper,
)
from llama_edu.generation.sampling import _check
from llama_edu.generation.text import held_back
from llama_edu.tokenizer import BPETokenizer, SentencePieceTokenizer


def noise(rows, vocab, seed=0):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reshaping_agrees_with_transformers():
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = noise(40, 300)
    for ours, theirs, values in [
        (keep_top_k, TopKLogitsWarper, (1, 3, 50, 300, 1000)),
        (keep_top_p, TopPLogitsWarper, (0.01, 0.3, 0.9, 0.999, 1.0)),
        (keep_min_p, MinPLogitsWarper, (0.0, 0.01, 0.5, 1.0)),
        (temper, TemperatureLogitsWarper, (0.1, 1.0, 3.0)),
    ]:
        for value in values:
            torch.testing.assert_close(ours(logits, value), theirs(value)(None, logits), atol=0, rtol=0)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_repetition_penalty_agrees_with_transformers(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, ids = noise(10, 50), torch.randint(50, (10, 30), generator=torch.Generator().manual_seed(1))
    kept = logits.clone()
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    torch.testing.assert_close(penalise_repetition(logits, ids.tolist(), penalty), theirs, atol=0, rtol=0)
    assert torch.equal(logits, kept)
    assert torch.equal(penalise_repetition(logits, [[]] * 10, penalty), logits)


def test_keep_top_p_of_one_keeps_everything_in_float32():
    logits = 5 * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    assert keep_top_p(logits, 1.0).isfinite().all()


def test_draw_follows_the_probabilities():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.0, -torch.inf]])
    n = 40_000
    uniform = torch.tensor(np.random.default_rng(0).random(n))
    counts = torch.bincount(draw(logits.expand(n, -1), uniform), minlength=6)
    assert counts[5] == 0
    assert chisquare(counts[:5].numpy(), n * logits.double().softmax(-1)[0, :5].numpy()).pvalue > 1e-3


@given(u=st.floats(0, 1, exclude_max=True), logits=st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_draw_never_takes_what_has_no_probability(u, logits):
    row = torch.tensor([[-torch.inf, *logits, -torch.inf]], dtype=torch.float64)
    assert 1 <= int(draw(row, torch.tensor([u], dtype=torch.float64))) <= len(logits)


def exact(z, temperature, top_k=None, top_p=None, min_p=None, repetition_penalty=None, ids=()):
    """The distribution by its definition, in plain Python loops."""
    z = z.tolist()
    if repetition_penalty:
        z = [(x / repetition_penalty if x > 0 else x * repetition_penalty) if i in ids else x for i, x in enumerate(z)]
    p = np.exp(np.array(z) / temperature)
    p /= p.sum()
    if top_k:
        p[np.argsort(-p)[top_k:]] = 0
        p /= p.sum()
    if top_p:
        total, kept = 0.0, []
        for i in np.argsort(-p):
            if total >= top_p:
                break
            kept.append(i)
            total += p[i]
        p[[i for i in range(len(p)) if i not in kept]] = 0
        p /= p.sum()
    if min_p:
        p[p < min_p * p.max()] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=2.5),
        dict(temperature=1.0, top_k=5),
        dict(temperature=0.8, top_p=0.8),
        dict(temperature=2.0, min_p=0.1),
        dict(temperature=1.0, repetition_penalty=1.7),
        dict(temperature=1.4, top_k=15, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_sampler_draws_from_the_exact_distribution(options):
    z, ids, n = noise(1, 20, seed=5)[0] / 2, [3, 3, 7, 0], 6000
    p = exact(z, **options, ids=ids)
    drawn = Sampler(**options, seed=11)(z.expand(n, -1), range(n), 0, [ids] * n)
    counts = np.bincount(drawn.numpy(), minlength=20)
    assert counts[p == 0].sum() == 0 and (p > 0).sum() > 2
    assert chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-3
    wrong = exact(z, **{**options, "temperature": 1.4 * options["temperature"]}, ids=ids)
    if (wrong > 0).sum() == (p > 0).sum():
        assert chisquare(counts[p > 0], n * wrong[p > 0]).pvalue < 0.05  # the test can fail


def test_numbers_of_one_row_are_independent_of_each_other_and_of_other_rows():
    flat = torch.zeros(1, 4, dtype=torch.float64)
    choose = Sampler(temperature=1.0, seed=1)
    drawn = torch.stack([choose(flat.expand(40, -1), range(40), step, [[]] * 40) for step in range(100)])
    for first, second in [(drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])]:
        pairs = torch.bincount((4 * first + second).flatten(), minlength=16).numpy()
        assert chisquare(pairs).pvalue > 1e-3


def test_a_row_draws_the_same_in_any_company_and_as_often_as_asked():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = [[]] * 3
    together = [Sampler(temperature=1.5, seed=4)(logits, [0, 1, 2], step, ids).tolist() for step in range(5)]
    choose = Sampler(temperature=1.5, seed=4)
    for step in (3, 0, 4, 3):
        assert choose(logits[1:2], [1], step, ids[:1]).tolist() == together[step][1:2]


def test_log_probabilities_are_those_of_the_whole_vocabulary():
    z = noise(6, 40)
    ids = torch.tensor([0, 39, 5, 5, 17, 2])
    for score, row, i in zip(log_probabilities(z.float(), ids, top=4), z.float().double(), ids):
        assert abs(score.logprob - float(row[i] - row.logsumexp(0))) < 1e-12
        assert [i for i, _ in score.top] == row.topk(4).indices.tolist()
    assert log_probabilities(z, ids)[0].top == [] and len(log_probabilities(z, ids, 99)[0].top) == 40


# --- generate -----------------------------------------------------------------------------------


TEXTS = ["Łódź liegt in Polen, 東京 in Japan, naïve 😀 Zoë. STOP it, please.\n\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def model():
    model = Transformer(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=128))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model.double()


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


@pytest.mark.parametrize("options", [{}, dict(temperature=1.2, top_k=5, seed=2, repetition_penalty=1.2)])
def test_logprobs_are_those_of_the_model(model, options):
    ids, scores = generate(model, PROMPTS, max_new_tokens=9, logprobs=3, **options)
    assert ids == generate(model, PROMPTS, max_new_tokens=9, **options)
    for prompt, new, row in zip(PROMPTS, ids, scores):
        with torch.no_grad():
            z = model(torch.tensor([[*prompt, *new]]))[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        np.testing.assert_allclose([s.logprob for s in row], z[range(9), new], atol=1e-5)
        assert [s.top[0][0] for s in row] == z.argmax(-1).tolist()
    steps = list(generate(model, PROMPTS, max_new_tokens=9, logprobs=3, stream=True, **options))
    assert [(i, s) for r, i, s in steps if r == 1] == list(zip(ids[1], scores[1]))
    assert generate(model, [], max_new_tokens=9, logprobs=0) == ([], [])


def test_repetition_penalty_counts_prompt_and_text(model):
    ids = generate(model, PROMPTS, max_new_tokens=30, repetition_penalty=1e6)
    for prompt, new in zip(PROMPTS, ids):
        assert len({*prompt, *new}) == len(prompt) + len(new)
    assert generate(model, PROMPTS, max_new_tokens=9, repetition_penalty=1.0) == generate(
        model, PROMPTS, max_new_tokens=9
    )


def test_stop_texts_end_the_rows_that_say_them(model, tokenizer):
    free = generate(model, PROMPTS, max_new_tokens=30, temperature=1.0, seed=0)
    text = tokenizer.decode(free[1])
    stop = next(text[i : i + 3] for i in range(5, 60) if "\ufffd" not in text[i : i + 3])
    rows = generate(model, PROMPTS, max_new_tokens=30, temperature=1.0, seed=0, stop=[stop], tokenizer=tokenizer)
    for all_of_it, ids in zip(free, rows):
        ends = [n for n in range(1, 31) if stop in tokenizer.decode(all_of_it[:n])]
        assert ids == all_of_it[: min(ends, default=30)]
    assert len(rows[1]) < 30
    by_ids = generate(model, PROMPTS, max_new_tokens=30, temperature=1.0, seed=0, stop=lambda ids: len(ids) == 4)
    assert by_ids == [ids[:4] for ids in free]


def test_stream_text_shows_what_stands_before_the_stop(model, tokenizer):
    free = generate(model, [[4]], max_new_tokens=30, temperature=1.0, seed=0)[0]
    text = tokenizer.decode(free)
    options = dict(max_new_tokens=30, temperature=1.0, seed=0)
    assert "".join(stream_text(model, tokenizer, [4], **options)) == text
    stop = next(text[i : i + 3] for i in range(5, 60) if "\ufffd" not in text[i : i + 3])
    pieces = list(stream_text(model, tokenizer, [4], stop=[stop], **options))
    assert "".join(pieces) == text[: text.index(stop)] and all(pieces)


@given(data=st.data())
def test_whatever_the_cut_nothing_of_a_stop_is_shown(tokenizer, data):
    text = data.draw(st.text("abŁ東\n", max_size=25))
    stops = data.draw(st.lists(st.text("abŁ東\n", min_size=1, max_size=5), max_size=3))
    ids = list(text.encode())  # a byte is a token in every vocabulary of ours
    merges = data.draw(st.lists(st.integers(0, 30), max_size=10))
    for i in merges:  # and some longer tokens
        if i + 1 < len(ids) and (pair := tokenizer.decode_bytes(ids[i : i + 2])) in tokenizer.ranks:
            ids[i : i + 2] = [tokenizer.ranks[pair]]
    stream, shown, right = StopText(tokenizer, stops), "", cut_at_stop(text, stops)
    for token in ids:
        shown += stream.push(token)
        assert right.startswith(shown)
        assert shown == right or not stream.stopped
    assert shown + stream.finish() == right
    assert stream.stopped == any(s in text for s in stops)
    assert stream.push(97) == "" if stream.stopped else True


@given(text=st.text("ab", max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_held_back_is_the_longest_beginning_of_a_stop(text, stops):
    assume(not any(stop in text for stop in stops))
    right = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
    assert held_back(text, stops) == right


def test_half_a_character_at_the_end_is_shown_as_such():
    tokenizer = SentencePieceTokenizer.train(TEXTS * 5, 320)
    for make in (tokenizer, BPETokenizer.train(TEXTS, 280)):
        text = StopText(make, ["STOP"])
        ids = make.encode("a 鰻")[:-1]
        shown = "".join(map(text.push, ids))
        assert "\ufffd" not in shown and shown + text.finish() == make.decode(ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (dict(repetition_penalty=float("inf")), "repetition_penalty is inf"),
        (dict(stop=["x"]), "no tokenizer"),
        (dict(stop="x"), "must be a list"),
        (dict(stop=[""], tokenizer=1), "is empty"),
        (dict(tokenizer=1), "no stop texts"),
        (dict(stop=len, tokenizer=1), "drop one"),
        (dict(logprobs=-1), "logprobs is -1"),
        (dict(logprobs=301), "from 0 to 300"),
        (dict(repetition_penalty=1.1, choose=Sampler()), "repetition_penalty would be ignored"),
        (dict(constraint=lambda *a: a[0], choose=Sampler()), "constraint would be ignored"),
    ],
)
def test_options_that_mean_nothing_or_contradict_are_refused(model, tokenizer, options, words):
    if "tokenizer" in options:
        options = {**options, "tokenizer": tokenizer}
    with pytest.raises(ValueError, match=words):
        generate(model, [[1]], max_new_tokens=3, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(temperature=1.0, top_k=2.5), "top_k is 2.5; it must be a whole number, 1 or more"),
        (dict(temperature=1.0, seed=1.5), "seed is 1.5; it must be a whole number, 0 or more"),
    ],
)
def test_options_that_must_be_whole_are_refused_as_fractions(options, words):
    unchecked = inspect.unwrap(_check)  # tests check annotated types, a program does not
    with pytest.raises(ValueError, match=words):
        unchecked(**{"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "seed": None, **options})


def test_stream_text_refuses_what_has_no_place_in_it(model, tokenizer):
    with pytest.raises(ValueError, match="logprobs has no place"):
        stream_text(model, tokenizer, "a", max_new_tokens=3, logprobs=1)


def test_a_constraint_that_leaves_nothing_is_named(model):
    nothing = lambda logits, rows, step, ids: logits.masked_fill(torch.tensor([[step == 2]]), -torch.inf)
    with pytest.raises(ValueError, match="leaves row 0 no token"):
        generate(model, PROMPTS, max_new_tokens=5, constraint=nothing)
