"""RMSNorm: the same numbers as others in every dtype, and a backward pass by hand that agrees with autograd."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.profiler import profile
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_edu.model import RMSNorm, is_manual, manual_backward
from llama_edu.model.manual import SavedBytes, has_kernels
from llama_edu.model.norm import ManualRMSNorm, _rms_norm_kernel
from llama_edu.model.norm_kernel import normalize


def norm_with_weight(dim, eps=1e-5, dtype=torch.float32):
    norm = RMSNorm(dim, eps)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(1))
    return norm.to(dtype)


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64)])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_equals_torch_and_transformers_in_float32(shape, eps, manual):
    norm, x = norm_with_weight(64, eps), 3 * torch.randn(shape)
    torch_norm, hugging_face = nn.RMSNorm(64, eps), LlamaRMSNorm(64, eps)
    torch_norm.load_state_dict(norm.state_dict())
    hugging_face.load_state_dict(norm.state_dict())
    with manual_backward(manual):
        y = norm(x)
    torch.testing.assert_close(y, torch_norm(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, hugging_face(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-2, 1.0, 300.0, 2000.0])
def test_low_precision_is_the_float32_result_rounded_once(size, dtype, manual):
    norm = norm_with_weight(512, dtype=dtype)
    x = (size * torch.randn(8, 512)).to(dtype)
    exact = F.rms_norm(x.float(), (512,), norm.weight.float(), norm.eps)
    with manual_backward(manual):
        y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gradcheck(shape, eps):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ManualRMSNorm.apply, (x, weight, eps))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_equal_autograd(dtype, tolerance):
    norm = norm_with_weight(96, dtype=dtype)
    x, grad = torch.randn(2, 4, 9, 96, dtype=dtype)
    x.requires_grad_()
    results = []
    for on in (True, False):
        with manual_backward(on):
            y = norm(x)
        results.append(torch.autograd.grad(y, [x, norm.weight], grad))
    for ours, autograd in zip(*results):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, autograd, rtol=tolerance, atol=tolerance * autograd.abs().max().item())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_lands_on_the_sphere_and_ignores_scale(dim, scale, seed):
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    norm = RMSNorm(dim, eps=0.0).double()
    y = norm(x)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(norm(scale * x), y)


def test_zeros_stay_zeros_with_finite_gradients():
    norm, x = RMSNorm(8), torch.zeros(2, 8, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8)) and x.grad.isfinite().all()


def test_by_hand_keeps_the_input_and_one_number_a_vector():
    norm = RMSNorm(256).bfloat16()
    x = torch.randn(4, 32, 256, dtype=torch.bfloat16, requires_grad=True)
    with SavedBytes(besides=norm.parameters()) as kept, manual_backward():
        norm(x)
    assert kept.total == x.nbytes + 4 * 32 * 4


@pytest.mark.parametrize("rows, dim", [(128, 1), (130, 7), (257, 48), (1000, 300)])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_rounds_the_exact_result(dtype, weights, rows, dim):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(dim, rows, 2, generator=g).to(dtype).permute(2, 1, 0)  # no row lies in one piece
    weight = torch.randn(2 * dim, generator=g).to(weights)[::2]
    y, inv_rms = _rms_norm_kernel(x, weight, 1e-5)
    exact = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    assert (y.dtype, inv_rms.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(inv_rms.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        y, (x.double() * exact * weight).to(dtype), rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=0
    )
    torch.library.opcheck(_rms_norm_kernel, (x, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_hides_no_damage(dtype):
    x, ones = torch.ones(128, 40, dtype=dtype), torch.ones(40)
    damaged = x.clone()
    damaged[3, 5], damaged[4, 0] = torch.nan, torch.inf
    y, _ = _rms_norm_kernel(damaged, ones, 1e-5)
    assert y[3].isnan().all() and y[4, 0].isnan() and y[5:].isfinite().all()
    all_bits = torch.full((40,), -1, dtype=torch.int32).view(torch.float32)  # a NaN that rounding must not carry over
    assert _rms_norm_kernel(x, all_bits, 1e-5)[0].isnan().all()
    assert not _rms_norm_kernel(x * 1e30, ones, 1e-5)[0].any()  # squares that overflow: 1 / rms is 0, as in PyTorch
    with pytest.raises(ValueError, match="does not scale"):
        inspect.unwrap(normalize)(x, torch.ones(39), 1e-5)


def test_the_kernel_serves_many_rows_unless_told_otherwise():
    norm, x = RMSNorm(32), torch.randn(2, 128, 32)

    def ran(norm, x):
        with profile() as seen:
            norm(x)
        return "llama_edu::rms_norm" in {e.key for e in seen.key_averages()}

    assert ran(norm, x) == has_kernels(torch.float32)
    with torch.no_grad():
        assert ran(norm, x) == has_kernels(torch.float32)
        assert not ran(norm, x[:, :127]) and not ran(norm.double(), x.double())
        with manual_backward(False):
            assert not ran(norm.float(), x)
        torch.testing.assert_close(torch.func.vmap(norm)(x), norm(x))
    slope = torch.randn_like(x)
    with manual_backward(False):
        _, tangent = torch.func.jvp(norm, (x,), (slope,))
    with torch.no_grad(), forward_ad.dual_level():
        dual = norm(forward_ad.make_dual(x, slope))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


def test_switch_nests_restores_and_survives_errors():
    assert not is_manual() and is_manual(default=True)
    with manual_backward():
        assert is_manual()
        with manual_backward(False):
            assert not is_manual() and not is_manual(default=True)
        assert is_manual()
    with pytest.raises(RuntimeError, match="inside"), manual_backward():
        raise RuntimeError("inside")
    assert not is_manual()


def test_second_derivatives_need_autograd():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8).double()
    with manual_backward(False):
        assert torch.autograd.gradgradcheck(norm, (x,))
    with manual_backward(), pytest.raises(RuntimeError, match="once_differentiable"):
        (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
        first.sum().backward()


def test_on_the_meta_device_and_in_autocast():
    norm = RMSNorm(16).to("meta")
    assert norm(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 16)
    norm, x = norm_with_weight(16), torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
        y.sum().backward()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.rms_norm(x, (16,), norm.weight, 1e-5), rtol=1e-6, atol=1e-6)


COMPILED = """
import torch
from llama_edu import LlamaConfig
from llama_edu.model import FeedForward, RMSNorm, apply_rope, manual_backward, rope_table

cfg = LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=8, max_seq_len=8)
tables = [t[None] for t in rope_table(cfg)]
parts = [(RMSNorm(16), ()), (FeedForward(16, 48), ()), (apply_rope, tables)]
for part, rest in parts:
    results = []
    for run in (part, torch.compile(part, fullgraph=True)):
        x = torch.linspace(-1, 1, 4 * 8 * 16).view(1, 4, 8, 16).requires_grad_()
        y = run(x, *rest)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
def test_the_parts_compile_without_a_graph_break():
    """In a process of its own: the compiler cannot follow the type checks that tests are run with."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)
