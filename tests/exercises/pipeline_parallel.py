"""Wrong answers that readers give to the exercises of lesson 43, and the words by which the checks must name them."""

from llama_edu.exercises.pipeline_parallel import (
    check_actions_1f1b,
    check_bubble,
    check_choose_pipeline,
    check_kept_1f1b,
)

_BUBBLE = "def bubble(P, M, V):\n    return "
_KEPT = "def kept_1f1b(rank, ranks, micro_batches):\n    return "
_LIST = "def actions_1f1b(rank, ranks, micro_batches):\n    M = micro_batches\n"
_ALTERNATE = (
    "    warm = max(0, min(warm, M))\n    out = [f'F{m}' for m in range(warm)]\n    for m in range(M):\n"
    "        out += [f'F{warm + m}'] * (warm + m < M) + [f'B{m}']\n    return out"
)
_CHOOSE = "def choose_pipeline():\n    return "

MISTAKES = [
    (check_bubble, _BUBBLE + "(P - 1) / M", "left the stages a rank out"),
    (check_bubble, _BUBBLE + "(P - 1) / (V * M + P - 1)", "the work alone"),
    (check_bubble, _BUBBLE + "P / (V * M)", "not while all do"),
    (check_bubble, _BUBBLE + "V * (P - 1) / M", "they divide it"),
    (check_bubble, _BUBBLE + "(P * V - 1) / (V * M)", "deep"),
    (check_bubble, _BUBBLE + "(P - 1) / (3 * V * M)", "zero-bubble"),
    (check_kept_1f1b, _KEPT + "micro_batches", "GPipe"),
    (check_kept_1f1b, _KEPT + "min(micro_batches, ranks)", "Only the first rank"),
    (check_kept_1f1b, _KEPT + "min(micro_batches, ranks - 1 - rank)", "the warm-up"),
    (check_kept_1f1b, _KEPT + "min(micro_batches, rank + 1)", "other way round"),
    (check_kept_1f1b, _KEPT + "ranks - rank", "fewer micro-batches than ranks"),
    (check_actions_1f1b, _LIST + "    return [f'{k}{m}' for k in 'FB' for m in range(M)]", "GPipe"),
    (check_actions_1f1b, _LIST + "    warm = rank\n" + _ALTERNATE, "other way round"),
    (check_actions_1f1b, _LIST + "    warm = ranks - rank\n" + _ALTERNATE, "are enough"),
    (check_actions_1f1b, _LIST + "    warm = ranks - 2 - rank\n" + _ALTERNATE, "too short"),
    (check_actions_1f1b, _LIST + "    warm = ranks - 1 - rank\n    out = [f'F{m}' for m in range(min(warm, M))]\n"
     "    for m in range(M - warm):\n        out += [f'F{warm + m}', f'B{m}']\n    return out", "left over"),
    (check_actions_1f1b, _LIST + "    return [f'F{m}' for m in range(M)] + [f'B{m}' for m in reversed(range(M))]",
     "in the order"),
    (check_choose_pipeline, _CHOOSE + "2, 1, 32", "layers"),
    (check_choose_pipeline, _CHOOSE + "4, 1, 32", "more micro-batches are free"),
    (check_choose_pipeline, _CHOOSE + "4, 4, 16", "The bubble fits"),
    (check_choose_pipeline, _CHOOSE + "8, 4, 16", "Neither fits"),
    (check_choose_pipeline, _CHOOSE + "4, 2, 6", "micro-batches"),
]  # fmt: skip
