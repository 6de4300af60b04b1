"""The loss over a divided vocabulary, by itself: what it returns, what it differentiates, what it keeps and sends."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from llama_edu.parallel import run_ranks
from llama_edu.parallel.tp import parallel_cross_entropy

ROWS, WORDS, DIM, Z = (2, 12), 24, 8, 0.02


def data(size=1.0):
    g = torch.Generator().manual_seed(0)
    x = size * torch.randn(*ROWS, DIM, generator=g, dtype=torch.float64)
    weight = torch.randn(WORDS, DIM, generator=g, dtype=torch.float64)
    targets = torch.randint(WORDS, ROWS, generator=g)
    targets[0, :5] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


def truth(x, weight, targets, scale):
    scores = x @ weight.T
    loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")
    penalty = (scores.logsumexp(-1).square() * (targets != -100)).sum()
    return scale * (loss + Z * penalty), scale * loss


def _loss(size, chunk_size, keep_scores):
    """Largest differences of both sums and both gradients from PyTorch's own loss over all words."""
    rank, n = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    x, weight, targets = data(size)
    want = truth(x, weight, targets, 0.5)
    true_grads = torch.autograd.grad(3 * want[0], (x, weight))
    part, rows = x.detach().chunk(n, 1)[rank].clone(), weight.detach().chunk(n)[rank].clone()
    options = {"z_loss": Z, "scale": 0.5, "chunk_size": chunk_size}
    if keep_scores:
        part, rows = x.detach().clone().requires_grad_(), rows.requires_grad_()
        got = parallel_cross_entropy(part @ rows.T, targets, mesh, **options)
    else:
        part, rows = part.requires_grad_(), rows.requires_grad_()
        got = parallel_cross_entropy(part, targets, mesh, weight=rows, **options)
    (3 * got[0]).backward()
    if keep_scores:
        dist.all_reduce(part.grad)  # the gather that brought x here would have summed them
        true_x = true_grads[0]
    else:
        true_x = true_grads[0].chunk(n, 1)[rank]
    pairs = [(got[0], want[0]), (got[1], want[1]), (part.grad, true_x), (rows.grad, true_grads[1].chunk(n)[rank])]
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()  # NaN stays NaN


def _losses(cases):
    return [_loss(*case) for case in cases]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_sums_and_gradients_are_those_of_one_process(n):
    cases = [(size, *how) for size in (1.0, 300.0) for how in ((0, True), (0, False), (1, False), (7, False))]
    assert all(error < 1e-12 for rank in run_ranks(_losses, n, cases) for error in rank)


def _losses_of_no_word(words):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, weight, targets = data(1.0)
    part, rows = (t.detach().chunk(mesh.size(), axis)[mesh.get_local_rank()] for t, axis in ((x, 1), (weight, 0)))
    for word in words:
        with pytest.raises(IndexError, match=f"there are scores for {WORDS} tokens"):
            parallel_cross_entropy(part, targets.index_fill(1, torch.tensor([2]), word), mesh, weight=rows)


def test_targets_of_no_word_are_refused():
    run_ranks(_losses_of_no_word, 2, [WORDS, -1])


class _Watch(TorchDispatchMode):
    """Elements of the largest floating-point tensor that an operation made, and the number of products."""

    elements = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.products += func is torch.ops.aten.mm.default
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.elements = max(self.elements, out.numel())
        return out


def _watched(chunk_size, train):
    mesh, (x, weight, targets) = init_device_mesh("cpu", (1,)), data()
    with torch.set_grad_enabled(train), _Watch() as watch:
        objective, loss = parallel_cross_entropy(x, targets, mesh, weight=weight, chunk_size=chunk_size, z_loss=Z)
    return watch.elements, watch.products, objective.item(), loss.item()


def test_no_more_scores_are_made_than_a_chunk_has():
    tokens = ROWS[0] * ROWS[1]
    assert run_ranks(_watched, 1, 0, True)[0][:2] == (tokens * WORDS, 3)
    assert run_ranks(_watched, 1, 4, True)[0][:2] == (max(WORDS, tokens) * DIM, 3 * tokens // 4)


def test_an_evaluation_computes_no_gradient():
    _, products, *sums = run_ranks(_watched, 1, 4, False)[0]
    assert products == ROWS[0] * ROWS[1] // 4
    assert sums == pytest.approx([w.item() for w in truth(*data(), 1.0)], rel=1e-12)
