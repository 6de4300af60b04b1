"""Wrong answers that readers give to the exercises of lesson 40, and the words by which the checks must name them."""

from llama_edu.exercises.collectives import (
    check_all_gather_backward,
    check_all_reduce_fast,
    check_all_reduce_seconds,
)

_TIME = "import math\ndef all_reduce_seconds(nbytes, n, latency, bandwidth):\n    return "
_BACK = "def all_gather_backward(grads):\n    n = len(grads)\n    return "
_FAST = "import torch\ndef all_reduce_fast(cluster, xs):\n    n, xs = len(xs), list(xs)\n"
_BUTTERFLY = (
    "    for d in (4, 2, 1):\n        h = [x.chunk(2) for x in xs]\n        k = [int(bool(r & d)) for r in range(n)]\n"
    "        got = cluster.exchange([(r, r ^ d, h[r][1 - k[r]]) for r in range(n)])\n"
    "        xs = [h[r][k[r]] + got[r ^ d] for r in range(n)]\n"
)

MISTAKES = [
    (check_all_reduce_seconds, _TIME + "(n - 1) * (latency + nbytes / n / bandwidth)", "one pass"),
    (check_all_reduce_seconds, _TIME + "2 * (n - 1) * (latency + nbytes / bandwidth)", "one chunk"),
    (check_all_reduce_seconds, _TIME + "2 * n * (latency + nbytes / n / bandwidth)", "not n"),
    (check_all_reduce_seconds, _TIME + "latency + 2 * (n - 1) / n * nbytes / bandwidth", "not once"),
    (check_all_reduce_seconds, _TIME + "2 * math.log2(n) * (latency + nbytes / bandwidth)", "the tree"),
    (check_all_gather_backward, _BACK + "[g.chunk(n)[i] for i, g in enumerate(grads)]", "used the block too"),
    (check_all_gather_backward, _BACK + "[sum(grads)] * n", "did not scatter"),
    (check_all_gather_backward, _BACK + "list((sum(grads) / n).chunk(n))", "averaged"),
    (check_all_reduce_fast, _FAST + "    return cluster.all_reduce(xs)", "steps"),
    (check_all_reduce_fast, _FAST + "    return [sum(xs)] * n", "without a message"),
    (check_all_reduce_fast, _FAST + "    for d in (4, 2, 1):\n"
     "        got = cluster.exchange([(r, r ^ d, xs[r]) for r in range(n)])\n"
     "        xs = [xs[r] + got[r ^ d] for r in range(n)]\n    return xs", "halves"),
    (check_all_reduce_fast, _FAST + _BUTTERFLY + "    return xs", "scattering half"),
    (check_all_reduce_fast, _FAST + _BUTTERFLY + "    for d in (1, 2, 4):\n"
     "        got = cluster.exchange([(r, r ^ d, xs[r]) for r in range(n)])\n"
     "        xs = [torch.cat([xs[r], got[r ^ d]]) for r in range(n)]\n    return xs", "wrong order"),
]  # fmt: skip
