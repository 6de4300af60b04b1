"""Wrong answers that readers give to the exercises of lesson 30, and the words by which the checks must name them."""

from llama_edu.exercises.data import check_attention_mask, check_part_of_rank, check_quotas, check_windows_of

_MASK = (
    "import torch\ndef attention_mask(document_ids):\n    d, n = document_ids, len(document_ids)\n"
    "    same, causal = d[:, None] == d[None, :], torch.ones(n, n, dtype=torch.bool).tril()\n    return "
)
_WINDOWS = (
    "import numpy as np\ndef windows_of(tokens, seq_len):\n    t, T = tokens, seq_len\n"
    "    n = (len(tokens) - 1) // seq_len\n"
)
_PART = "def part_of_rank(step, rank, ranks, batch_size):\n    each = batch_size // ranks\n    return "
_QUOTAS = (
    "def quotas(weights, n):\n    c = [int(w * n + 1e-9) for w in weights]\n    left = n - sum(c)\n"
    "    k = range(len(c))\n"
)

MISTAKES = [
    (check_attention_mask, _MASK + "causal", "Documents attend to each other: you only asked"),
    (check_attention_mask, _MASK + "same", "sees its future"),
    (check_attention_mask, _MASK + "same & causal.tril(-1)", "does not see itself"),
    (check_attention_mask, _MASK + "(same & causal).T", "exchanged: the row"),
    (check_attention_mask, _MASK + "~(same & causal)", "True and False"),
    (check_attention_mask, _MASK + "same | causal", "by or"),
    (check_attention_mask, _MASK + "(d[:, None] != d[None, :]) & causal", "compare with =="),
    (check_attention_mask, _MASK + "same.float() * causal", "of bool"),
    (check_attention_mask, _MASK + "((d[:, None] - d[None, :]).abs() <= 2) & causal", "position 3 begins"),
    (check_windows_of, _WINDOWS + "    x = t[:n * T].reshape(n, T)\n    return x, x", "learn to repeat"),
    (check_windows_of, _WINDOWS + "    return t[1:n * T + 1].reshape(n, T), t[:n * T].reshape(n, T)", "wrong way"),
    (check_windows_of, _WINDOWS + "    x = t[:n * T].reshape(n, T)\n    return x, np.roll(x, -1, axis=1)", "wraps"),
    (check_windows_of, _WINDOWS + "    m = len(t) // (T + 1)\n    w = t[:m * (T + 1)].reshape(m, T + 1)\n"
     "    return w[:, :-1], w[:, 1:]", "A gap"),
    (check_windows_of, _WINDOWS + "    w = np.stack([t[i:i + T + 1] for i in range(len(t) - T)])\n"
     "    return w[:, :-1], w[:, 1:]", "overlap"),
    (check_windows_of, _WINDOWS + "    return t[:n * T].reshape(n, T), t[2:n * T + 2].reshape(n, T)", "right after it"),
    (check_windows_of, _WINDOWS + "    n -= 1\n    return t[:n * T].reshape(n, T), t[1:n * T + 1].reshape(n, T)",
     "make 4 windows"),
    (check_windows_of, _WINDOWS + "    n = (len(t) - 2) // T\n"
     "    return t[:n * T].reshape(n, T), t[1:n * T + 1].reshape(n, T)", "21 tokens make 4"),
    (check_part_of_rank, _PART + "list(range(rank * each, (rank + 1) * each))", "begins at step"),
    (check_part_of_rank, _PART + "list(range(step * batch_size, step * batch_size + each))", "All ranks read the same"),
    (check_part_of_rank, _PART + "[rank * 1000 + step * each + i for i in range(each)]", "depends on the number"),
    (check_part_of_rank, _PART + "[(step * each + i) * ranks + rank + (ranks > 1) for i in range(each)]", "depends on"),
    (check_part_of_rank, _PART + "list(range(step * batch_size, (step + 1) * batch_size))", "another number"),
    (check_quotas, _QUOTAS + "    return c", "cut off"),
    (check_quotas, _QUOTAS + "    return [round(w * n) for w in weights]", "rounding each"),
    (check_quotas, _QUOTAS + "    c[0] += left\n    return c", "all 5 left-over"),
    (check_quotas, _QUOTAS + "    c[-1] += left\n    return c", "all 5 left-over"),
    (check_quotas, _QUOTAS + "    return [c[i] + (i < left) for i in k]", "not to the first"),
    (check_quotas, _QUOTAS + "    best = sorted(k, key=lambda i: (-weights[i], -i))[:left]\n"
     "    return [c[i] + (i in best) for i in k]", "left-over sequences"),
    (check_quotas, _QUOTAS + "    return [w * n for w in weights]", "whole numbers"),
]  # fmt: skip
