"""Wrong answers that readers give to the exercises of lesson 45, and the words by which the checks must name them."""

from llama_edu.exercises.cluster import check_bubble, check_checkpoint_interval, check_fit_a100, check_zero_memory

_ZERO = "def zero_memory(params, stage, ranks):\n    w, g, o = 2 * params, 4 * params, 12 * params\n"
_BUBBLE = "import math\ndef bubble(pp, virtual_stages, limit):\n    v = virtual_stages\n"
_PLAN = "def fit_a100():\n    return "
_INTERVAL = "def checkpoint_interval(gpus, hours_per_gpu, write):\n    mtti = hours_per_gpu * 3600 / gpus\n    return "

MISTAKES = [
    (check_zero_memory, _ZERO + "    g = 2 * params\n    return w + g + o if stage == 0 else 0", "4 bytes each"),
    (check_zero_memory, _ZERO + "    o = 8 * params\n    return w + g + o", "three float32 numbers"),
    (check_zero_memory, _ZERO + "    return (w + g + o) / ranks", "shards nothing"),
    (check_zero_memory, _ZERO + "    return (w + g + o) / (ranks if stage else 1)", "all at once"),
    (check_zero_memory, _ZERO + "    return g / (ranks if stage >= 1 else 1) + o / (ranks if stage >= 2 else 1) + w",
     "order is wrong"),
    (check_zero_memory, _ZERO + "    return o / (ranks if stage else 1) + w / (ranks if stage >= 2 else 1)"
     " + g / (ranks if stage >= 3 else 1)", "exchanged"),
    (check_zero_memory, _ZERO + "    return o / (ranks if stage else 1) + g + w", "Stage 2 must give"),
    (check_bubble, _BUBBLE + "    m = max(1, math.ceil((pp - 1) / limit - 1e-9))\n"
     "    return math.ceil(m / pp) * pp if v > 1 else m", "left out the virtual stages"),
    (check_bubble, _BUBBLE + "    m = math.ceil(pp / (v * limit) - 1e-9)\n"
     "    return math.ceil(m / pp) * pp if v > 1 else m", "not PP"),
    (check_bubble, _BUBBLE + "    return max(1, math.ceil((pp - 1) / (v * limit) - 1e-9))", "multiple of pp"),
    (check_bubble, _BUBBLE + "    m = max(1, math.ceil((pp - 1) / (v * limit) - 1e-9))\n"
     "    return math.ceil(m / pp) * pp", "Only virtual stages"),
    (check_bubble, _BUBBLE + "    m = math.floor((pp - 1) / (v * limit) + 1e-9)\n"
     "    return max(1, m // pp * pp if v > 1 else m)", "rounded down"),
    (check_bubble, _BUBBLE + "    m = math.ceil((pp - 1) / (v * limit) - 1e-9)\n"
     "    return math.ceil(m / pp) * pp if v > 1 else m", "no bubble"),
    (check_fit_a100, _PLAN + "8, 1, 8, 1", "Return a dict"),
    (check_fit_a100, _PLAN + "{'tp': 1, 'cp': 1, 'pp': 1, 'dp': 64}", "too much"),
    (check_fit_a100, _PLAN + "{'tp': 1, 'cp': 4, 'pp': 1, 'dp': 16, 'zero': 3}", "ZeRO 3"),
    (check_fit_a100, _PLAN + "{'tp': 8, 'cp': 1, 'pp': 4, 'dp': 4}", "That plan cannot be"),
    (check_fit_a100, _PLAN + "{'tp': 8, 'cp': 1, 'pp': 8, 'dp': 1, 'recompute': 'full'}", "repeats every product"),
    (check_fit_a100, _PLAN + "{'tp': 8, 'cp': 8, 'pp': 1, 'dp': 1}", "of the step"),
    (check_fit_a100, _PLAN + "{'tp': 4, 'cp': 1, 'pp': 4, 'dp': 4, 'kernel_efficiency': 1.0}", "kernel_efficiency"),
    (check_checkpoint_interval, _INTERVAL + "(2 * write * hours_per_gpu * 3600) ** 0.5", "any of them"),
    (check_checkpoint_interval, _INTERVAL + "(2 * write * hours_per_gpu / gpus) ** 0.5", "Hours and seconds"),
    (check_checkpoint_interval, _INTERVAL + "(write * mtti) ** 0.5", "factor 2"),
    (check_checkpoint_interval, _INTERVAL + "2 * write * mtti", "root is missing"),
    (check_checkpoint_interval, _INTERVAL + "(2 * write * hours_per_gpu * 3600 * gpus) ** 0.5", "do not multiply"),
    (check_checkpoint_interval, _INTERVAL + "(2 * write * mtti) ** 0.5 / 3600", "in hours"),
]  # fmt: skip
