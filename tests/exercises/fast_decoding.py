"""Wrong answers that readers give to the exercises of lesson 52, and the words by which the checks must name them."""

from llama_edu.exercises.fast_decoding import check_accept, check_bytes_per_token, check_row_scales, check_unpack_int4


def _bytes(weights="layers + cfg.vocab_size * cfg.dim", scale="bits / 8", heads="cfg.n_kv_heads", kv="2 * 2"):
    return (
        "def bytes_per_token(cfg, bits, length):\n"
        "    heads = 2 * cfg.dim * cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads)\n"
        "    layers = cfg.n_layers * (heads + 3 * cfg.dim * cfg.ffn_dim)\n"
        f"    cache = length * cfg.n_layers * {heads} * cfg.head_dim * {kv}\n"
        f"    return ({weights}) * {scale} + cache\n"
    )


_SCALES = "def row_scales(w):\n    return "
_UNPACK = "import torch\ndef unpack_int4(packed):\n    g = packed.view(packed.shape[0], -1, 16)\n    "


def _accept(keep="u * q[token] < p[token]", weights="(p - q).clamp_min(0)", draw=None):
    draw = draw or "int(torch.searchsorted(weights.cumsum(0), v * weights.sum(), right=True))"
    return (
        f"import torch\ndef accept(p, q, token, u, v):\n    if {keep}:\n        return token\n"
        f"    weights = {weights}\n    return {draw}\n"
    )


MISTAKES = [
    (check_bytes_per_token, _bytes(kv="0"), "cache is missing"),
    (check_bytes_per_token, _bytes(weights="layers + 2 * cfg.vocab_size * cfg.dim"), "embedding table"),
    (check_bytes_per_token, _bytes(weights="layers"), "output matrix is missing"),
    (check_bytes_per_token, _bytes(scale="bits"), "bits for bytes"),
    (check_bytes_per_token, _bytes(kv="2"), "both read"),
    (check_bytes_per_token, _bytes(heads="cfg.n_heads"), "grouped attention"),
    (check_bytes_per_token, _bytes(kv="2 * bits / 8"), "2 bytes each"),
    (check_row_scales, _SCALES + "w.abs().max() / 127", "whole matrix"),
    (check_row_scales, _SCALES + "(w.abs().max() / 127).expand(len(w), 1)", "whole matrix"),
    (check_row_scales, _SCALES + "w.abs().amax(1) / 127", "keepdim"),
    (check_row_scales, _SCALES + "w.abs().amax(0, keepdim=True) / 127", "columns"),
    (check_row_scales, _SCALES + "w.amax(1, keepdim=True) / 127", "absolute value"),
    (check_row_scales, _SCALES + "w.abs().amax(1, keepdim=True) / 128", "128"),
    (check_row_scales, _SCALES + "w.abs().amax(1, keepdim=True) / 255", "sign"),
    (check_row_scales, _SCALES + "127 / w.abs().amax(1, keepdim=True)", "inverse"),
    (check_unpack_int4, _UNPACK + "return (torch.cat([g & 15, g >> 4], -1).int() - 7).flatten(1)", "zero is wrong"),
    (check_unpack_int4, _UNPACK + "return torch.cat([g & 15, g >> 4], -1).int().flatten(1)", "zero is missing"),
    (check_unpack_int4, _UNPACK + "return (torch.cat([g >> 4, g & 15], -1).int() - 8).flatten(1)", "exchanged"),
    (check_unpack_int4, _UNPACK + "return (torch.stack([g & 15, g >> 4], -1).int() - 8).flatten(1)", "side by side"),
    (check_unpack_int4, _UNPACK + "return torch.cat([packed & 15, packed >> 4], -1).int() - 8", "every 16 bytes"),
    (check_unpack_int4, _UNPACK + "return (torch.cat([g & 15, g >> 4], -1) - 8).flatten(1)", "unsigned"),
    (check_unpack_int4, _UNPACK + "t = torch.cat([g & 15, g >> 4], -1).int().flatten(1)\n    return t - 16 * (t > 7)",
     "two's complement"),
    (check_accept, _accept(weights="p"), "draw from p again"),
    (check_accept, _accept(weights="q"), "draw from q again"),
    (check_accept, _accept(weights="(p - q).abs()"), "|p - q|"),
    (check_accept, _accept(keep="True"), "nothing is ever rejected"),
    (check_accept, _accept(keep="u * p[token] < q[token]"), "upside down"),
    (check_accept, _accept(keep="u < p[token]"), "probability p;"),
    (check_accept, _accept(draw="int(weights.argmax())"), "likeliest token"),
]  # fmt: skip
