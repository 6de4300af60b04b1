"""Rotary embedding: equal to transformers and to Meta's formula, relative, orthogonal, and differentiable by hand."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
import transformers
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llama_edu import LlamaConfig
from llama_edu.config import RopeScaling
from llama_edu.model import (
    apply_rope,
    half_to_interleaved,
    interleaved_to_half,
    manual_backward,
    rope_frequencies,
    rope_table,
)
from llama_edu.model.manual import SavedBytes

SMALL = LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=8, rope_theta=1e4, max_seq_len=128)


@pytest.mark.parametrize("name", LlamaConfig.preset_names())
def test_frequencies_and_tables_equal_transformers_bit_for_bit(name):
    cfg = LlamaConfig.preset(name)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**cfg.to_hf()))
    assert torch.equal(theirs.inv_freq, rope_frequencies(cfg))
    positions = torch.tensor([[0, 1, 2, 77, 1000, 2047]])
    cos, sin = rope_table(cfg, 2048)
    hf_cos, hf_sin = theirs(torch.zeros(1), positions)
    assert torch.equal(hf_cos[0, :, : cfg.head_dim // 2], cos[positions[0]])
    assert torch.equal(hf_sin[0, :, : cfg.head_dim // 2], sin[positions[0]])


@pytest.mark.parametrize(
    "name, counts", [("llama-3.1-8b", (29, 6, 29)), ("llama-3.2-1b", (15, 3, 14)), ("llama-3.2-3b", (29, 6, 29))]
)
def test_bands_of_llama_3_1(name, counts):
    cfg = LlamaConfig.preset(name)
    plain, scaled = rope_frequencies(replace(cfg, rope_scaling=None)).double(), rope_frequencies(cfg).double()
    turns = cfg.rope_scaling.original_max_seq_len * plain / (2 * math.pi)
    kept, stretched = turns > 4, turns < 1
    assert (kept.sum(), (~kept & ~stretched).sum(), stretched.sum()) == counts
    assert torch.equal(scaled[kept], plain[kept])
    assert torch.equal(scaled[stretched], plain[stretched] / cfg.rope_scaling.factor)
    assert (scaled[:-1] > scaled[1:]).all()


def test_scaling_by_one_changes_nothing():
    cfg = replace(SMALL, rope_scaling=RopeScaling(1.0))
    torch.testing.assert_close(rope_frequencies(cfg), rope_frequencies(SMALL), rtol=1e-6, atol=0)


def test_table_has_the_configured_length_in_float32():
    cos, sin = rope_table(SMALL)
    assert cos.shape == sin.shape == (128, 8) and cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos[:5], rope_table(SMALL, 5)[0])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 100), st.integers(0, 27), st.integers(0, 2**31))
def test_scores_depend_on_distance_and_lengths_stay(start, distance, seed):
    cos, sin = (t[None].double() for t in rope_table(SMALL))
    q, k = torch.randn(2, 1, 4, 1, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at = lambda x, p: apply_rope(x, cos[:, p : p + 1], sin[:, p : p + 1])
    score = (at(q, start + distance) * at(k, start)).sum(-1)
    torch.testing.assert_close(score, (at(q, distance) * at(k, 0)).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at(q, start).norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=1e-6)


def test_equals_metas_complex_formula():
    x = torch.randn(2, 7, 4, 16)
    frequencies = 1.0 / 1e4 ** (torch.arange(0, 16, 2)[:8].float() / 16)
    angles = torch.outer(torch.arange(7).float(), frequencies)
    turned = (
        torch.view_as_complex(x.reshape(2, 7, 4, 8, 2)) * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    )
    cos, sin = (t[None] for t in rope_table(SMALL, 7))
    torch.testing.assert_close(
        apply_rope(x.transpose(1, 2), cos, sin), torch.view_as_real(turned).flatten(3).transpose(1, 2)
    )


def test_pairings_give_the_same_scores_as_transformers():
    hidden, wq, wk = torch.randn(2, 9, 64), torch.randn(64, 64) / 8, torch.randn(32, 64) / 8
    heads = lambda w: rearrange(hidden @ w.T, "b s (h d) -> b h s d", d=16)
    cos, sin = (t[None] for t in rope_table(SMALL, 9))
    ours = apply_rope(heads(wq), cos, sin), apply_rope(heads(wk), cos, sin).repeat_interleave(2, dim=1)
    hf_cos, hf_sin = LlamaRotaryEmbedding(transformers.LlamaConfig(**SMALL.to_hf()))(hidden, torch.arange(9)[None])
    hf_q, hf_k = apply_rotary_pos_emb(
        heads(interleaved_to_half(wq, 4)), heads(interleaved_to_half(wk, 2)), hf_cos, hf_sin
    )
    theirs = hf_q, hf_k.repeat_interleave(2, dim=1)
    torch.testing.assert_close(ours[0] @ ours[1].mT, theirs[0] @ theirs[1].mT, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5))
def test_permutations_undo_each_other_and_equal_metas_converter(heads, half, cols):
    w = torch.randn(heads * 2 * half, cols)
    permuted = interleaved_to_half(w, heads)
    assert torch.equal(half_to_interleaved(permuted, heads), w)
    assert torch.equal(permuted, w.view(heads, half, 2, cols).transpose(1, 2).reshape(w.shape))


def test_every_sequence_may_have_its_own_positions():
    cos, sin = rope_table(SMALL)
    positions = torch.tensor([[0, 1, 2], [40, 41, 99]])
    x = torch.randn(2, 4, 3, 16)
    together = apply_rope(x, cos[positions], sin[positions])
    for row in range(2):
        alone = apply_rope(x[row : row + 1], cos[positions[row]][None], sin[positions[row]][None])
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("manual", [True, False])
def test_any_memory_layout_gives_the_same(manual):
    cos, sin = (t[None] for t in rope_table(SMALL, 5))
    wide = torch.randn(2, 4, 5, 17)
    layouts = [wide[..., 1:], wide[..., 1:].flip(2).flip(2), wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 1:]]
    with manual_backward(manual):
        for x in layouts:
            torch.testing.assert_close(apply_rope(x, cos, sin), apply_rope(x.contiguous(), cos, sin))


def test_gradcheck_and_agreement_with_autograd():
    cos, sin = (t[None].double() for t in rope_table(SMALL, 3))
    x = torch.randn(2, 2, 3, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    with manual_backward():
        assert torch.autograd.gradcheck(apply_rope, (x, cos, sin))
        (ours,) = torch.autograd.grad(apply_rope(x, cos, sin), x, grad)
    (autograd,) = torch.autograd.grad(apply_rope(x, cos, sin), x, grad)
    torch.testing.assert_close(ours, autograd, rtol=1e-12, atol=1e-12)


def test_by_hand_keeps_only_the_tables():
    cos, sin = (t[None] for t in rope_table(SMALL, 32))
    x = torch.randn(2, 4, 32, 16, requires_grad=True)
    with SavedBytes(besides=[cos, sin]) as kept, manual_backward():
        apply_rope(x, cos, sin)
    assert kept.total == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rotates_in_float32(dtype):
    cos, sin = (t[None] for t in rope_table(SMALL, 64))
    x = torch.randn(1, 2, 64, 16).to(dtype)
    y = apply_rope(x, cos, sin)
    assert y.dtype == dtype
    assert torch.equal(y, apply_rope(x.float(), cos, sin).to(dtype))


def test_works_on_the_meta_device():
    with torch.device("meta"):
        cos, sin = rope_table(SMALL, 4)
        assert apply_rope(torch.empty(1, 2, 4, 16), cos[None], sin[None]).shape == (1, 2, 4, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beside", [True, False])
def test_short_tables_turn_in_float32_too(dtype, beside):
    x, (cos, sin) = torch.randn(2, 3, 5, 16).to(dtype), (t[None].to(dtype) for t in rope_table(SMALL, 5))
    x = x if beside else x.mT.contiguous().mT
    torch.testing.assert_close(apply_rope(x, cos, sin), apply_rope(x.float(), cos.float(), sin.float()).to(dtype))


def test_rows_of_other_positions_or_widths_are_refused():
    x, (cos, sin) = torch.randn(2, 3, 1, 16), (t[None] for t in rope_table(SMALL, 5))
    unchecked = inspect.unwrap(apply_rope)  # tests check annotated shapes, a program does not
    with pytest.raises(ValueError, match="x has 1 positions of 16 features, the tables 5 of 16"):
        unchecked(x, cos, sin)
    with pytest.raises(ValueError, match="x has 1 positions of 16 features, the tables 1 of 4"):
        unchecked(x, cos[:, :1, :2], sin[:, :1, :2])


@pytest.mark.parametrize("permute", [interleaved_to_half, half_to_interleaved])
@pytest.mark.parametrize("n_heads", [0, 3, 16])
def test_rows_that_are_no_whole_pairs_are_refused(permute, n_heads):
    with pytest.raises(ValueError, match=f"16 rows are not {n_heads} heads of whole pairs"):
        permute(torch.randn(16, 2), n_heads)
