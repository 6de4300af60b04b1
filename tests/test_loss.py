"""The loss in one piece, in chunks and in parts of a batch, with and without the z-loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu import LlamaConfig, Transformer
from llama_edu.data.tokens import IGNORE, Batch
from llama_edu.training import backward_batch, chunked_cross_entropy, next_token_loss
from llama_edu.training.loss_kernels import softmax_minus_target

SHAPE = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=97, max_seq_len=64)


def _case(rows, vocab, share, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < share] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _by_pytorch(hidden, weight, targets, z_loss):
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return loss + z_loss * logits.logsumexp(-1).square()[targets != IGNORE].sum()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12), st.integers(1, 30), st.integers(1, 20), st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0.0, 0.3]), st.integers(0, 99),
)  # fmt: skip
def test_chunks_give_the_loss_and_gradient_of_the_whole(rows, vocab, chunk, share, z_loss, seed):
    hidden, weight, targets = _case(rows, vocab, share, seed)
    ours = chunked_cross_entropy(hidden, weight, targets, chunk_size=chunk, z_loss=z_loss)
    theirs = _by_pytorch(hidden, weight, targets, z_loss)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(3 * ours, (hidden, weight)), torch.autograd.grad(3 * theirs, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradient_by_finite_differences(z_loss):
    hidden, weight, targets = _case(7, 11, 0.2, 0)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, chunk_size=3, z_loss=z_loss), (hidden, weight)
    )


def test_frozen_sides_and_no_gradient_at_all():
    hidden, weight, targets = _case(7, 11, 0.2, 0)
    whole = chunked_cross_entropy(hidden, weight, targets, chunk_size=3)
    only_hidden = chunked_cross_entropy(hidden, weight.detach(), targets, chunk_size=3)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (whole, only_hidden)))
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, weight, targets, chunk_size=3), whole.detach())


def test_scores_far_from_zero_stay_finite():
    hidden, weight, targets = _case(7, 11, 0.0, 0)
    loss = chunked_cross_entropy(1e4 * hidden, weight, targets, chunk_size=3)
    torch.testing.assert_close(loss, _by_pytorch(1e4 * hidden, weight, targets, 0.0))


def test_bf16_products_and_float32_gradients():
    hidden, weight, targets = (t.float() if t.is_floating_point() else t for t in _case(64, 50, 0.0, 0))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    exact = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets, chunk_size=16), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk_size=16)
    assert loss.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), exact):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows, vocab", [(1, 1), (5, 3), (33, 1000), (20, 32_001)])
def test_softmax_of_bf16_in_one_kernel(rows, vocab, z_loss):
    generator = torch.Generator().manual_seed(rows)
    scores = (5 * torch.randn(rows, vocab, generator=generator)).bfloat16()
    targets = torch.randint(vocab, (rows, 1), generator=generator)
    exact = scores.double()
    log_sums = exact.logsumexp(1, keepdim=True)
    wanted = exact.softmax(1) * (1 + 2 * z_loss * log_sums) - torch.zeros_like(exact).scatter_(1, targets, 1)
    losses, sums = torch.empty(2, rows, 1)
    softmax_minus_target(scores, targets, losses, sums, z_loss)
    torch.testing.assert_close(sums, log_sums.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses, (log_sums - exact.gather(1, targets)).float(), rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(scores.double(), wanted, rtol=2**-8, atol=1e-6)  # half a step of bfloat16 and no more


@pytest.mark.parametrize("wrong", [torch.nan, -torch.nan, torch.inf])
def test_softmax_of_bf16_passes_on_what_is_not_finite(wrong):
    scores = torch.zeros(2, 50, dtype=torch.bfloat16)
    scores[1, 7] = wrong
    losses, sums = torch.empty(2, 2, 1)
    softmax_minus_target(scores, torch.zeros(2, 1, dtype=torch.long), losses, sums, 0.0)
    assert scores[0].isfinite().all() and losses[0].isfinite()
    assert scores[1].isnan().any() and not losses[1].isfinite()


def test_softmax_of_bf16_without_one_token_gives_it_nothing():
    scores = torch.full((1, 20), -torch.inf, dtype=torch.bfloat16)
    scores[0, 3], (losses, sums) = 2.0, torch.empty(2, 1, 1)
    softmax_minus_target(scores, torch.tensor([[3]]), losses, sums, 0.0)
    assert losses == 0 and sums == 2 and scores.abs().max() < 1e-30


@pytest.mark.parametrize("everything", [False, True])
def test_bf16_in_chunks_beside_the_whole_in_float64(everything):
    hidden, weight, targets = _case(70, 500, 0.3, 0)
    hidden, weight = (x.detach().bfloat16() if everything else x.detach().float() for x in (hidden, weight))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=not everything):
        ours = chunked_cross_entropy(hidden, weight, targets, chunk_size=32, z_loss=0.01)
    found = torch.autograd.grad(ours, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    theirs = _by_pytorch(*exact, targets, 0.01)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=0)
    for a, b in zip(found, torch.autograd.grad(theirs, exact)):
        assert (a - b).norm() < 0.01 * b.norm()


def _batch():
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(97, (2, 8, 32), generator=generator)
    for row in range(8):
        targets[row, 3 + 4 * row :] = IGNORE
    return Batch(tokens, targets, torch.arange(32).expand(8, 32) // 10)


def _gradients(model, batch, **options):
    model.zero_grad()
    loss = backward_batch(model, batch, **options)
    return loss, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_a_batch_in_parts_and_in_chunks_has_the_gradient_of_the_whole(tied, z_loss):
    torch.manual_seed(0)
    model = Transformer(LlamaConfig(**{**SHAPE.to_dict(), "tie_embeddings": tied}))
    batch = _batch()
    loss, wanted = _gradients(model, batch, z_loss=z_loss, document_mask=True)
    for options in ({"accumulate": 4}, {"chunk_size": 50}, {"accumulate": 3, "chunk_size": 7}):
        other, found = _gradients(model, batch, z_loss=z_loss, document_mask=True, **options)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert model.output is not None


def test_the_loss_that_is_returned_is_without_the_z_loss():
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    plain, gradient = _gradients(model, _batch())
    with_z, other = _gradients(model, _batch(), z_loss=0.1)
    torch.testing.assert_close(plain, with_z)
    assert not torch.allclose(gradient[0], other[0])


def test_count_of_a_larger_batch():
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    batch = _batch()
    count = (batch.targets != IGNORE).sum()
    loss, wanted = _gradients(model, batch)
    model.zero_grad()
    halves = [Batch(*(t[rows] for t in batch)) for rows in (slice(0, 4), slice(4, 8))]
    losses = [backward_batch(model, half, count=count) for half in halves]
    torch.testing.assert_close(sum(losses), loss)
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted)


def test_evaluation_in_chunks():
    torch.manual_seed(0)
    model, batch = Transformer(SHAPE), _batch()
    with torch.no_grad():
        whole = next_token_loss(model, batch.tokens, batch.targets)
        torch.testing.assert_close(next_token_loss(model, batch.tokens, batch.targets, chunk_size=9), whole)


@pytest.mark.parametrize("target", [50, -1, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_is_no_token_is_refused(target, dtype):
    """The kernel takes addresses: it would read and write beyond the scores, or take -1 for the last token."""
    hidden, weight = torch.randn(70, 16).to(dtype).requires_grad_(), torch.randn(50, 16).to(dtype).requires_grad_()
    targets = torch.full((70,), IGNORE)
    targets[-1] = target
    with pytest.raises((IndexError, RuntimeError), match=r"targets run from|out of bounds"):
        chunked_cross_entropy(hidden, weight, targets)
    chunked_cross_entropy(hidden, weight, targets.fill_(IGNORE)).backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_cost_nothing(dtype):
    hidden, weight = torch.randn(0, 16).to(dtype).requires_grad_(), torch.randn(50, 16).to(dtype).requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and not weight.grad.any()
