"""The simulated cluster: right sums, right bytes, right gradients, and no way round the messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_edu.parallel.cost import NETWORK_400G, Link, collective_cost, crossover
from llama_edu.parallel.simulated import Cluster

LINEAR = {
    "all_reduce ring": lambda c, xs, a: c.all_reduce(xs, a),
    "all_reduce tree": lambda c, xs, a: c.all_reduce(xs, a, algorithm="tree"),
    "all_gather": lambda c, xs, a: c.all_gather(xs, a, dim=1),
    "reduce_scatter": lambda c, xs, a: c.reduce_scatter(xs, a),
    "all_to_all": lambda c, xs, a: c.all_to_all(xs, a, split=1, concat=0),
    "broadcast tree": lambda c, xs, a: c.broadcast(xs, a),
    "broadcast ring": lambda c, xs, a: c.broadcast(xs, a, root=c.size(a) - 1, algorithm="ring"),
    "shift": lambda c, xs, a: c.shift(xs, a, by=2),
    "exchange": lambda c, xs, a: c.exchange([(r, c.world_size - 1 - r, x) for r, x in enumerate(xs)]),
}


@pytest.mark.parametrize("name", LINEAR)
@settings(max_examples=15, deadline=None)
@given(dp=st.integers(1, 3), tp=st.integers(1, 5), axis=st.sampled_from([None, "dp", "tp", ("tp", "dp")]))
def test_the_backward_of_a_collective_is_its_transpose(name, dp, tp, axis):
    cluster = Cluster(dp=dp, tp=tp)
    torch.manual_seed(dp * 10 + tp)
    xs = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(dp * tp)]
    ys = LINEAR[name](cluster, xs, axis)
    ws = [torch.randn_like(y) for y in ys]
    cluster.backward([(w * y).sum() for w, y in zip(ws, ys)])
    left = sum((w * y).sum() for w, y in zip(ws, ys))
    right = sum((x.grad * x).sum() for x in xs if x.grad is not None)
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), size=st.integers(1, 40), algorithm=st.sampled_from(["ring", "tree"]))
def test_an_all_reduce_sums_and_all_ranks_have_the_same_bits(n, size, algorithm):
    cluster = Cluster(n)
    xs = [torch.randn(size, dtype=torch.float64) for _ in range(n)]
    ys = cluster.all_reduce(xs, algorithm=algorithm)
    torch.testing.assert_close(ys[0], sum(xs), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(y, ys[0]) for y in ys)
    assert cluster.ledger.bytes() == 2 * (n - 1) * size * 8
    tops = cluster.all_reduce(xs, op="max", algorithm=algorithm)
    assert torch.equal(tops[-1], torch.stack(xs).amax(0))


def test_groups_of_a_mesh_run_in_step_and_order_is_outer_first():
    cluster = Cluster(dp=2, cp=2, tp=2)
    assert cluster.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert cluster.groups(("dp", "cp")) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert cluster.index(6, ("dp", "cp")) == 3 and cluster.index(6, "tp") == 0
    with cluster.ledger.phase("here"):
        _ = cluster.all_gather(cluster.place(torch.zeros(4)), ("dp", "cp"))
    assert cluster.ledger.clock == 3 and cluster.ledger.calls(phase="here", axis="dp+cp") == {"all_gather": 1}
    x = torch.randn(5, 4)
    assert torch.equal(cluster.whole(cluster.place(x, 0, ("dp", "cp")), 0, ("dp", "cp")), x)


def test_uneven_blocks_gather_and_scatter():
    cluster = Cluster(3)
    x = torch.randn(7, 2, dtype=torch.float64)
    xs = [p.requires_grad_() for p in cluster.place(x, 0)]
    ys = cluster.all_gather(xs)
    assert all(torch.equal(y, x) for y in ys)
    cluster.backward([y.sum() for y in ys])
    assert [p.grad.shape[0] for p in xs] == [3, 2, 2] and torch.equal(xs[1].grad, torch.full((2, 2), 3.0).double())


def test_the_conventions_of_a_loss_that_all_ranks_compute():
    cluster = Cluster(2)
    xs = [x.requires_grad_() for x in cluster.place(torch.ones(2))]
    cluster.backward([y.sum() for y in cluster.all_reduce(xs, grad="identity")])
    assert torch.equal(xs[0].grad, torch.ones(2)) and cluster.ledger.bytes(backward=True) == 0
    xs = [x.requires_grad_() for x in cluster.place(torch.ones(2))]
    cluster.backward([(r + 1) * y.sum() for r, y in enumerate(cluster.identity(xs))])
    assert torch.equal(xs[0].grad, torch.full((2,), 3.0))
    blocks = [x.requires_grad_() for x in cluster.place(torch.ones(4), 0)]
    cluster.backward([y.sum() for y in cluster.all_gather(blocks, grad="slice")])
    assert torch.equal(blocks[1].grad, torch.ones(2))


def test_memory_counts_what_is_alive_and_refuses_a_glance_at_a_neighbour():
    cluster = Cluster(2)
    xs = cluster.place(torch.zeros(100))
    with cluster.watch(xs) as memory:
        ys = [x.exp() for x in xs]
        zs = cluster.all_gather(ys)
        assert memory.current == [400 + 400 + 800] * 2
        del ys, zs
        with pytest.raises(RuntimeError, match="has to be sent first"):
            _ = torch.cat(xs)
    assert memory.peak == [1600, 1600] and memory.current == [400, 400]


def test_mistakes_are_answered_in_a_sentence():
    with pytest.raises(ValueError, match="give a number of ranks"):
        Cluster()
    with pytest.raises(ValueError, match="no axis 'cp'"):
        Cluster(dp=2).groups("cp")
    with pytest.raises(ValueError, match="3 tensors; the cluster has 2"):
        Cluster(2).all_reduce([torch.zeros(1)] * 3)
    with pytest.raises(ValueError, match="ranks 0 to 1"):
        Cluster(2).send(torch.zeros(1), 0, 2)
    with pytest.raises(ValueError, match="no 'colour'"):
        Cluster(2).ledger.bytes(colour="red")


def test_cost_and_ledger_agree_and_the_crossover_is_one():
    link = Link(2e-6, 3e9)
    for n in (2, 4, 16):
        cluster = Cluster(n)
        _ = cluster.all_reduce(cluster.place(torch.zeros(32)), algorithm="tree")
        cost = collective_cost("all_reduce", 128, n, "tree")
        assert cluster.ledger.seconds(link) == pytest.approx(cost.seconds(link))
    size = crossover(128, NETWORK_400G)
    times = [collective_cost("all_reduce", size, 128, a).seconds(NETWORK_400G) for a in ("ring", "tree")]
    assert times[0] == pytest.approx(times[1]) and collective_cost("all_reduce", 8, 1).seconds(link) == 0
    with pytest.raises(ValueError, match="no cost is known"):
        collective_cost("gossip", 1, 2)


def test_a_feed_forward_layer_over_two_axes_has_the_gradients_of_one_process():
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((8, 6), (12, 6), (6, 12)))
    whole = [v.clone().requires_grad_() for v in (a, b)]
    (torch.nn.functional.silu(x @ whole[0].T) @ whole[1].T).square().sum().backward()

    cluster = Cluster(dp=2, tp=3)
    xs = cluster.place(x, 0, "dp")
    ws = [w.requires_grad_() for w in cluster.place(a, 0, "tp")]
    vs = [v.requires_grad_() for v in cluster.place(b, 1, "tp")]
    hidden = cluster.identity(xs, "tp")
    parts = [torch.nn.functional.silu(h @ w.T) @ v.T for h, w, v in zip(hidden, ws, vs)]
    out = cluster.all_reduce(parts, "tp", grad="identity")
    cluster.backward([y.square().sum() for y in out])
    for shards, dim, right in ((ws, 0, whole[0].grad), (vs, 1, whole[1].grad)):
        grads = cluster.all_reduce([s.grad for s in shards], "dp")
        torch.testing.assert_close(cluster.whole(grads, dim, "tp"), right, rtol=1e-12, atol=1e-12)
    assert cluster.ledger.by("axis") == {"tp": 6 * 2 * 2 * 4 * 6 * 8 // 3, "dp": 6 * 2 * 24 * 8}
