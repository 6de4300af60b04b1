"""Wrong answers that readers give to the exercises of lesson 51, and the words by which the checks must name them."""

from llama_edu.exercises.sampling import (
    check_chosen_logprob,
    check_hold_back,
    check_next_distribution,
    check_penalise,
    check_row_numbers,
    check_top_p,
)


def _top_p(mask="ranked.cumsum(0) - ranked >= p", end="kept / kept.sum()", sort="probabilities.sort(descending=True)"):
    return (
        "import torch\ndef top_p(probabilities, p):\n"
        f"    ranked, order = {sort}\n"
        f"    ranked = ranked.masked_fill({mask}, 0)\n"
        "    kept = torch.zeros_like(probabilities)\n    kept[order] = ranked\n"
        f"    return {end}\n"
    )


def _next(expression):
    return (
        "import math, torch\ndef next_distribution(logits, temperature, p):\n"
        "    cut = lambda z: z.masked_fill(z < z.max() + math.log(p), -math.inf)\n"
        f"    return {expression}\n"
    )


def _penalise(body):
    return f"import torch\ndef penalise(logits, ids, penalty):\n    new = logits.clone()\n    {body}\n    return new\n"


def _logprob(expression):
    return (
        "import torch\ndef chosen_logprob(logits, k, ids):\n"
        "    masked = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)\n"
        "    at = lambda z: z.gather(-1, ids[:, None])[:, 0]\n"
        f"    return {expression}\n"
    )


def _numbers(expression):
    return (
        "import numpy as np\nrng = np.random.default_rng\nstate = rng(0)\ndef row_numbers(seed, rows, step):\n"
        f"    return {expression}\n"
    )


def _hold(expression):
    return (
        "def hold_back(text, stops):\n"
        "    fits = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]\n"
        f"    return {expression}\n"
    )


MISTAKES = [
    (check_top_p, _top_p("ranked.cumsum(0) > p + 1e-12"), "crosses p"),
    (check_top_p, _top_p(end="kept"), "sum to 1"),
    (check_top_p, _top_p(end="ranked / ranked.sum()"), "in the order in which they came"),
    (check_top_p, _top_p(sort="probabilities, torch.arange(len(probabilities))"), "sort before you sum"),
    (check_top_p, _top_p("ranked < p * ranked[0]"), "min-p"),
    (check_top_p, _top_p("ranked.cumsum(0) > p - 0.5"), "nothing is left"),
    (check_next_distribution, _next("(cut(logits) / temperature).softmax(0)"), "divide first"),
    (check_next_distribution, _next("cut(logits * temperature).softmax(0)"), "multiply by the temperature"),
    (check_next_distribution, _next("torch.where(cut(logits / temperature).isfinite(), "
     "(logits / temperature).softmax(0), 0)"), "before the cut"),
    (check_next_distribution, _next("cut(logits).softmax(0)"), "temperature is missing"),
    (check_next_distribution, _next("(logits / temperature).softmax(0)"), "Nothing is cut off"),
    (check_penalise, _penalise("new[list(set(ids))] /= penalty"), "raises it, so a repeated"),
    (check_penalise, _penalise("new[list(set(ids))] *= penalty"), "Multiplying a positive"),
    (check_penalise, _penalise("new = torch.where(new > 0, new / penalty, new * penalty)"), "only those in"),
    (check_penalise, _penalise("new[list(set(ids))] -= penalty"), "subtract"),
    (check_penalise, _penalise("for i in ids: new[i] = new[i] / penalty if new[i] > 0 else new[i] * penalty"),
     "take the set"),
    (check_penalise, _penalise("new = logits; new[list(set(ids))] /= penalty"), "work on a copy"),
    (check_chosen_logprob, _logprob("at(masked.log_softmax(-1))"), "after the masking"),
    (check_chosen_logprob, _logprob("at(logits)"), "logits themselves"),
    (check_chosen_logprob, _logprob("at(logits.softmax(-1))"), "are probabilities"),
    (check_chosen_logprob, _logprob("logits.log_softmax(-1).amax(-1)"), "likeliest token of each row"),
    (check_chosen_logprob, _logprob("at(logits.log_softmax(0))"), "over the batch"),
    (check_row_numbers, _numbers("[rng(seed + step).random() for row in rows]"), "equal prompts"),
    (check_row_numbers, _numbers("rng([seed, step]).random(len(rows)).tolist()"), "which others are in the list"),
    (check_row_numbers, _numbers("[rng([seed, row]).random() for row in rows]"), "use `step`"),
    (check_row_numbers, _numbers("[rng([row, step]).random() for row in rows]"), "seed makes no difference"),
    (check_row_numbers, _numbers("[state.random() for row in rows]"), "Asked again"),
    (check_row_numbers, _numbers("[rng(seed + row + step).random() for row in rows]"), "do not add them up"),
    (check_hold_back, _hold("0"), "you show them"),
    (check_hold_back, _hold("min(fits, default=0)"), "take the longest"),
    (check_hold_back, _hold("max((len(s) - 1 for s in stops), default=0)"), "only what fits"),
    (check_hold_back, _hold("int(any(text.endswith(s[0]) for s in stops))"), "last character only"),
]  # fmt: skip
