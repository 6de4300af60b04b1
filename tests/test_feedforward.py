"""The SwiGLU layer: equal to transformers, and a backward pass by hand that agrees with autograd."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.llama.modeling_llama import LlamaMLP

from llama_edu import LlamaConfig
from llama_edu.model import FeedForward, manual_backward
from llama_edu.model.feedforward import ManualSwiGLU
from llama_edu.model.manual import SavedBytes


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
