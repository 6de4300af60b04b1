"""Wrong answers that readers give to the exercises of lesson 50, and the words by which the checks must name them."""

from llama_edu.exercises.kv_cache import (
    check_attend_one,
    check_cached_mask,
    check_from_blocks,
    check_greedy,
    check_passes,
    check_to_int8,
)

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


def _blocks(expression):
    return f"def from_blocks(store, table, length):\n    return {expression}\n"


def _int8(scale="x.abs().amax(-1, keepdim=True) / 127", whole="(x / steps).round()"):
    return (
        f"import torch\ndef to_int8(x):\n    scale = {scale}\n    steps = torch.where(scale != 0, scale, 1.0)\n"
        f"    return ({whole}).to(torch.int8), scale\n"
    )


def _passes(body):
    return f"def passes(lengths, rows):\n    {body}\n"


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
    (check_from_blocks, _blocks("store[table].flatten(0, 1)[:length]"), "heads in front"),
    (check_from_blocks, _blocks("store[table].flatten(0, 1).transpose(0, 1)"), "whole blocks"),
    (check_from_blocks, _blocks("store.flatten(0, 1)[:length].transpose(0, 1)"), "first blocks of the store"),
    (check_from_blocks, _blocks("store[sorted(table)].flatten(0, 1)[:length].transpose(0, 1)"), "order of the table"),
    (check_from_blocks, _blocks("store[table].flatten(0, 1)[:length].reshape(2, length, 3)"), "mixed up"),
    (check_to_int8, _int8("x.abs().amax() / 127"), "one scale for everything"),
    (check_to_int8, _int8("x.abs().amax((1, 2), keepdim=True) / 127"), "one scale a head"),
    (check_to_int8, _int8("x.abs().amax(-1) / 127", "x"), "keepdim"),
    (check_to_int8, _int8("x.abs().amax(-1, keepdim=True)"), "divided by 127"),
    (check_to_int8, _int8("x.amax(-1, keepdim=True) / 127"), "abs() first"),
    (check_to_int8, _int8(whole="x / steps"), "cuts the decimals off"),
    (check_to_int8, _int8("x.abs().amax(-1, keepdim=True) / 128"), "beyond the largest int8"),
    (check_to_int8, _int8().replace("torch.where(scale != 0, scale, 1.0)", "scale").replace(
        ", scale\n", ", scale / scale * scale\n"), "0 / 0"),
    (check_to_int8, _int8().replace(".to(torch.int8)", ""), "torch.int8"),
    (check_passes, _passes("return sum(max(lengths[i:i + rows]) for i in range(0, len(lengths), rows))"), "static"),
    (check_passes, _passes("return max(sum(lengths[i::rows]) for i in range(rows))"), "in turn"),
    (check_passes, _passes("return -(-sum(lengths) // rows)"), "divided by the rows"),
    (check_passes, _passes("return sum(lengths)"), "one after another"),
    (check_passes, "def passes(lengths, rows):\n    free = [0] * rows\n"
     "    for n in sorted(lengths, reverse=True): free[free.index(min(free))] += n\n    return max(free)",
     "longest first"),
]  # fmt: skip
