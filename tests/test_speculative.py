"""Speculative decoding and prompt lookup: exact in distribution, equal to greedy, and as fast as the formula says."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.errors import UserError
from llama_edu.generation import NonFiniteLogits
from llama_edu.generation.fast import FastDecoder
from llama_edu.generation.speculative import (
    PromptLookup,
    accept_or_resample,
    expected_speedup,
    expected_tokens,
    speculate,
)

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, max_seq_len=64)


def model(seed=0, vocab=64, factor=2.0, **changes) -> Transformer:
    m = Transformer(LlamaConfig(**{**SHAPE, "vocab_size": vocab, **changes}))
    m.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(factor if p.dim() == 2 else 1)
    return m


@pytest.mark.parametrize("seed", range(3))
def test_accepted_or_resampled_tokens_are_distributed_as_the_target(seed):
    random = np.random.default_rng(seed)
    p, q = (torch.from_numpy(random.dirichlet(np.ones(6) * 0.7)) for _ in range(2))
    n = 4000
    tokens = random.choice(6, p=q.numpy(), size=n)
    results = [accept_or_resample(p, q, int(t), tuple(random.random(2))) for t in tokens]
    counts = np.bincount([t for t, _ in results], minlength=6)
    expected = n * p.numpy()
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, 5)
    alpha = float(torch.minimum(p, q).sum())
    assert abs(np.mean([kept for _, kept in results]) - alpha) < 4 * (alpha * (1 - alpha) / n) ** 0.5


def test_a_guess_that_the_target_would_make_is_always_kept():
    p = torch.tensor([0.2, 0.8], dtype=torch.float64)
    assert accept_or_resample(p, p, 0, (0.999999, 0.5)) == (0, True)
    impossible = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert accept_or_resample(impossible, p, 1, (0.0, 0.9)) == (0, False)


@pytest.mark.parametrize("ahead", [1, 3, 8])
@pytest.mark.parametrize("draft", ["itself", "another", "lookup"])
def test_greedy_ids_are_those_of_the_target(draft, ahead):
    target = model()
    other = {"itself": target, "another": model(1, n_layers=1), "lookup": PromptLookup()}[draft]
    for prompt in ([5], [1, 2, 3, 1, 2, 3, 1]):
        result = speculate(target, other, prompt, max_new_tokens=30, ahead=ahead)
        assert result.ids == generate(target, [prompt], max_new_tokens=30)[0]
        assert result.accepted <= result.proposed and result.passes <= 30
        if draft == "itself":
            assert result.acceptance == 1 and result.passes == -(-30 // (ahead + 1))


@pytest.mark.slow
def test_sampled_pairs_are_distributed_as_the_targets():
    target, draft = model(vocab=5, factor=1.5), model(3, vocab=5, factor=1.5)
    prompt, n = [1, 2, 3], 400
    with torch.no_grad():
        first = target(torch.tensor([prompt]))[0, -1].double().softmax(-1)
        then = torch.stack([target(torch.tensor([[*prompt, a]]))[0, -1].double().softmax(-1) for a in range(5)])
    expected = n * (first[:, None] * then).numpy()
    counts = np.zeros((5, 5))
    for seed in range(n):
        ids = speculate(target, draft, prompt, max_new_tokens=2, ahead=2, temperature=1.0, seed=seed).ids
        counts[tuple(ids)] += 1
    common = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    assert statistic < chi2.ppf(0.9999, int(common.sum()))


def test_lookup_samples_from_the_target_too():
    target, n = model(vocab=4, factor=1.5), 300
    prompt = [1, 2, 1, 2, 1]
    with torch.no_grad():
        p = target(torch.tensor([prompt]))[0, -1].double().softmax(-1).numpy()
    draw = lambda seed: speculate(target, PromptLookup(), prompt, max_new_tokens=2, temperature=1.0, seed=seed).ids[0]
    counts = np.bincount([draw(seed) for seed in range(n)], minlength=4)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < chi2.ppf(0.9999, 3)


def test_the_same_seed_gives_the_same_ids():
    how = dict(max_new_tokens=20, temperature=0.8, top_k=10, top_p=0.9, min_p=0.01, seed=7)
    runs = [speculate(model(), model(1), [1, 2], **how).ids for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) == 20


def test_lookup_copies_what_followed_last_time():
    guess = PromptLookup().propose
    assert guess([1, 2, 3, 9, 1, 2, 3], 2)[0] == [9, 1]
    assert guess([4, 5, 7, 4, 6, 4], 1)[0] == [6]  # the latest place counts
    assert guess([1, 2, 3], 4) == ([], [])
    assert guess([8], 4) == ([], [])


def test_stop_ids_end_the_text_and_are_not_returned():
    target = model()
    ids = generate(target, [[1, 2, 3]], max_new_tokens=20)[0]
    stop = ids[7]
    expected = ids[: ids.index(stop)]
    assert speculate(target, target, [1, 2, 3], max_new_tokens=20, stop_ids=(stop,)).ids == expected


def test_formulas():
    assert expected_tokens(0.0, 5) == 1 and expected_tokens(1.0, 5) == 6
    trials = np.random.default_rng(0).random((200_000, 3)) < 0.6
    assert 1 + np.cumprod(trials, 1).sum(1).mean() == pytest.approx(expected_tokens(0.6, 3), abs=0.01)
    assert expected_speedup(0.6, 3, 0.0) == expected_tokens(0.6, 3)
    assert expected_speedup(0.0, 4, 0.25) == pytest.approx(0.5)


def test_what_cannot_work_is_refused_with_a_sentence():
    with pytest.raises(UserError, match="ahead is 0"):
        speculate(model(), model(), [1], max_new_tokens=2, ahead=0)
    with pytest.raises(UserError, match="the draft has 32 tokens, the target 64"):
        speculate(model(), model(vocab=32), [1], max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        speculate(model(), model(), [], max_new_tokens=2)


def damaged(m: Transformer) -> Transformer:
    with torch.no_grad():
        m.layers["1"].feed_forward.w2.weight[3, 3] = torch.nan
    return m


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_draft_changes_nothing_and_a_damaged_target_is_named(temperature):
    good, options = model(), {"max_new_tokens": 6, "temperature": temperature, "seed": 0}
    alone = speculate(good, PromptLookup(longest=0), [1, 2, 3], **options)
    with_draft = speculate(good, damaged(model(1)), [1, 2, 3], **options)
    assert with_draft.ids == alone.ids and with_draft.proposed == 0
    with pytest.raises(NonFiniteLogits, match="target's logits are not finite after 3 ids"):
        speculate(damaged(model()), PromptLookup(), [1, 2, 3], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "min_p": 5.0}, "min_p"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "seed": -1}, "seed"),
        ({"top_k": 3}, "top_k"),
    ],
)
def test_options_that_generate_refuses_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        speculate(model(), PromptLookup(), [1, 2, 3], max_new_tokens=4, **options)


def test_without_a_seed_torch_decides():
    m, texts = model(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(speculate(m, PromptLookup(), [1, 2, 3], max_new_tokens=20, temperature=1.0).ids)
    assert texts[0] == texts[1] != texts[2]


def test_a_model_without_room_and_one_decoder_for_both_are_refused():
    m, short = model(), model(1, max_seq_len=12)
    assert len(speculate(m, short, [1, 2, 3], max_new_tokens=10).ids) == 10
    with pytest.raises(UserError, match="new tokens are 14; the draft has room for 13"):
        speculate(m, short, [1, 2, 3], max_new_tokens=11)
    with pytest.raises(UserError, match="new tokens are 11; the target has room for 9"):
        speculate(FastDecoder(m, max_seq_len=8), PromptLookup(), [1, 2, 3], max_new_tokens=8)
    decoder = FastDecoder(m)
    with pytest.raises(UserError, match="one decoder, which holds one text"):
        speculate(decoder, decoder, [1, 2, 3], max_new_tokens=4)
