"""The learning rate of every step, which parameters decay, and the shipped optimiser beside its formulas."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_edu import LlamaConfig, Transformer
from llama_edu.training import decay_groups, learning_rate, make_optimizer

KINDS = ("cosine", "linear", "wsd", "constant")
SHAPE = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=97, max_seq_len=64)


@given(st.sampled_from(KINDS), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.data())
def test_rates_climb_reach_the_peak_and_never_rise_again(kind, steps, ratio, share, data):
    warmup = data.draw(st.integers(0, steps))
    options = {"peak": 2.0, "steps": steps, "warmup": warmup, "min_ratio": ratio, "decay_share": share}
    rates = [learning_rate(n, schedule=kind, **options) for n in range(1, steps + 1)]
    top = max(0, warmup - 1)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    if warmup:
        assert rates[warmup - 1] == pytest.approx(2.0)
        assert rates[0] == pytest.approx(2.0 / warmup)
    if kind != "constant" and steps > warmup:
        assert rates[-1] == pytest.approx(2.0 * ratio, abs=1e-12)


def test_the_cosine_is_the_printed_formula():
    for n in range(100, 1001):
        want = 3e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * (n - 100) / 900)) / 2)
        assert learning_rate(n, peak=3e-4, steps=1000, warmup=100) == pytest.approx(want, rel=1e-12)


def test_wsd_stays_and_then_falls_in_a_line():
    rate = lambda n: learning_rate(n, peak=1.0, steps=100, warmup=10, min_ratio=0.0, schedule="wsd", decay_share=0.4)
    assert [rate(n) for n in (10, 35, 60)] == [1.0, 1.0, 1.0]
    assert [rate(n) for n in (70, 80, 100)] == pytest.approx([0.75, 0.5, 0.0])


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(tied):
    model = Transformer(LlamaConfig(**{**SHAPE.to_dict(), "tie_embeddings": tied}))
    groups = decay_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)
    assert all("norm" in names[id(p)] for p in groups[1]["params"])
    assert not any("norm" in names[id(p)] for p in groups[0]["params"])


def test_a_frozen_parameter_is_left_out():
    model = Transformer(SHAPE)
    model.tok_embeddings.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in decay_groups(model, 0.1)) == len(list(model.parameters())) - 1


def test_the_fused_step_is_the_formula():
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    optimizer = make_optimizer(model, 1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    by_hand = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for t in range(1, 6):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn_like(p)
            w, m, v = by_hand[i]
            m, v = 0.9 * m + 0.1 * p.grad, 0.95 * v + 0.05 * p.grad**2
            step = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            by_hand[i] = (w * (1 - 1e-2 * 0.1 * (p.ndim > 1)) - 1e-2 * step, m, v)
        optimizer.step()
    for p, (w, _, _) in zip(model.parameters(), by_hand):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-6)


def test_moments_exist_before_the_first_step():
    optimizer = make_optimizer(Transformer(SHAPE), 1e-3)
    assert all({"step", "exp_avg", "exp_avg_sq"} <= set(state) for state in optimizer.state.values())
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
