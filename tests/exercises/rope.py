"""Wrong answers that readers give to the exercises of lesson 21, and the words by which the checks must name them."""

from llama_edu.exercises.rope import check_permute_rows, check_rotate, check_scale_frequencies

_ROTATE = "import torch\ndef rotate(x, cos, sin):\n    a, b = x[:, 0::2], x[:, 1::2]\n    f, s = x.chunk(2, dim=-1)\n"
_WEAVE = "    return torch.stack([{}, {}], dim=-1).flatten(-2)"
_TABLES = "    c, d = (t.{} for t in (cos, sin))\n"
_SCALE = (
    "import math, torch\ndef scale_frequencies(frequencies, factor, context):\n    f = frequencies\n"
    "    turns = context * f / (2 * math.pi)\n    k = ((turns - 1) / 3).clamp(0, 1)\n"
)
_MIX = "    return k * f + (1 - k) * f / factor"
_ROWS = "def permute_rows(w, n_heads):\n    rows, cols = w.shape\n    half = rows // n_heads // 2\n"

MISTAKES = [
    (check_rotate, _ROTATE + _WEAVE.format("a * cos + b * sin", "b * cos - a * sin"), "Wrong sign"),
    (check_rotate, _ROTATE + "    return torch.cat([f * cos - s * sin, f * sin + s * cos], dim=-1)", "Wrong pairing"),
    (check_rotate, _ROTATE + "    return torch.cat([f * cos + s * sin, s * cos - f * sin], dim=-1)", "as well"),
    (check_rotate, _ROTATE + "    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)", "woven together"),
    (check_rotate, _ROTATE + _WEAVE.format("a * sin - b * cos", "a * cos + b * sin"), "exchanged"),
    (check_rotate, _ROTATE + _WEAVE.format("a * cos + b * sin", "a * sin + b * cos"), "no rotation"),
    (check_rotate, _ROTATE + "    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)",
     "woven together again"),
    (check_rotate, _ROTATE + "    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)", "sign is wrong"),
    (check_rotate, _ROTATE + _WEAVE.format("f * cos - s * sin", "f * sin + s * cos"), "pairs from the halves"),
    (check_rotate, _ROTATE + _WEAVE.format("f * cos + s * sin", "s * cos - f * sin"), "sign is wrong"),
    (check_rotate, _ROTATE + _TABLES.format("repeat_interleave(2, -1)")
     + "    return x * c + torch.cat([-s, f], -1) * d",
     "partner comes from the other half"),
    (check_rotate, _ROTATE + _TABLES.format("repeat_interleave(2, -1)")
     + "    return x * c + torch.cat([s, -f], -1) * d",
     "sign is wrong"),
    (check_rotate, _ROTATE + _TABLES.format("repeat(1, 2)")
     + "    return x * c + torch.stack([-b, a], -1).flatten(-2) * d", "laid out for halves"),
    (check_rotate, _ROTATE + _TABLES.format("repeat(1, 2)")
     + "    return x * c - torch.stack([-b, a], -1).flatten(-2) * d", "sign is wrong"),
    (check_rotate, _ROTATE + "    x[:, 0::2] = a * cos - b * sin\n    x[:, 1::2] = a * sin + b * cos\n    return x",
     "keep the old a"),
    (check_rotate, _ROTATE + _WEAVE.format("a * cos - b * sin", "b * cos - a * sin"), "have a minus"),
    (check_rotate, _ROTATE + _WEAVE.format("a * sin + b * cos", "a * cos - b * sin"), "comes first"),
    (check_rotate, _ROTATE + "    return x", "changed nothing"),
    (check_scale_frequencies, _SCALE + "    return f", "Unscaled"),
    (check_scale_frequencies, _SCALE + "    return f / factor", "divided all"),
    (check_scale_frequencies, _SCALE + "    return k * f + (1 - k) * f * factor", "multiplied"),
    (check_scale_frequencies, _SCALE + "    return (1 - k) * f + k * f / factor", "bands are exchanged"),
    (check_scale_frequencies, _SCALE + "    return torch.where(turns < 1, f / factor, f)", "no transition"),
    (check_scale_frequencies, _SCALE + "    return torch.where(turns < 4, f / factor, f)", "no transition"),
    (check_scale_frequencies, _SCALE + "    g = torch.where(turns >= 4, f, f / factor)\n"
     "    return torch.where((turns > 1) & (turns < 4), (1 - k) * f + k * f / factor, g)", "turned around"),
    (check_scale_frequencies, _SCALE + "    w = ((context / turns - context / 4) / (context * 3 / 4)).clamp(0, 1)\n"
     "    return (1 - w) * f + w * f / factor", "in the wavelength"),
    (check_scale_frequencies, _SCALE + "    k = ((context * f - 1) / 3).clamp(0, 1)\n" + _MIX, "lacks the 2 * pi"),
    (check_scale_frequencies, _SCALE + "    k = (turns - 1) / 3\n" + _MIX, "clamp the share"),
    (check_scale_frequencies, _SCALE + "    k = ((turns - 1) / 4).clamp(0, 1)\n" + _MIX, "divide turns - 1 by 4 - 1"),
    (check_scale_frequencies, _SCALE + "    k = (turns / 4).clamp(0, 1)\n" + _MIX, "begins at 1 turn"),
    (check_scale_frequencies, _SCALE + "    k = ((turns - 1) / 9).clamp(0, 1)\n" + _MIX, "more than 4 turns"),
    (check_scale_frequencies, _SCALE + "    k = ((turns + 1) / 5).clamp(0, 1)\n" + _MIX, "less than 1 turn"),
    (check_scale_frequencies, _SCALE + "    return 1 / (k / f + (1 - k) * factor / f)", "from one wavelength"),
    (check_scale_frequencies, _SCALE + "    return k * f + (1 - k) * f / 8", "use the arguments"),
    (check_permute_rows, _ROWS + "    return w", "changed nothing"),
    (check_permute_rows, _ROWS + "    return w.view(n_heads, 2, half, cols).transpose(1, 2).reshape(rows, cols)",
     "way back"),
    (check_permute_rows, _ROWS + "    return w.view(rows // 2, 2, cols).transpose(0, 1).reshape(rows, cols)",
     "one head"),
    (check_permute_rows, _ROWS + "    return w.view(rows, n_heads, half, 2).transpose(2, 3).reshape(rows, cols)",
     "columns"),
    (check_permute_rows, _ROWS + "    return w.view(n_heads, half, 2, cols).transpose(0, 1).reshape(rows, cols)",
     "heads with the pairs"),
]  # fmt: skip
