"""The SwiGLU layer: equal to transformers, and a backward pass by hand that agrees with autograd."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.profiler import profile
from transformers.models.llama.modeling_llama import LlamaMLP

from llama_edu import LlamaConfig
from llama_edu.model import FeedForward, manual_backward
from llama_edu.model.feedforward import ManualSwiGLU, _swiglu, _swiglu_backward
from llama_edu.model.manual import SavedBytes, has_kernels


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)])
def test_equals_transformers(shape, manual):
    cfg = LlamaConfig(dim=32, n_layers=1, n_heads=2, vocab_size=8, ffn_dim=88)
    ours, theirs = FeedForward(32, 88), LlamaMLP(transformers.LlamaConfig(**cfg.to_hf()))
    for name, other in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
        getattr(theirs, other).load_state_dict(getattr(ours, name).state_dict())
    x = torch.randn(shape)
    with manual_backward(manual):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-7)


def test_names_and_shapes_are_metas():
    shapes = {name: tuple(p.shape) for name, p in FeedForward(32, 88).named_parameters()}
    assert shapes == {"w1.weight": (88, 32), "w2.weight": (32, 88), "w3.weight": (88, 32)}


def test_gradcheck():
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(ManualSwiGLU.apply, (gate.requires_grad_(), up.requires_grad_()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_gradients_equal_autograd(dtype, tolerance):
    layer = FeedForward(32, 88).to(dtype)
    x = torch.randn(2, 6, 32, dtype=dtype, requires_grad=True)
    results = []
    for on in (True, False):
        with manual_backward(on):
            y = layer(x)
        results.append(torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y)))
    for ours, autograd in zip(*results):
        torch.testing.assert_close(ours, autograd, rtol=tolerance, atol=tolerance * autograd.abs().max().item())


def test_gradients_stay_finite_for_extreme_gates():
    gate = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30], requires_grad=True)
    up = torch.ones(5, requires_grad=True)
    ManualSwiGLU.apply(gate, up).sum().backward()
    torch.testing.assert_close(gate.grad, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(up.grad, F.silu(gate.detach()))


def test_by_hand_keeps_one_wide_tensor_less():
    layer = FeedForward(32, 96)
    x = torch.randn(10, 32, requires_grad=True)
    kept = {}
    for on in (True, False):
        with SavedBytes(besides=layer.parameters()) as saved, manual_backward(on):
            layer(x)
        kept[on] = saved.total
    assert kept[True] == x.nbytes + 3 * 10 * 96 * 4
    assert kept[False] - kept[True] == 10 * 96 * 4


def test_inputs_are_left_alone():
    gate, up = torch.randn(2, 4, 6)
    before = gate.clone(), up.clone()
    leaves = gate.requires_grad_(), up.requires_grad_()
    ManualSwiGLU.apply(*leaves).sum().backward()
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


def test_works_on_the_meta_device():
    layer = FeedForward(16, 48).to("meta")
    for on in (True, False):
        with manual_backward(on):
            assert layer(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 16)


def assert_near(ours, exact):
    """To the rounding of the dtype, once, and no more than 1e-30 from what is smaller."""
    near = 4e-6 if ours.dtype == torch.float32 else 2**-8 + 2e-4
    torch.testing.assert_close(ours.double(), exact, rtol=near, atol=1e-30)


@pytest.mark.parametrize("shape", [(1, 16), (3, 128, 48), (2, 257, 2048), (130, 7), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_rounds_the_exact_result(dtype, shape):
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 10.0, 100.0])[torch.randint(3, shape, generator=g)]  # far into both tails
    gate, up, grad = (torch.randn(*shape, 2, generator=g)[..., 0] for _ in range(3))  # not in one piece
    gate, up, grad = (x.to(dtype) for x in (gate * spread, up, grad))
    wide = [x.double().requires_grad_() for x in (gate, up)]
    exact = F.silu(wide[0]) * wide[1]
    exact.backward(grad.double())
    out, gradients = _swiglu(gate, up), _swiglu_backward(grad, gate, up)
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    by_kernel = has_kernels(dtype) and shape[-1] % 16 == 0
    if by_kernel:
        assert_near(out, exact.detach())
    else:
        torch.testing.assert_close(out, F.silu(gate) * up)
    torch.testing.assert_close(gradients[1].double(), wide[1].grad, rtol=2**-7 if by_kernel else 2**-6, atol=1e-30)
    scale = (1 + gate.double().abs()) * (up * grad).double().abs()  # two terms that may cancel
    roundings = 2 if by_kernel else 5
    error = (gradients[0].double() - wide[0].grad).abs()
    assert (error <= roundings * torch.finfo(dtype).eps * scale + 1e-30).all()
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    torch.library.opcheck(_swiglu, leaves)
    torch.library.opcheck(_swiglu_backward, (grad, gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_hides_no_damage(dtype):
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -200.0, 1.0, -0.0] * 2, dtype=dtype)[None]
    ones = torch.ones_like(gate)
    for expected, ours in ((F.silu(gate), _swiglu(gate, ones)), (F.silu(gate), _swiglu_backward(ones, gate, ones)[1])):
        torch.testing.assert_close(ours, expected, rtol=8e-3, atol=1e-30, equal_nan=True)
    slopes = _swiglu_backward(ones, gate, ones)[0][0, 3:8].float()
    torch.testing.assert_close(slopes, torch.tensor([1, 0, 0, 0.9277, 0.5]), rtol=8e-3, atol=1e-30)
    damaged = ones.clone()
    damaged[0, 6] = torch.nan
    assert _swiglu(gate, damaged)[0, 6].isnan() and _swiglu_backward(damaged, ones, ones)[0][0, 6].isnan()


def test_the_kernel_refuses_what_does_not_fit():
    from llama_edu.model.swiglu_kernel import gated, gated_backward

    x = torch.ones(2, 16)
    for others in ((x, x[:1]), (x, x.bfloat16()), (x[:, :15], x[:, :15])):
        with pytest.raises(ValueError, match="one shape and dtype"):
            inspect.unwrap(gated)(*others)
    with pytest.raises(ValueError, match="one shape and dtype"):
        inspect.unwrap(gated_backward)(x[:1], x, x)


def ran(layer, *x) -> bool:
    with profile() as seen:
        layer(*x)
    return "llama_edu::swiglu" in {e.key for e in seen.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_serves_many_rows_unless_told_otherwise(dtype):
    layer, x = FeedForward(32, 96).to(dtype), torch.randn(2, 128, 32).to(dtype)

    assert ran(layer, x) == has_kernels(dtype)
    assert not ran(layer, x[:, :127]) and not ran(FeedForward(32, 88).to(dtype), x)
    for on in (True, False):
        with manual_backward(on):
            assert not ran(layer, x)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x), rtol=2e-2, atol=1e-2)
    with SavedBytes(besides=layer.parameters()) as kept:
        layer(x)
    if has_kernels(dtype):
        assert kept.total == (32 + 3 * 96) * 256 * dtype.itemsize


def test_the_kernel_under_the_compiler():
    torch.manual_seed(0)
    layer, x = FeedForward(32, 96), torch.randn(2, 128, 32)
    results = []
    compiled = torch.compile(inspect.unwrap(FeedForward.forward), dynamic=False, fullgraph=True)
    for run in (FeedForward.forward, compiled):
        leaf = x.clone().requires_grad_()
        y = run(layer, leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for dtype in (torch.float32, torch.bfloat16):
        args = layer.to(dtype), x.to(dtype)
        compiled(*args)
        assert ran(compiled, *args) == has_kernels(dtype)
        with torch.no_grad():  # the compiler writes float32 over what is no longer needed
            torch.testing.assert_close(compiled(*args), layer(args[1]), rtol=2e-2, atol=1e-2)
            assert ran(compiled, *args) == (has_kernels(dtype) and dtype == torch.bfloat16)
