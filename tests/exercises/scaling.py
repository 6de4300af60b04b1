"""Wrong answers that readers give to the exercises of lesson 32, and the words by which the checks must name them."""

from llama_edu.exercises.scaling import check_compute_optimal, check_huber_objective, check_parabola_vertex

_VERTEX = "import numpy as np\ndef parabola_vertex(size, loss):\n    x = np.log(size)\n"
_SPLIT = "def compute_optimal(A, B, alpha, beta, flops):\n    s = alpha + beta\n"
_HUBER = (
    "import numpy as np\ndef huber_objective(constants, params, tokens, loss, delta):\n"
    "    A, B, E, alpha, beta = constants\n    p = E + A / params**alpha + B / tokens**beta\n"
    "    r = np.abs(np.log(p) - np.log(loss))\n"
)

MISTAKES = [
    (check_parabola_vertex, _VERTEX + "    return size[loss.argmin()]", "lowest loss"),
    (check_parabola_vertex, _VERTEX + "    a, b, c = np.polyfit(x, loss, 2)\n    return -b / (2 * a)",
     "undo it with exp"),
    (check_parabola_vertex, _VERTEX + "    a, b, c = np.polyfit(np.log10(size), loss, 2)\n    return -b / (2 * a)",
     "10 ** x"),
    (check_parabola_vertex, _VERTEX + "    a, b, c = np.polyfit(size, loss, 2)\n    return -b / (2 * a)", "log(size)"),
    (check_parabola_vertex, _VERTEX + "    a, b, c = np.polyfit(x, loss, 2)\n    return np.exp(b / (2 * a))", "sign"),
    (check_parabola_vertex, _VERTEX + "    a, b, c = np.polyfit(x, loss, 2)\n    return np.exp(-b / a)", "factor 2"),
    (check_compute_optimal, _SPLIT + "    n = (alpha * A / (beta * B)) ** (1 / s) * (flops / 6) ** (beta / s)\n"
     "    return flops / 6 / n, n", "wrong order"),
    (check_compute_optimal, _SPLIT + "    n = (alpha * A / (beta * B)) ** (1 / s) * flops ** (beta / s)\n"
     "    return n, flops / n", "6 N D = C"),
    (check_compute_optimal, _SPLIT + "    n = (alpha * A / (beta * B)) ** (1 / s) * (flops / 6) ** (alpha / s)\n"
     "    return n, flops / 6 / n", "swapped"),
    (check_compute_optimal, _SPLIT + "    n = (beta * B / (alpha * A)) ** (1 / s) * (flops / 6) ** (beta / s)\n"
     "    return n, flops / 6 / n", "upside down"),
    (check_compute_optimal, _SPLIT + "    n = (flops / 6) ** (beta / s)\n    return n, flops / 6 / n", "missing"),
    (check_compute_optimal, _SPLIT + "    n = (A / B) ** (1 / s) * (flops / 6) ** (beta / s)\n"
     "    return n, flops / 6 / n", "derivatives"),
    (check_huber_objective, _HUBER + "    return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).mean()",
     "take the sum"),
    (check_huber_objective, _HUBER + "    r = np.abs(p - loss)\n"
     "    return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum()", "logarithms"),
    (check_huber_objective, _HUBER + "    return (r**2 / 2).sum()", "straight line"),
    (check_huber_objective, _HUBER + "    return (r**2).sum()", "left out the half"),
    (check_huber_objective, _HUBER + "    return np.where(r <= delta, r**2 / 2, delta * r).sum()", "meet the parabola"),
    (check_huber_objective, _HUBER + "    return np.where(r <= delta, r**2 / 2, r - delta / 2).sum()", "slope 1"),
    (check_huber_objective, _HUBER + "    return np.where(r <= delta, r**2, delta * (r - delta / 2)).sum()",
     "half in front"),
    (check_huber_objective, _HUBER + "    return r.sum()", "absolute values"),
    (check_huber_objective, _HUBER + "    r = r / np.log(10)\n"
     "    return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum()", "base 10"),
    *((check_compute_optimal, _SPLIT.replace("\n", f"\n    {name} = {value}\n", 1)
       + "    n = (alpha * A / (beta * B)) ** (1 / s) * (flops / 6) ** (beta / s)\n    return n, flops / 6 / n",
       f"`{name}` seems to be ignored")
      for name, value in (("A", 400), ("B", 2000), ("alpha", 0.3), ("beta", 0.4), ("flops", 1e21))),
    *((check_huber_objective, _HUBER.replace("    p =", f"    {name} = {value}\n    p =")
       + "    return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum()", f"`{name}` seems to be ignored")
      for name, value in (("A", 406.4), ("B", 410.7), ("E", 1.69), ("alpha", 0.34), ("beta", 0.28), ("delta", 1e-2))),
]  # fmt: skip
