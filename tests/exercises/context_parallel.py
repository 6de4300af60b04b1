"""Wrong answers that readers give to the exercises of lesson 44, and the words by which the checks must name them."""

from llama_edu.exercises.context_parallel import (
    check_assign,
    check_combine,
    check_gather_bytes,
    check_rank_positions,
)

_ROWS = (
    "def rank_positions(rank, n, seq_len):\n    size = seq_len // (2 * n)\n"
    "    chunk = lambda i: list(range(i * size, (i + 1) * size))\n    return "
)
_COMBINE = (
    "import torch\ndef combine(parts):\n    outs, logs = (torch.stack(x) for x in zip(*parts))\n"
    "    total = logs.logsumexp(0)\n    shares = (logs - total).exp()\n"
    "    out = (shares[..., None] * outs).sum(0)\n    "
)
_BYTES = (
    "def gather_bytes(cfg, seq_len, cp, tp):\n    kv = cfg.n_kv_heads // tp * cfg.head_dim\n"
    "    heads = cfg.n_heads // tp * cfg.head_dim\n    return "
)
_ASSIGN = "def assign(work, n):\n    size = len(work) // n\n    "

MISTAKES = [
    (check_rank_positions, _ROWS + "list(range(2 * rank * size, 2 * (rank + 1) * size))", "contiguous"),
    (check_rank_positions, _ROWS + "chunk(2 * n - 1 - rank) + chunk(rank)", "not their order"),
    (check_rank_positions, _ROWS + "chunk(rank) + chunk(n + rank)", "must fall"),
    (check_rank_positions, _ROWS + "chunk(rank) + chunk(2 * n - rank)", "past the end"),
    (check_combine, _COMBINE + "return out", "two things"),
    (check_combine, _COMBINE + "return outs.mean(0), total", "averaged"),
    (check_combine, _COMBINE + "return outs.sum(0), total", "normalised already"),
    (check_combine, _COMBINE + "return out, logs.amax(0)", "largest logarithm"),
    (check_combine, _COMBINE + "return out, logs.sum(0)", "multiplies"),
    (check_combine, _COMBINE + "return out, total", "NaN"),
    (check_combine, "import torch\ndef combine(parts):\n    outs, logs = (torch.stack(x) for x in zip(*parts))\n"
     "    w, total = logs.exp(), logs.logsumexp(0)\n"
     "    return (w[..., None] * outs).sum(0) / w.sum(0).clamp(min=1e-300)[..., None], total", "overflows"),
    (check_gather_bytes, _BYTES + "4 * seq_len * heads * 2 * (cp - 1) / cp", "every query head"),
    (check_gather_bytes, _BYTES + "2 * seq_len * kv * 2 * (cp - 1) / cp", "Half is missing"),
    (check_gather_bytes, _BYTES + "4 * seq_len * kv * 2", "(cp - 1) / cp"),
    (check_gather_bytes, _BYTES + "4 * seq_len * kv * tp * 2 * (cp - 1) / cp", "cut the heads already"),
    (check_assign, _ASSIGN + "return [list(range(r * size, (r + 1) * size)) for r in range(n)]", "Contiguous"),
    (check_assign, _ASSIGN + "h = size // 2\n    return [[*range(r * h, (r + 1) * h), "
     "*range(len(work) - (r + 1) * h, len(work) - r * h)] for r in range(n)]", "Head and tail"),
    (check_assign, _ASSIGN + "ranks = [[] for _ in range(n)]\n"
     "    for i in sorted(range(len(work)), key=lambda i: -work[i]):\n"
     "        min(ranks, key=lambda r: sum(work[j] for j in r)).append(i)\n    return ranks", "the memory is not"),
    (check_assign, _ASSIGN + "return [[0] * size for r in range(n)]", "missing or there twice"),
]  # fmt: skip
