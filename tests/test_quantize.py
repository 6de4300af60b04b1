"""int8, int4 and FP8 weights: the error bounds, the layers, and whole models."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu import LlamaConfig, Transformer, generate
from llama_edu.errors import UserError
from llama_edu.generation.quantize import (
    FP8RowwiseLinear,
    Packed,
    QuantizedLinear,
    dequantize_groups,
    quantize,
    quantize_fp8_rows,
    quantize_groups,
    quantize_rows,
)

CFG = LlamaConfig(dim=48, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=100, max_seq_len=64)


def model(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(LlamaConfig(**{**vars(CFG), **changes}))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-6, 6), st.integers(1, 5), st.integers(1, 4))
def test_no_weight_is_wrong_by_more_than_half_a_step(seed, size, rows, groups):
    w = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * 10**size
    values, scales = quantize_rows(w)
    assert values.abs().amax(1).eq(127).all()  # every row uses the whole range
    assert ((values * scales - w).abs() <= 0.5001 * scales).all()
    packed, groups_scales = quantize_groups(w)
    assert packed.nbytes + groups_scales.nbytes == w.numel() * 4.5 / 8
    steps = groups_scales.float().repeat_interleave(32, dim=1)
    assert ((dequantize_groups(packed, groups_scales) - w).abs() <= 0.53 * steps).all()


def test_zeros_stay_zeros_and_odd_widths_are_refused_or_padded():
    zero = torch.zeros(3, 64)
    assert (quantize_rows(zero)[0] == 0).all()
    assert (dequantize_groups(*quantize_groups(zero)) == 0).all()
    assert (quantize_fp8_rows(zero)[0].float() == 0).all()
    with pytest.raises(ValueError, match="rows of 48 weights are not groups of 32"):
        quantize_groups(torch.zeros(2, 48))
    w = torch.randn(5, 48)
    for kind in ("float32", "bfloat16", "int8", "int4", "fp8"):
        packed = Packed.of(w, kind)
        assert packed.dense().shape == w.shape
        both = Packed.cat([packed, packed]).dense()
        torch.testing.assert_close(both, torch.cat([packed.dense()] * 2))


def test_int4_keeps_every_whole_number_of_its_range():
    w = torch.arange(-7, 8).repeat(5)[:64].float()[None]
    w[0, 0], w[0, 32] = 7, -7
    assert torch.equal(dequantize_groups(*quantize_groups(w)), w)


def test_fp8_is_wrong_by_one_part_in_sixteen_at_most_and_clips_at_the_bound():
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    values, scales = quantize_fp8_rows(x)
    back = values.float() * scales
    normal = x.abs() > scales * 2**-6
    assert ((back - x).abs()[normal] <= x.abs()[normal] / 16 * 1.0001).all()
    assert (scales <= x.abs().amax(1, keepdim=True) / 448 * 1.0001).all()
    row = torch.tensor([[5000.0, -600.0, 1.0]])
    values, scales = quantize_fp8_rows(row, bound=1200.0)
    assert float(scales) == pytest.approx(1200 / 448)  # the bound is of the largest value, not of the scale
    assert float(values[0, 0].float() * scales) == pytest.approx(1200)
    assert float(values[0, 1].float() * scales) == pytest.approx(-600, rel=1 / 16)


def test_the_fp8_layer_multiplies_exactly_what_fp8_holds():
    w, x = torch.randn(7, 48), torch.randn(2, 3, 48)
    layer = FP8RowwiseLinear(Packed.of(w, "fp8"))
    qx, sx = quantize_fp8_rows(x, 1200.0)
    qw, sw = quantize_fp8_rows(w)
    exact = torch.einsum("bsk,nk->bsn", qx.double() * sx, qw.double() * sw)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_fp8_touches_the_feed_forward_of_the_inner_layers_only():
    q = quantize(model(), "fp8")
    found = {name for name, m in q.named_modules() if isinstance(m, FP8RowwiseLinear)}
    assert found == {f"layers.{i}.feed_forward.{w}" for i in (1, 2) for w in ("w1", "w2", "w3")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_quantised_model_computes_with_the_dense_weights_that_it_stands_for(kind, tied):
    original = model(tie_embeddings=tied)
    before = {name: p.clone() for name, p in original.named_parameters()}
    q = quantize(original, kind)
    dense = Transformer(q.cfg)
    dense.load_state_dict({k: v for k, v in original.state_dict().items()})
    for name, m in q.named_modules():
        if isinstance(m, QuantizedLinear):
            dense.get_submodule(name).weight.data = m.packed.dense()
    tokens = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        got, exact, plain = q(tokens), dense(tokens), original(tokens)
    if kind == "fp8":  # activations are rounded too
        assert (got - plain).norm() < 0.1 * plain.norm()
    else:
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
    assert (got - plain).norm() < {"int8": 0.03, "int4": 0.5, "fp8": 0.1}[kind] * plain.norm()
    assert all(torch.equal(p, before[name]) for name, p in original.named_parameters())
    assert all(len(row) == 5 for row in generate(q, [[1, 2], [3]], max_new_tokens=5))
    again = q.to(torch.bfloat16)  # activations change, the format of the weights does not
    assert {m.values.dtype for m in again.modules() if isinstance(m, QuantizedLinear)} <= {
        torch.int8,
        torch.uint8,
        torch.float8_e4m3fn,
    }
    assert again(tokens).isfinite().all()


def test_what_cannot_be_quantised_is_refused_with_a_sentence():
    with pytest.raises(UserError, match="'int5' are not known"):
        quantize(model(), "int5")
    with pytest.raises(UserError, match="quantised already"):
        quantize(quantize(model(), "int8"), "int4")


def test_errors_order_as_the_bits_do():
    m, tokens = model(), torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = F.log_softmax(m(tokens), -1)
        loss = {k: float((quantize(m, k)(tokens).log_softmax(-1) - exact).norm()) for k in ("int8", "int4")}
    assert loss["int8"] < loss["int4"] / 4 and math.isfinite(loss["int4"])
