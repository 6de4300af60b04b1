"""Wrong answers that readers give to the exercises of lesson 23, and the words by which the checks must name them."""

from llama_edu.exercises.swiglu import check_hidden_width, check_swiglu, check_swiglu_backward

_GLU = "import torch\nimport torch.nn.functional as F\ndef swiglu(x, w1, w2, w3):\n    g, u = x @ w1.T, x @ w3.T\n"
_BACK = (
    "import torch\ndef swiglu_backward(grad, gate, up):\n    s = torch.sigmoid(gate)\n    silu = gate * s\n"
    "    slope = s + silu * (1 - s)\n"
)
_WIDTH = (
    "def hidden_width(dim, multiple_of, multiplier):\n    k, m = 1 if multiplier is None else multiplier, multiple_of\n"
)

MISTAKES = [
    (check_swiglu, _GLU + "    return (g * F.silu(u)) @ w2.T", "swapped"),
    (check_swiglu, _GLU + "    return (torch.sigmoid(g) * u) @ w2.T", "sigmoid only"),
    (check_swiglu, _GLU + "    return (F.relu(g) * u) @ w2.T", "ReGLU"),
    (check_swiglu, _GLU + "    return (F.gelu(g) * u) @ w2.T", "GEGLU"),
    (check_swiglu, _GLU + "    return (g * u) @ w2.T", "bilinear"),
    (check_swiglu, _GLU + "    return F.silu(g * u) @ w2.T", "gate alone"),
    (check_swiglu, _GLU + "    return F.silu(g) @ w2.T", "two matrices"),
    (check_swiglu, _GLU + "    s = torch.sigmoid(g)\n    return ((g * s + (1 - s) * g) * u) @ w2.T",
     "nonlinearity out"),
    (check_swiglu, _GLU + "    s = torch.sigmoid(1.7 * x)\n    return x * s + (1 - s) * x", "is the identity"),
    (check_swiglu, _GLU + "    return (torch.tanh(g) * u) @ w2.T", "tanh"),
    (check_swiglu, _GLU + "    return ((F.silu(x) @ w1.T) * u) @ w2.T", "silu to x"),
    (check_swiglu, _GLU + "    return F.silu((g * u) @ w2.T)", "silu to the result"),
    (check_swiglu_backward, _BACK + "    return up * slope, silu", "slope of up alone"),
    (check_swiglu_backward, _BACK + "    return up * slope, grad * silu", "lacks grad"),
    (check_swiglu_backward, _BACK + "    return grad * up * s, grad * silu", "product rule"),
    (check_swiglu_backward, _BACK + "    return grad * up * s * (1 - s), grad * silu", "slope of the sigmoid"),
    (check_swiglu_backward, _BACK + "    return grad * up * (s - silu * (1 - s)), grad * silu", "wrong sign"),
    (check_swiglu_backward, _BACK + "    return grad * slope, grad * silu", "lacks up"),
    (check_swiglu_backward, _BACK + "    return grad * up * slope, grad * gate", "not with the gate itself"),
    (check_swiglu_backward, _BACK + "    return grad * silu, grad * up * slope", "wrong order"),
    (check_hidden_width, _WIDTH + "    return int(k * int(8 * dim / 3)) // m * m", "rounded down"),
    (check_hidden_width, _WIDTH + "    return (int(k * int(8 * dim / 3)) + m // 2) // m * m", "nearest"),
    (check_hidden_width, _WIDTH + "    return -(-int(k * 4 * dim) // m) * m", "two thirds"),
    (check_hidden_width, _WIDTH + "    return int(k * (-(-int(8 * dim / 3) // m) * m))", "before rounding"),
    (check_hidden_width, _WIDTH + "    return (int(k * int(8 * dim / 3)) // m + 1) * m", "raised it"),
    (check_hidden_width, _WIDTH + "    return -(-int(8 * dim / 3) // m) * m", "ignored the multiplier"),
    (check_hidden_width, _WIDTH + "    return -(-int(k * 8 * dim / 3) // m) * m", "dropped twice"),
]  # fmt: skip
