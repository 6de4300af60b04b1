"""Context parallel: which rank holds what, and what the gather returns and sends back."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from llama_edu.model.attention import ScaledDotProduct, causal_mask
from llama_edu.parallel import run_ranks
from llama_edu.parallel.cp import ContextAttention, chunk_positions, gather_chunks


@given(cp=st.integers(1, 9), size=st.integers(1, 5))
def test_every_position_is_held_once_and_all_ranks_see_as_many_keys(cp, size):
    rows = chunk_positions(2 * cp * size, cp)
    assert rows.flatten().sort().values.equal(torch.arange(2 * cp * size))
    assert len(set((rows + 1).sum(1).tolist())) == 1


def _gathered(dim):
    rank, n = dist.get_rank(), dist.get_world_size()
    mesh, rows = init_device_mesh("cpu", (n,)), chunk_positions(24, n)
    x = torch.arange(72.0).view(3, 24).movedim(1, dim)
    mine = x.index_select(dim, rows[rank]).requires_grad_()
    whole = gather_chunks(mine, mesh, dim)
    (whole * (rank + 1)).sum().backward()
    return whole.detach().equal(x), mine.grad


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_gather_is_in_the_order_of_the_sequence_and_its_gradient_is_summed(dim):
    for same, grad in run_ranks(_gathered, 3, dim % 2):
        assert same
        assert (grad == 1 + 2 + 3).all()


def _attended(with_mask):
    rank, n, length = dist.get_rank(), dist.get_world_size(), 16
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.rand(2, 1, length, length, generator=g) < 0.5 if with_mask else None
    if with_mask:  # some queries see nothing, as in a document that has only padding
        mask = mask & causal_mask(torch.arange(length)[None], length)
        mask[:, :, 3] = False
    want = ScaledDotProduct()(q, k, v, mask)
    mine = chunk_positions(length, n)[rank]
    inner = ContextAttention(ScaledDotProduct(), init_device_mesh("cpu", (n,)))
    got = inner(*(x[:, :, mine] for x in (q, k, v)), None if mask is None else mask[:, :, mine])
    return (got - want[:, :, mine]).abs().max().item()


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_rank_computes_its_rows_of_the_attention_of_one_process(n, with_mask):
    assert max(run_ranks(_attended, n, with_mask)) < 1e-12
