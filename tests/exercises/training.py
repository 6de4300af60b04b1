"""Wrong answers that readers give to the exercises of lesson 31, and the words by which the checks must name them."""

from llama_edu.exercises.training import (
    check_adamw,
    check_batch_loss,
    check_chunk_gradients,
    check_inputs_and_targets,
    check_split_decay,
    check_utilisation,
    check_warmup_cosine,
)

_SHIFT = "def inputs_and_targets(window):\n    return "
_LOSS = "def batch_loss(means, counts):\n    return "
_RATE = "import math\ndef warmup_cosine(step, peak, final, warmup, steps):\n"
_SPLIT = "def split_decay(shapes):\n    decays = "
_REST = "\n    return decays, [name for name in shapes if name not in decays]"
_CHUNK = "def chunk_gradients(hidden, weight, targets):\n    g = (hidden @ weight.T).softmax(1)\n"
_MINUS = _CHUNK + "    g[range(len(targets)), targets] -= 1\n"
_USE = "def utilisation(parameters, speed, peak):\n    return "
_CLIMB = _RATE + "    if step < warmup:\n        return peak * step / warmup\n"


def _adamw(before="", shrink="1 - lr * decay * (w.ndim >= 2)", t="step", size="v_hat.sqrt() + eps", square="g * g"):
    return (
        f"def adamw(w, g, m, v, step, lr, beta1, beta2, eps, decay):\n{before}"
        f"    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * ({square})\n"
        f"    m_hat, v_hat = m / (1 - beta1 ** ({t})), v / (1 - beta2 ** ({t}))\n"
        f"    return w * ({shrink}) - lr * m_hat / ({size}), m, v"
    )


MISTAKES = [
    (check_inputs_and_targets, _SHIFT + "window[:, :-1], window[:, :-1]", "learn to copy"),
    (check_inputs_and_targets, _SHIFT + "window[:, 1:], window[:, :-1]", "swapped"),
    (check_inputs_and_targets, _SHIFT + "window[:, :-2], window[:, 2:]", "shifted by two"),
    (check_inputs_and_targets, _SHIFT + "window, window.roll(-1, 1)", "first id round"),
    (check_inputs_and_targets, _SHIFT + "window[:-1], window[1:]", "not positions"),
    (check_batch_loss, _LOSS + "sum(means) / len(means)", "mean of the means"),
    (check_batch_loss, _LOSS + "sum(m * c for m, c in zip(means, counts)) / len(counts)", "number of parts"),
    (check_batch_loss, _LOSS + "sum(m * c for m, c in zip(means, counts))", "not divided"),
    (check_batch_loss, _LOSS + "sum(means) / sum(counts)", "multiplied by its count"),
    (
        check_warmup_cosine,
        _RATE + "    step -= 1\n    if step < warmup:\n        return peak * step / warmup\n    return final",
        "count from 0",
    ),
    (
        check_warmup_cosine,
        _RATE + "    if step < warmup:\n        return peak * (step + 1) / warmup\n    return final",
        "one step ahead",
    ),
    (
        check_warmup_cosine,
        _CLIMB + "    s = (step - 1 - warmup) / (steps - warmup)\n"
        "    return final + (peak - final) * (1 + math.cos(math.pi * max(0, s))) / 2",
        "one step short",
    ),
    (
        check_warmup_cosine,
        _CLIMB + "    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2",
        "falls to 0",
    ),
    (
        check_warmup_cosine,
        _CLIMB + "    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / steps)) / 2",
        "stretched over all steps",
    ),
    (
        check_warmup_cosine,
        _CLIMB + "    return peak + (final - peak) * (step - warmup) / (steps - warmup)",
        "straight line",
    ),
    *(
        (
            check_warmup_cosine,
            _RATE
            + f"    {name} = {value}\n"
            + _CLIMB.removeprefix(_RATE)
            + "    s = (step - warmup) / (steps - warmup)\n"
            "    return final + (peak - final) * (1 + math.cos(math.pi * s)) / 2",
            f"`{name}` seems to be ignored",
        )
        for name, value in (("peak", 8), ("final", 2), ("warmup", 10), ("steps", 110))
    ),
    *(
        (check_adamw, _adamw(before=f"    {name} = {value}\n"), f"`{name}` seems to be ignored")
        for name, value in (("step", 3), ("lr", 0.1), ("beta1", 0.9), ("beta2", 0.8), ("eps", 0.05), ("decay", 0.5))
    ),
    (check_adamw, _adamw(shrink="1 - lr * decay"), "on the wrong tensors"),
    (check_adamw, _adamw(shrink="1 - lr * decay * (w.ndim < 2)"), "on the wrong tensors"),
    (check_adamw, _adamw(before="    g = g + decay * w\n", shrink="1"), "into the gradient"),
    (check_adamw, _adamw(t="10 ** 6"), "bias correction is missing"),
    (check_adamw, _adamw(t="step + 1"), "one step ahead"),
    (check_adamw, _adamw(size="(v_hat + eps).sqrt()"), "inside the root"),
    (check_adamw, _adamw(size="v_hat + eps"), "not by its root"),
    (check_adamw, _adamw(shrink="1 - decay * (w.ndim >= 2)"), "lacks the learning rate"),
    (check_adamw, _adamw(square="g.abs()"), "squared gradient"),
    (check_split_decay, _SPLIT + "list(shapes)" + _REST, "everything decay"),
    (check_split_decay, _SPLIT + "[n for n, s in shapes.items() if len(s) == 1]" + _REST, "swapped"),
    (
        check_split_decay,
        _SPLIT + "[n for n in shapes if '.norm' not in n and 'ffn_norm' not in n and n != 'norm.weight']" + _REST,
        "is a vector",
    ),
    (
        check_split_decay,
        _SPLIT + "[n for n, s in shapes.items() if len(s) > 1 and 'emb' not in n]" + _REST,
        "embeddings",
    ),
    (check_split_decay, _SPLIT + "[n for n in shapes if 'norm' not in n]" + _REST, "by names"),
    (check_chunk_gradients, _CHUNK + "    return g @ weight, g.T @ hidden", "at the target"),
    (check_chunk_gradients, _MINUS + "    return g @ weight / len(g), g.T @ hidden / len(g)", "of the mean"),
    (check_chunk_gradients, _MINUS + "    return -g @ weight, -g.T @ hidden", "turned round"),
    (check_chunk_gradients, _MINUS.replace("softmax(1)", "softmax(0)") + "    return g @ weight, g.T @ hidden", "rows"),
    (check_chunk_gradients, _MINUS + "    return g @ weight, hidden.T @ g", "hidden is right"),
    (check_utilisation, _USE + "2 * parameters * speed / peak", "forward pass alone"),
    (check_utilisation, _USE + "8 * parameters * speed / peak", "6, not 8"),
    (check_utilisation, _USE + "peak / (6 * parameters * speed)", "Upside down"),
    (check_utilisation, _USE + "600 * parameters * speed / peak", "percent"),
]
