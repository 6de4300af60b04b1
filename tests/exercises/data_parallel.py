"""Wrong answers that readers give to the exercises of lesson 41, and the words by which the checks must name them."""

from llama_edu.exercises.data_parallel import check_global_loss, check_sharded_gradients, check_state_bytes

_LOSS = "def global_loss(sums, counts):\n    return "
_BYTES = (
    "def state_bytes(n_params, n, stage):\n"
    "    s = [n if stage >= k else 1 for k in (3, 2, 1)]\n    p = n_params\n    return "
)
_STEP = "import torch\ndef sharded_gradients(cluster, shards, xs):\n"
_AUTOGRAD = (
    "    leaves = [[s.detach().requires_grad_() for s in row] for row in shards]\n    ys = xs\n    for row in leaves:\n"
    "        ys = [torch.tanh(y @ w.T) for y, w in zip(ys, cluster.all_gather(row))]\n"
)

MISTAKES = [
    (check_global_loss, _LOSS + "sum(s / c for s, c in zip(sums, counts)) / len(sums)", "do not divide"),
    (check_global_loss, _LOSS + "sum(s / max(c, 1) for s, c in zip(sums, counts)) / len(sums)", "mean of means"),
    (check_global_loss, _LOSS + "sum(sums) / len(sums)", "number of ranks"),
    (check_global_loss, _LOSS + "sum(sums)", "divide it"),
    (check_state_bytes, _BYTES + "4 * p / s[0] + 4 * p / s[1] + 4 * p / s[2]", "two moments"),
    (check_state_bytes, _BYTES + "4 * p / s[0] + 8 * p / s[2]", "gradients are missing"),
    (check_state_bytes, _BYTES + "4 * p / s[2] + 4 * p / s[1] + 8 * p / s[0]", "turned round"),
    (check_state_bytes, _BYTES + "16 * p / (n if stage else 1)", "cut everything"),
    (check_sharded_gradients, _STEP + _AUTOGRAD + "    cluster.backward([y.square().sum() for y in ys])\n"
     "    return [[w.grad for w in row] for row in leaves]", "at its peak"),
    (check_sharded_gradients, _STEP + "    w = [torch.cat([s for s in row]) for row in shards]\n    return w",
     "without a message"),
    (check_sharded_gradients, _STEP + _AUTOGRAD + "    cluster.backward([y.square().mean() for y in ys])\n"
     "    return [[w.grad for w in row] for row in leaves]", "is wrong"),
    (check_sharded_gradients, _STEP + _AUTOGRAD + "    cluster.backward([y.square().sum() / 4 for y in ys])\n"
     "    return [[w.grad for w in row] for row in leaves]", "averaged"),
]  # fmt: skip
