"""Activation checkpointing changes what is kept, and no result."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_edu import LlamaConfig, Transformer
from llama_edu.errors import UserError
from llama_edu.model.manual import SavedBytes
from llama_edu.training.recompute import recompute

SHAPE = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=97, max_seq_len=64)


def _model():
    torch.manual_seed(0)
    return Transformer(SHAPE)


TOKENS = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_same_results_same_names(mode):
    model, other = _model(), recompute(_model(), mode)
    assert list(model.state_dict()) == list(other.state_dict())
    a, b = model(TOKENS), other(TOKENS)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters()))


def _cost(mode):
    model = recompute(_model(), mode)
    with FlopCounterMode(display=False) as flops, SavedBytes(besides=[*model.parameters(), *model.buffers()]) as kept:
        loss = model(TOKENS).sum()
        loss.backward()
    return flops.get_total_flops(), kept.total


def test_full_repeats_the_layers_products_and_selective_none():
    none, selective, full = (_cost(mode) for mode in ("none", "selective", "full"))
    assert selective[0] == none[0]
    # A layer runs again up to the last product, w2: nothing in the backward pass needs what that one gives.
    products = 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 64
    assert full[0] - none[0] == 2 * TOKENS.numel() * SHAPE.n_layers * products
    assert full[1] < none[1] / 2


def test_the_last_choice_counts_and_copies_are_independent():
    import copy

    model = recompute(recompute(_model(), "full"), "none")
    assert "forward" not in vars(model.layers["0"])
    twin = copy.deepcopy(recompute(model, "full"))
    twin.layers["0"].attention.wq.weight.data.zero_()
    assert not torch.equal(model(TOKENS), twin(TOKENS))


def test_unknown_mode():
    with pytest.raises(UserError, match="none, selective or full"):
        recompute(_model(), "some")


@pytest.mark.slow
def test_under_compile():
    """The same gradients, eleven layers compiled once, and less kept."""
    kept = {}
    for mode in ("none", "selective", "full"):
        program = f"""
import torch
from llama_edu import LlamaConfig, Transformer
from llama_edu.data.tokens import Batch
from llama_edu.model.manual import SavedBytes
from llama_edu.training import backward_batch
from llama_edu.training.recompute import compile_layers
shape = LlamaConfig(dim=32, n_layers=11, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=97, max_seq_len=64)
torch.manual_seed(0)
model = Transformer(shape)
tokens = torch.randint(97, (2, 32))
batch = Batch(tokens, tokens, torch.zeros_like(tokens))
loss = backward_batch(model, batch)
wanted = [p.grad.clone() for p in model.parameters()]
compile_layers(model, {mode!r})
for chunk in (None, 20):
    model.zero_grad()
    torch.testing.assert_close(backward_batch(model, batch, chunk_size=chunk), loss)
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted, rtol=1e-4, atol=1e-6)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
with SavedBytes(besides=[*model.parameters(), *model.buffers()]) as kept:
    model(tokens)
print(kept.total)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        kept[mode] = int(done.stdout)
    assert kept["full"] < 0.3 * kept["none"] and kept["selective"] < 0.8 * kept["none"], kept
