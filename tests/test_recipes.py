"""Published recipes, the ramp of the batch, and utilisation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_edu import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.training import batch_size_at, learning_rate, measured_peak, mfu, published_peak, steps_for
from llama_edu.training.recipes import RECIPES, recipe

WHERE = {"train_data": "shards", "out_dir": "run"}
COMPLETE = [name for name, r in RECIPES.items() if None not in (r.lr, r.min_lr_ratio, r.warmup, r.batch_tokens)]


def test_every_recipe_has_a_source_and_a_length():
    assert all(r.source and (r.tokens or r.steps) for r in RECIPES.values())
    assert {n for n in LlamaConfig.preset_names() if "3.3" not in n} <= set(RECIPES)
    assert len(COMPLETE) == 17


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_recipes_need_nothing_else(name):
    config, known = recipe(name, **WHERE), RECIPES[name]
    assert config.batch_size * config.seq_len == known.batch_tokens
    if known.steps is None:
        assert 0 <= config.steps * known.batch_tokens - known.tokens < known.batch_tokens


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in COMPLETE])
def test_unpublished_values_are_asked_for_and_then_enough(name):
    with pytest.raises(UserError, match="not published in full"):
        recipe(name, **WHERE)
    given = {"lr": 1e-4, "min_lr_ratio": 0.1, "warmup": 100, "schedule": "cosine", "seq_len": 4096, "batch_size": 8}
    config = recipe(name, **WHERE, **given)
    assert config.lr == 1e-4
    assert config.steps * config.batch_size * config.seq_len >= (RECIPES[name].tokens or 0)


def test_printed_values():
    one, two = recipe("llama-1-65b", **WHERE), recipe("llama-2-70b", **WHERE)
    assert (one.lr, one.seq_len, one.warmup, one.min_lr_ratio, one.schedule) == (1.5e-4, 2048, 2000, 0.1, "cosine")
    assert (two.lr, two.seq_len, two.eps, two.betas, two.weight_decay, two.clip) == (
        1.5e-4, 4096, 1e-5, (0.9, 0.95), 0.1, 1.0,
    )  # fmt: skip
    big = recipe("llama-3.1-405b", **WHERE)
    assert (big.lr, big.lr * big.min_lr_ratio, big.warmup, big.steps) == (8e-5, pytest.approx(8e-7), 8000, 1_200_000)
    at = (0, 252_000_000, 2_870_000_000_000)
    sizes = [batch_size_at(t, big.batch_size, big.batch_ramp) * big.seq_len for t in at]
    assert sizes == [2**22, 2**23, 2**24]


def test_stages_of_code_llama():
    """arXiv 2308.12950, section 2: peak, tokens a step, length of a sequence, base of RoPE, then steps or tokens."""
    rows = {
        "code-llama-7b": (3e-4, 2**22, 4096, 1e4, None, 5e11),
        "code-llama-70b": (1.5e-4, 2**22, 4096, 1e4, None, 1e12),
        "code-llama-34b-python": (1e-4, 2**22, 4096, 1e4, None, 1e11),
        "code-llama-7b-long": (2e-5, 2**21, 16384, 1e6, 3000, None),
        "code-llama-13b-long": (2e-5, 2**21, 16384, 1e6, 10_000, None),
        "code-llama-34b-long": (2e-5, 2**20, 16384, 1e6, 11_000, None),
        "code-llama-13b-instruct": (None, 524_288, None, 1e6, None, 5e9),
        "code-llama-70b-instruct": (None, 524_288, None, 1e4, None, 5e9),  # it had no stage of long contexts
    }
    for name, row in rows.items():
        r = RECIPES[name]
        assert (r.lr, r.batch_tokens, r.seq_len, r.model.rope_theta, r.steps, r.tokens) == row, name
    for name in (n for n in RECIPES if n.startswith("code-llama-")):
        plain = "34b" in name or (name.endswith("-python") and "70b" not in name)  # no tokens for infilling
        assert RECIPES[name].model.vocab_size == (32000 if plain else 32016), name


def test_last_stages_of_the_largest_model():
    anneal = recipe("llama-3.1-405b-anneal", **WHERE, lr=8e-7)
    last = {"peak": anneal.lr, "min_ratio": anneal.min_lr_ratio, "schedule": anneal.schedule, "steps": anneal.steps}
    assert (anneal.seq_len, anneal.batch_size, anneal.steps) == (131_072, 128, 3)  # 40M tokens are 2.4 steps
    assert learning_rate(anneal.steps, **last) == 0
    own = {"lr": 4e-5, "min_lr_ratio": 1.0, "warmup": 0, "schedule": "constant"}
    stage = recipe("llama-3.1-405b-long", **WHERE, **own, seq_len=65_536, steps=100)
    assert (stage.batch_size, stage.steps) == (256, 100)


def test_what_is_missing_is_named_and_nothing_that_follows():
    with pytest.raises(UserError, match=r"give min_lr_ratio, warmup, schedule, batch_size$"):
        recipe("llama-3-8b", **WHERE)
    with pytest.raises(UserError, match=r"give lr$"):
        recipe("llama-3.1-405b-anneal", **WHERE)


def test_changes_win_and_the_batch_follows_the_sequence():
    config = recipe("llama-2-7b", **WHERE, seq_len=1024, lr=1e-3, steps=7, warmup=2)
    assert (config.lr, config.steps, config.batch_size) == (1e-3, 7, 4096)


def test_unknown_recipe():
    with pytest.raises(UserError, match=r"no recipe is called 'llama-9'.*llama-2-7b"):
        recipe("llama-9", **WHERE)


@given(
    st.integers(1, 5000), st.integers(1, 8), st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 20)), max_size=3, unique_by=lambda pair: pair[0]),
)  # fmt: skip
def test_steps_of_a_ramp_are_those_of_a_loop(tokens, batch_size, seq_len, ramp):
    ramp = sorted(ramp)
    seen = steps = 0
    while seen < tokens:
        seen, steps = seen + batch_size_at(seen, batch_size, ramp) * seq_len, steps + 1
    assert steps_for(tokens, batch_size, seq_len, ramp) == steps


def test_utilisation():
    cfg = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=97, max_seq_len=64)
    per_token = cfg.train_flops(1, seq_len=64, convention="exact")
    assert mfu(cfg, 100, seq_len=64, peak=200 * per_token) == pytest.approx(0.5)
    assert published_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert published_peak("NVIDIA A100-SXM4-80GB") == published_peak("NVIDIA A100 80GB PCIe") == 312e12
    for other in ("Voodoo 2", "NVIDIA RTX A1000", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB"):
        assert published_peak(other) is None
    assert measured_peak("cpu", torch.float32, size=64, repeats=2) > 0
