"""Wrong answers that readers give to the exercises of lesson 42, and the words by which the checks must name them."""

from llama_edu.exercises.tensor_parallel import check_cut, check_sequence_parallel, check_vocab_loss

_CUT = "def cut(name, weight, n):\n"
_LOSS = (
    "import torch\ndef vocab_loss(cluster, logits, targets):\n    size = logits[0].shape[-1]\n"
    "    top = cluster.all_reduce([s.amax(-1) for s in logits], op='max')\n"
    "    sums = cluster.all_reduce([(s - m[:, None]).exp().sum(-1) for s, m in zip(logits, top)])\n    found = []\n"
    "    for r, s in enumerate(logits):\n        local = targets - r * size\n"
    "        mine = (local >= 0) & (local < size)\n"
    "        found.append(s.gather(1, local.{}[:, None])[:, 0]{})\n    found = cluster.all_reduce(found)\n"
)
_LAYER = (
    "import torch\nimport torch.nn.functional as F\ndef sequence_parallel(cluster, xs, w1, w3, w2):\n"
    "    ffn = lambda x, a, c, b: (F.silu(x @ a.T) * (x @ c.T)) @ b.T\n"
)
_EACH = "[ffn(*v) for v in zip(xs, w1, w3, w2)]"

MISTAKES = [
    (check_cut, _CUT + "    return list(weight.chunk(n, 0))", "row parallel"),
    (check_cut, _CUT + "    return [weight] * n", "not cut at all"),
    (check_cut, _CUT + "    return list(weight.chunk(n, 0 if 'wo' in name or 'w2' in name else 1))",
     "column parallel"),
    (check_cut, _CUT + "    return list(weight.chunk(n, 1 if 'wo' in name or 'w2' in name else 0))", "a norm scales"),
    (check_vocab_loss, "def vocab_loss(cluster, logits, targets):\n    s = cluster.all_gather(logits, dim=1)\n"
     "    return [(x.logsumexp(1) - x.gather(1, targets[:, None])[:, 0]).mean() for x in s]", "never the logits"),
    (check_vocab_loss, "def vocab_loss(cluster, logits, targets):\n"
     "    sums = cluster.all_reduce([s.exp().sum(-1) for s in logits])\n    return [z.log().mean() for z in sums]",
     "not finite"),
    (check_vocab_loss, _LOSS.format("clamp(0, size - 1)", " * mine")
     + "    return [(z.log() - y).mean() for m, z, y in zip(top, sums, found)]", "add it again"),
    (check_vocab_loss, _LOSS.format("remainder(size)", "")
     + "    return [(m + z.log() - y).mean() for m, z, y in zip(top, sums, found)]", "must contribute 0"),
    (check_vocab_loss, _LOSS.format("clamp(0, size - 1)", " * mine")
     + "    return [(m + z.log() - y).sum() for m, z, y in zip(top, sums, found)]", "the mean"),
    (check_sequence_parallel, _LAYER + f"    return {_EACH}", "Nothing was gathered"),
    (check_sequence_parallel, _LAYER + f"    xs = cluster.all_gather(xs)\n    return cluster.all_reduce({_EACH})",
     "all 32 tokens"),
    (check_sequence_parallel, _LAYER + "    xs = cluster.all_gather(xs)\n"
     f"    return cluster.slice(cluster.all_reduce({_EACH}))", "no all-reduce"),
    (check_sequence_parallel, _LAYER + f"    xs = cluster.all_gather(xs)\n    return cluster.slice({_EACH})",
     "only a summand"),
]  # fmt: skip
