"""Attention: masks, grouped heads, the tiled version by hand, and the interchangeable inner products."""

import functools
import gc
import inspect
import os
import subprocess
import sys
import unittest.mock
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

from llama_edu.config import LlamaConfig
from llama_edu.model.attention import (
    BLOCK,
    Attention,
    FlexAttention,
    ManualAttention,
    ScaledDotProduct,
    attention_weights,
    block_attention,
    causal_mask,
    document_mask,
    mean_pool_heads,
    rotated_block_attention,
    tiled_attention,
)
from llama_edu.model.manual import has_kernels, manual_backward
from llama_edu.model.rope import apply_rope, rope_table
from llama_edu.native import _powers_of_two


def heads(batch=2, n_heads=4, n_kv_heads=2, seq=12, head_dim=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, seq, head_dim, dtype=dtype, generator=g) for h in (n_heads, n_kv_heads, n_kv_heads)]


def plain(q, k, v, mask=None):
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return attention_weights(q, k, mask) @ v


def attention(**kwargs):
    torch.manual_seed(0)
    cfg = LlamaConfig(**{"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1, **kwargs})
    return Attention(cfg), [t[None] for t in rope_table(cfg, 64)]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    seq=st.integers(1, 20),
    tile=st.integers(1, 24),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tiles_of_any_size_give_attention_and_its_gradients(batch, kv, group, seq, tile, masked, seed):
    inputs = [x.requires_grad_() for x in heads(batch, kv * group, kv, seq, 4, seed=seed)]
    mask = None
    if masked:  # any mask at all, with empty rows
        mask = torch.rand(batch, 1, seq, seq, generator=torch.Generator().manual_seed(seed)) < 0.3
    out, expected = ManualAttention.apply(*inputs, mask, tile), plain(*inputs, mask)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_manual_backward_passes_gradcheck():
    inputs = [x.requires_grad_() for x in heads(1, 4, 2, 5, 4)]
    assert torch.autograd.gradcheck(lambda *a: ManualAttention.apply(*a, None, 2), inputs)


@pytest.mark.parametrize("seq", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 60])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_blocks_give_attention_and_its_gradients(seq, n_kv_heads):
    inputs = [x.requires_grad_() for x in heads(n_kv_heads=n_kv_heads, seq=seq)]
    out, expected = block_attention(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_are_an_operation_that_a_compiler_may_trust(batch, n_kv_heads, dtype):
    """It plans with the strides that it is told. Attention hands in heads that lie beside each other in memory."""
    ops, mode = torch.ops.llama_edu, FakeTensorMode()
    apart = heads(batch, n_kv_heads=n_kv_heads, seq=BLOCK + 5, head_dim=16, dtype=dtype)
    beside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in apart]
    for q, k, v in (apart, beside):
        torch.library.opcheck(ops.block_attention.default, [x.clone().requires_grad_() for x in (q, k, v)])
        told = [mode.from_tensor(x) for x in (q, k, v)]
        with mode:
            forward, backward = ops.block_attention(*told), ops.block_attention_backward(told[0], *told)
        assert ops.block_attention(q, k, v).stride() == forward.stride()
        for real, fake in zip(ops.block_attention_backward(q, q, k, v), backward):
            assert (real.shape, real.stride()) == (fake.shape, fake.stride())


@pytest.mark.parametrize(("degree", "limit"), [(3, 2e-4), (4, 7e-6), (5, 2.1e-7)])
def test_powers_of_two_are_as_near_as_they_say(degree, limit):
    """The largest weight of a row is 1 before it is divided: its power, the 0th, is exact."""
    powers, f = _powers_of_two(degree), np.linspace(-0.5, 0.5, 10_001)
    assert len(powers) == degree + 1 and powers[0] == 1
    off = abs(np.polynomial.polynomial.polyval(f, powers) / np.exp2(f) - 1)
    assert limit / 2 < off.max() < limit


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_blocks_err_as_little_as_the_fused_kernel(dtype, limit):
    """bfloat16 has 8 bits: an error of 2**-9 a number, and scores, weights and results are rounded in turn."""
    inputs = [x.requires_grad_() for x in heads(2, 4, 2, 4 * BLOCK, 64, dtype)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[0])
    exact = torch.autograd.grad(plain(*wide), wide, grad.double())
    for manual in (None, False):  # left alone, then PyTorch's kernel
        with nullcontext() if manual is None else manual_backward(manual):
            out = ScaledDotProduct()(*inputs)
        assert out.dtype == dtype
        assert (out - plain(*wide)).norm() < limit * plain(*wide).norm()
        for ours, true in zip(torch.autograd.grad(out, inputs, grad), exact):
            assert (ours - true).norm() < limit * true.norm()


@pytest.mark.parametrize("tiles", [True, False], ids=["any instruction", "no tiles"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    "seq, head_dim", [(1, 16), (2, 128), (63, 48), (64, 80), (65, 256), (129, 64), (300, 112), (200, 24)]
)
def test_blocks_are_right_for_every_shape(monkeypatch, seq, head_dim, group, dtype, limit, tiles):
    """Of whole and broken blocks, odd numbers of rows, and widths that kernels take (all but the last) or not."""
    if not tiles and has_kernels(dtype):  # a processor that multiplies tiles stands in for one that does not
        monkeypatch.setattr("llama_edu.model.attention_kernels.has_tiles", lambda: False)
    inputs = [x.to(dtype).requires_grad_() for x in heads(2, 2 * group, 2, seq, head_dim)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = block_attention(*inputs), plain(*wide)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    pairs = [(out, expected), *zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, wide, grad))]
    for ours, exact in pairs:
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert (ours - exact).norm() <= limit * exact.norm() + 1e-6  # with one token the scores have no gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_head_and_many_threads(dtype):
    """The blocks of a head are shared then: the numbers stay the same."""
    inputs, threads = [x.requires_grad_() for x in heads(1, 2, 1, 500, 32, dtype)], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = block_attention(*inputs)
        grads = torch.autograd.grad(alone.sum(), inputs)
        torch.set_num_threads(5)
        shared = block_attention(*inputs)
        assert torch.equal(shared, alone)
        for ours, theirs in zip(torch.autograd.grad(shared.sum(), inputs), grads):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_take_heads_wherever_they_lie(dtype):
    base = heads(2, 4, 2, 140, 32, dtype)
    grad = torch.randn(2, 4, 140, 32).to(dtype)
    expected = block_attention(*base), *torch.ops.llama_edu.block_attention_backward(grad, *base)
    ways = {
        "heads beside each other": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "from an odd place": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        "in odd strides": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
        "the other way round": lambda x: x.mT.contiguous().mT,
        "the same for all sequences": lambda x: x[:1].expand_as(x),
    }
    for way in ways.values():
        moved = [way(x) for x in (*base, grad)]
        if moved[0].stride(0) == 0:
            expected = [x[:1].expand_as(x) for x in expected]
        for ours, theirs in zip(
            (block_attention(*moved[:3]), *torch.ops.llama_edu.block_attention_backward(moved[3], *moved[:3])), expected
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong, which", [(torch.nan, 0), (torch.nan, 1), (torch.nan, 2), (torch.inf, 0)])
def test_what_is_not_finite_reaches_those_who_see_it_and_nobody_before(dtype, wrong, which):
    inputs = heads(1, 2, 1, 200, 32, dtype)
    inputs[which][0, 0, 150] = wrong
    out = block_attention(*inputs)
    assert not out[0, 0, 150].isfinite().any() and out[0, :, :128].isfinite().all()


@pytest.mark.parametrize("openmp", [True, False])
def test_an_interrupt_in_a_kernel_reaches_the_caller(monkeypatch, openmp):
    from llama_edu import native
    from llama_edu.model import attention_kernels

    def kernel(taken, *arrays):
        raise KeyboardInterrupt

    q, k, v = heads(2, 4, 4, 140, 32, torch.bfloat16)
    expected = block_attention(q, k, v)
    if not openmp:
        monkeypatch.setattr(native, "_openmp", lambda: None)
    assert torch.equal(block_attention(q, k, v), expected)  # threads of either kind
    monkeypatch.setattr(attention_kernels, "_forward", kernel)
    with pytest.raises(KeyboardInterrupt):
        attention_kernels.attend(q, k, v)
    monkeypatch.setattr(attention_kernels, "_forward", lambda taken, *arrays: None)
    with pytest.raises(RuntimeError, match="0 of its 8 units"):
        attention_kernels.attend(q, k, v)


def test_blocks_need_no_special_processor():
    """numba told to compile for any processor: the batched products of PyTorch serve."""
    code = """
import torch
from llama_edu.model import attention
for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
    q, k, v = (torch.randn(1, 2, 140, 32).to(dtype) for _ in range(3))
    assert attention._kernels(q) is None
    assert "block" not in type(attention.ScaledDotProduct()(q.requires_grad_(), k, v).grad_fn).__name__
    q = q.detach()
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert (attention.block_attention(q, k, v) - exact).norm() < limit * exact.norm()
"""
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def turned(dtype, tables, seq, head_dim, group=2):
    """Inputs of attention, and tables: for all sequences one, or one for each."""
    g = torch.Generator().manual_seed(2)
    angles = torch.randn(tables, seq, head_dim // 2, generator=g)
    return [x.to(dtype) for x in heads(2, 2 * group, 2, seq, head_dim)], angles.cos(), angles.sin()


@pytest.mark.parametrize("tiles", [True, False], ids=["any instruction", "no tiles"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("seq, head_dim", [(1, 16), (65, 48), (130, 64), (300, 112), (200, 24)])
def test_rotation_inside_is_rotation_before(monkeypatch, seq, head_dim, tables, group, dtype, limit, tiles):
    if not tiles and has_kernels(dtype):
        monkeypatch.setattr("llama_edu.model.attention_kernels.has_tiles", lambda: False)
    inputs, cos, sin = turned(dtype, tables, seq, head_dim, group)
    inputs = [x.requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out = rotated_block_attention(*inputs, cos, sin)
    expected = plain(*(apply_rope(x, cos.double(), sin.double()) for x in wide[:2]), wide[2])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    pairs = [(out, expected), *zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, wide, grad))]
    for ours, exact in pairs:
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert (ours - exact).norm() <= limit * exact.norm() + 1e-6


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_inside_is_an_operation_that_a_compiler_may_trust(dtype, tables):
    ops, mode = torch.ops.llama_edu, FakeTensorMode()
    apart, *both = turned(dtype, tables, BLOCK + 5, 16)
    for q, k, v in (apart, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in apart]):
        inputs = [*(x.clone().requires_grad_() for x in (q, k, v)), *both]
        torch.library.opcheck(ops.rotated_block_attention.default, inputs)
        told = [mode.from_tensor(x.detach()) for x in inputs]
        with mode:
            forward = ops.rotated_block_attention(*told)
            backward = ops.rotated_block_attention_backward(told[0], *told)
        assert ops.rotated_block_attention(q, k, v, *both).stride() == forward.stride()
        for real, fake in zip(ops.rotated_block_attention_backward(q, q, k, v, *both), backward):
            assert (real.shape, real.stride()) == (fake.shape, fake.stride())


def test_tables_that_do_not_fit_reach_no_kernel(monkeypatch):
    """It would read beyond them."""
    (q, k, v), cos, sin = turned(torch.bfloat16, 2, BLOCK, 16)
    reached = unittest.mock.Mock(side_effect=AssertionError("the kernel was called"))
    monkeypatch.setattr("llama_edu.model.attention._kernels", lambda q: unittest.mock.Mock(attend=reached))
    with pytest.raises(AssertionError, match="was called"):  # as it is for tables that fit
        inspect.unwrap(rotated_block_attention._init_fn)(q, k, v, cos, sin)
    unchecked = inspect.unwrap(rotated_block_attention._init_fn)
    for tables in ((cos[:, 1:], sin[:, 1:]), (cos[..., 1:], sin[..., 1:]), (cos.repeat(2, 1, 1), sin.repeat(2, 1, 1))):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            unchecked(q, k, v, *tables)


def operations(layer, x, *tables):
    """The output of a layer, and our operations that it ran."""
    with profile() as seen:
        out = layer(x, *tables)
    return out, {e.key for e in seen.key_averages() if e.key.startswith("llama_edu::")}


def test_a_layer_rotates_inside_where_nobody_looks():
    """Who exchanges or hooks the inner product gets rotated queries and keys; so do a mask, a cache, and float32."""
    layer, tables = attention(dim=64, n_heads=4, n_kv_heads=2)
    layer, tables = layer.bfloat16(), [t.repeat(1, 4, 1)[:, : BLOCK + 3] for t in tables]
    x = torch.randn(2, BLOCK + 3, 64).bfloat16()
    inside, ran = operations(layer, x, *tables)
    name = "llama_edu::rotated_block_attention"
    assert (name in ran) == has_kernels(torch.bfloat16)
    seen = []
    handle = layer.inner.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    watched, ran = operations(layer, x, *tables)
    handle.remove()
    keys = layer.wk(x).unflatten(-1, (-1, 16)).transpose(1, 2)
    assert name not in ran and torch.equal(seen[0], apply_rope(keys, *tables))
    torch.testing.assert_close(inside, watched, rtol=2e-2, atol=2e-2)
    with manual_backward(False):
        assert not operations(layer, x, *tables)[1]
    assert name not in operations(layer, x[:, :60], *(t[:, :60] for t in tables))[1]
    mask = causal_mask(torch.arange(BLOCK + 3)[None], BLOCK + 3)
    assert name not in operations(layer, x, *tables, mask)[1]
    assert name not in operations(layer.float(), x.float(), *tables)[1]


def test_a_layer_that_rotates_inside_has_the_gradients_of_one_that_does_not():
    layer, tables = attention(dim=64, n_heads=4, n_kv_heads=2)
    layer, tables = layer.bfloat16(), [t.repeat(1, 4, 1)[:, :200] for t in tables]
    x = torch.randn(2, 200, 64).bfloat16()
    grads = []
    for ours in (True, False):
        with nullcontext() if ours else manual_backward(False):
            layer.zero_grad()
            layer(x, *tables).float().square().sum().backward()
        grads.append([p.grad.double() for p in layer.parameters()])
    for a, b in zip(*grads):
        assert (a - b).norm() < 0.03 * b.norm()
    loss = lambda x: layer(x, *tables).float().square().sum()
    of_function = torch.func.grad(loss)(x)  # looks into PyTorch's operations
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert (of_function - leaf.grad).norm() < 0.03 * leaf.grad.norm()


def used(q, k, v, mask=None):
    out = ScaledDotProduct()(q, k, v, mask)
    return "block_attention" in type(out.grad_fn).__name__


def test_blocks_serve_long_causal_sequences_alone():
    long, short = ([x.float().requires_grad_() for x in heads(seq=n, head_dim=16)] for n in (BLOCK, BLOCK - 1))
    assert used(*long) == has_kernels(torch.float32) and not used(*short)
    assert not used(*long, torch.ones(1, 1, BLOCK, BLOCK, dtype=torch.bool).tril())
    assert not used(*(x.double() for x in long))
    with manual_backward(False):
        assert not used(*long)


MISFITS = {  # batch, heads, length, head_dim of q, k and v
    "keys that go on after the queries": ((1, 4, BLOCK, 16), (1, 2, BLOCK + 900, 16), (1, 2, BLOCK + 900, 16)),
    "heads that do not divide": ((1, 5, BLOCK, 16), (1, 2, BLOCK, 16), (1, 2, BLOCK, 16)),
    "another batch": ((2, 4, BLOCK, 16), (1, 2, BLOCK, 16), (1, 2, BLOCK, 16)),
    "narrow values": ((1, 4, BLOCK, 32), (1, 2, BLOCK, 32), (1, 2, BLOCK, 16)),
    "one value head for two key heads": ((1, 4, BLOCK, 16), (1, 2, BLOCK, 16), (1, 1, BLOCK, 16)),
    "values that end before the keys": ((1, 4, BLOCK, 16), (1, 2, BLOCK, 16), (1, 2, BLOCK // 2, 16)),
}


def told(function, *args):
    """The result, or the kind of error."""
    try:
        return function(*args)
    except (RuntimeError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize("misfit", MISFITS)
def test_heads_that_do_not_fit_reach_no_kernel(misfit):
    """They take addresses and would read and write beyond. PyTorch's kernel serves what it can, or refuses."""
    q, k, v = (torch.randn(shape) for shape in MISFITS[misfit])
    unchecked = inspect.unwrap(block_attention._init_fn)  # tests check annotated shapes, a program does not
    with pytest.raises(ValueError, match="k and v must have"):
        unchecked(q, k, v)
    fused = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    ours, theirs = told(inspect.unwrap(ScaledDotProduct.forward), ScaledDotProduct(), q, k, v), told(fused, q, k, v)
    assert ours is theirs if isinstance(theirs, type) else torch.equal(ours, theirs)


def test_transforms_of_functions_are_those_of_the_fused_kernel():
    q, k, v = heads(seq=BLOCK, head_dim=16, dtype=torch.float32)
    inner = ScaledDotProduct()
    loss = lambda q, k, v: inner(q[None], k[None], v[None]).square().sum()
    each = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    leaf = q.clone().requires_grad_()
    inner(leaf, k, v).square().sum().backward()
    torch.testing.assert_close(each, leaf.grad, rtol=1e-4, atol=1e-5)
    slope = 0.1 * torch.randn_like(q)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda q: inner(q, k, v).square().sum(), (q,), (slope,))
        with forward_ad.dual_level():
            dual = inner(forward_ad.make_dual(q, slope), k, v).square().sum()
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
    torch.testing.assert_close(tangent, (leaf.grad * slope).sum(), rtol=1e-4, atol=1e-4)


def test_blocks_compile_with_any_length_as_one_graph():
    torch._dynamo.reset()
    function = torch.compile(inspect.unwrap(ScaledDotProduct.forward), dynamic=True, fullgraph=True)
    for seq, head_dim in ((BLOCK, 16), (BLOCK + 9, 32)):
        q, k, v = heads(seq=seq, head_dim=head_dim, dtype=torch.float32)
        torch.testing.assert_close(function(ScaledDotProduct(), q, k, v), plain(q, k, v), atol=2e-6, rtol=0)


def test_other_dtypes_of_keys_reach_no_kernel():
    q, k, v = heads(seq=BLOCK, head_dim=16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"in float32, k .* in bfloat16"):
        block_attention(q, k.bfloat16(), v.bfloat16())
    with pytest.raises(RuntimeError, match="same dtype"):
        ScaledDotProduct()(q, k.bfloat16(), v.bfloat16())


@pytest.mark.parametrize("batch, seq", [(0, 4), (0, BLOCK + 4), (2, 0)])
@pytest.mark.parametrize("manual", [None, False, True])
def test_no_sequences_and_no_tokens_give_as_many_outputs(batch, seq, manual):
    module, x = attention(dim=64)[0], torch.randn(batch, seq, 64, requires_grad=True)
    angles = [t[None] for t in rope_table(LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=1), max(seq, 1))]
    with nullcontext() if manual is None else manual_backward(manual):
        out = module(x, *(t[:, :seq] for t in angles))
        out.sum().backward()
    assert out.shape == x.shape == x.grad.shape


def test_memory_of_tiles_does_not_grow_with_the_context():
    def extra(function, seq):
        inputs = [x.requires_grad_() for x in heads(1, 4, 2, seq, 32, torch.float32)]
        gc.collect()
        with profile(profile_memory=True, acc_events=True) as record:
            function(*inputs).sum().backward()
        held = peak = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak - inputs[0].nbytes - sum(x.grad.nbytes for x in inputs)

    tiled = lambda *qkv: ManualAttention.apply(*qkv, None, 64)
    kept = 4 * 4 * 2048 * 2  # one number per query in float32, and a copy of it
    assert extra(tiled, 2048) < 1.1 * extra(tiled, 512) + kept
    assert extra(plain, 2048) > 10 * extra(plain, 512)


@pytest.mark.parametrize("tile", [0, -3])
def test_tiles_have_a_size(tile):
    with pytest.raises(ValueError, match=f"tile is {tile}; it must be at least 1"):
        tiled_attention(*heads(), tile=tile)


def test_log_denominators_are_those_of_softmax():
    q, k, v = heads(n_kv_heads=4)
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(tiled_attention(q, k, v, tile=5)[1], scores.logsumexp(-1))


def test_tiled_sums_in_float32_for_half_precision():
    q, k, v = heads(seq=300, dtype=torch.bfloat16)
    out = tiled_attention(q, k, v)[0]
    assert out.dtype == torch.bfloat16
    exact = plain(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=2**-8)


@pytest.mark.parametrize("inner", [ScaledDotProduct(), FlexAttention(compile=False)], ids=["sdpa", "flex"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_inner_products_agree_with_the_formula(inner, n_kv_heads):
    q, k, v = heads(n_kv_heads=n_kv_heads, seq=40, head_dim=16, dtype=torch.float32)
    documents = torch.arange(40).div(15, rounding_mode="floor").expand(2, -1)
    blind = document_mask(documents)
    blind[0, :, 20] = False
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mask in (None, document_mask(documents), blind, blind[:1]):
            torch.testing.assert_close(inner(q, k, v, mask), plain(q, k, v, mask), atol=2e-6, rtol=0)
        assert (inner(q, k, v, blind)[0, :, 20] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("manual", [False, True])
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(dtype, manual):
    inputs = [x.requires_grad_() for x in heads(seq=200, dtype=dtype)]
    mask = causal_mask(torch.arange(200).expand(2, -1), 200)
    mask[:, :, :30] = False
    with manual_backward(manual):
        out = ScaledDotProduct()(*inputs, mask)
    out.float().square().sum().backward()
    assert (out[:, :, :30] == 0).all() and out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert (inputs[0].grad[:, :, :30] == 0).all()


def test_no_token_sees_the_future():
    layer, (cos, sin) = attention()
    x = torch.randn(2, 10, 32)
    y = x.clone()
    y[:, 7:] += 1
    before, after = (layer(t, cos[:, :10], sin[:, :10]) for t in (x, y))
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_packed_documents_equal_separate_runs():
    layer, (cos, sin) = attention()
    x, documents = torch.randn(1, 12, 32), torch.tensor([[0] * 5 + [1] * 4 + [7] * 3])
    packed = layer(x, cos[:, :12], sin[:, :12], document_mask(documents))
    for i in (0, 1, 7):
        own = x[:, documents[0] == i]
        alone = layer(own, cos[:, : own.shape[1]], sin[:, : own.shape[1]])
        torch.testing.assert_close(packed[:, documents[0] == i], alone, atol=1e-5, rtol=0)


def test_causal_mask_counts_positions_from_zero():
    mask = causal_mask(torch.tensor([[0, 1], [3, 4]]), 5)
    assert mask.shape == (2, 1, 2, 5)
    assert mask.sum(-1).flatten().tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize(
    "kwargs", [{}, {"n_kv_heads": 1}, {"n_kv_heads": 4, "head_dim": 16}], ids=["gqa", "mqa", "wide"]
)
def test_manual_and_automatic_gradients_of_the_module_agree(kwargs):
    layer, (cos, sin) = attention(**kwargs)
    layer = layer.double()
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    found = []
    for manual in (False, True):
        with manual_backward(manual):
            out = layer(x, cos[:, :9].double(), sin[:, :9].double())
        found.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_equal_heads_pool_to_themselves():
    one = torch.randn(2, 1, 8, 5)
    pooled = mean_pool_heads(one.expand(2, 3, 8, 5).reshape(48, 5), 8, 2)
    torch.testing.assert_close(pooled, one.reshape(16, 5))
    with pytest.raises(ValueError, match="do not pool into 5"):
        mean_pool_heads(torch.randn(48, 5), 8, 5)
    with pytest.raises(ValueError, match="do not pool into 0"):
        mean_pool_heads(torch.randn(48, 5), 8, 0)


def test_a_pooled_module_of_equal_heads_computes_the_same():
    full, (cos, sin) = attention(n_kv_heads=4)
    few, _ = attention(n_kv_heads=2)
    with torch.no_grad():
        for name in ("wk", "wv"):
            w = getattr(full, name).weight
            w.view(2, 2, 8, 32).copy_(w.view(2, 2, 8, 32)[:, :1].clone().expand(-1, 2, -1, -1))
            getattr(few, name).weight.copy_(mean_pool_heads(w, 8, 2))
        few.wq.weight.copy_(full.wq.weight)
        few.wo.weight.copy_(full.wo.weight)
    x = torch.randn(1, 9, 32)
    torch.testing.assert_close(few(x, cos[:, :9], sin[:, :9]), full(x, cos[:, :9], sin[:, :9]), atol=1e-6, rtol=0)


def test_flex_attention_in_the_module():
    layer, (cos, sin) = attention()
    x = torch.randn(2, 20, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = layer(x, cos[:, :20], sin[:, :20])
        layer.inner = FlexAttention(compile=False)
        torch.testing.assert_close(layer(x, cos[:, :20], sin[:, :20]), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_compiled_flex_attention_computes_the_same():
    q, k, v = heads(seq=64, head_dim=16, dtype=torch.float32)
    inner = FlexAttention(compile=True)
    mask = document_mask(torch.arange(64).div(20, rounding_mode="floor").expand(2, -1))
    with torch.no_grad():
        for m in (None, mask):
            torch.testing.assert_close(inner(q, k, v, m), plain(q, k, v, m), atol=2e-6, rtol=0)
