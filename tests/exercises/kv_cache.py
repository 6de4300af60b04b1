"""Wrong answers that readers give to the exercises of lesson 50, and the words by which the checks must name them."""

from llama_edu.exercises.kv_cache import check_attend_one, check_cached_mask, check_greedy

_MASK = (
    "import torch\ndef cached_mask(cached, seq):\n"
    "    q, k = torch.arange(cached, cached + seq)[:, None], torch.arange(cached + seq)\n    return "
)


_TURNED = "rotate(q, cos[length], sin[length])"


def _attend(key=None, at="length", turn="length", query=_TURNED, end="length + 1", scale="0.5"):
    """The solution with one part changed."""
    key = key or f"rotate(k, cos[{turn}], sin[{turn}])"
    return (
        "from llama_edu.exercises.kv_cache import rotate\n"
        "def attend_one(q, k, v, k_cache, v_cache, length, cos, sin):\n"
        f"    k_cache[:, {at}] = {key}\n    v_cache[:, {at}] = v\n"
        f"    keys, values = k_cache[:, :{end}], v_cache[:, :{end}]\n"
        f"    scores = keys @ ({query})[:, :, None] / q.shape[-1] ** {scale}\n"
        "    return (scores.softmax(1) * values).sum(1)\n"
    )


def _greedy(body):
    return (
        "import torch\nfrom llama_edu.generation import KVCache\ndef greedy(model, prompt, n):\n"
        "    cache = KVCache(model.cfg, batch_size=1, max_seq_len=64)\n"
        "    step = lambda ids, c=cache: int(model(torch.tensor([ids]), cache=c)[0, -1].argmax())\n" + body
    )


MISTAKES = [
    (check_cached_mask, _MASK + "torch.ones(seq, seq, dtype=torch.bool).tril()", "cached keys are missing"),
    (check_cached_mask, _MASK + "k <= q - cached", "begin at position 0"),
    (check_cached_mask, _MASK + "k < q", "does not see itself"),
    (check_cached_mask, _MASK + "k <= q + 1", "the one after it"),
    (check_cached_mask, _MASK + "k > q", "wrong way round"),
    (check_cached_mask, _MASK + "(k < cached).expand(seq, -1)", "do not see each other"),
    (check_cached_mask, _MASK + "torch.ones(seq, cached + seq, dtype=torch.bool)", "see all of each other"),
    (check_cached_mask, _MASK + "(k <= q).float()", "boolean mask"),
    (check_attend_one, _attend(at="length - 1"), "overwrote the entry"),
    (check_attend_one, _attend(at="length + 1"), "belongs at 5"),
    (check_attend_one, _attend(key="k"), "before its rotation"),
    (check_attend_one, _attend(turn="length + 1"), "position length + 1"),
    (check_attend_one, _attend(turn="length - 1"), "position length - 1"),
    (check_attend_one, _attend(query="q"), "query is not rotated"),
    (check_attend_one, _attend(end="length"), "does not see itself"),
    (check_attend_one, _attend(end=""), "behind the end"),
    (check_attend_one, _attend(scale="0"), "sqrt(head_dim)"),
    (check_attend_one, _attend().replace("return (scores.softmax(1) * values).sum(1)", "return v"), "only itself"),
    (check_attend_one, _attend().replace("    k_cache[", "    k_cache = k_cache.clone(); v_cache = v_cache.clone()\n"
     "    k_cache["), "as it was"),
    (check_greedy, _greedy("    ids = list(prompt)\n    for _ in range(n): ids.append(step(ids, None))\n"
     "    return ids[len(prompt):]"), "whole text again"),
    (check_greedy, _greedy("    ids = list(prompt)\n    for i in ids[:-1]: step([i])\n    for _ in range(n):\n"
     "        ids.append(step(ids[-1:]))\n    return ids[len(prompt):]"), "token by token"),
    (check_greedy, _greedy("    step(prompt)\n    ids = list(prompt)\n    for _ in range(n):\n"
     "        ids.append(step(ids[-1:]))\n    return ids[len(prompt):]"), "read twice"),
    (check_greedy, _greedy("    ids = [step(prompt)]\n    while len(ids) < n: ids.append(step(ids[-1:], None))\n"
     "    return ids"), "same cache"),
    (check_greedy, _greedy("    ids = [step(prompt)]\n    while len(ids) < n: ids.append(step(ids[-1:]))\n"
     "    return prompt + ids"), "prompt too"),
    (check_greedy, _greedy("    ids = [step(prompt)]\n    for _ in range(n): ids.append(step(ids[-1:]))\n"
     "    return ids"), "8 new ids"),
]  # fmt: skip
