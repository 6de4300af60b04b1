"""Checks for the exercises of lesson 25: a safetensors file by hand, names from an index, rows and shards."""

from __future__ import annotations

import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor

from llama_edu.exercises import exercise

__all__ = ["check_merge_shards", "check_read_float32", "check_safe_name", "check_to_hf_rows"]


def _equal(a: object, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a.to(b.dtype), b)


@exercise(lesson="25_checkpoints", level=1, minutes=10)
def check_read_float32(attempt) -> str | None:
    first, second = torch.arange(4.0) + 1, torch.linspace(-3, 3, 12).view(3, 4)
    raw = save({"first": first, "second": second, "third": torch.zeros(20)})
    length = int.from_bytes(raw[:8], "little")
    try:
        got, origin = attempt(raw, "second"), attempt(raw, "first")
    except ValueError as error:  # of json.loads, which keeps what it was given
        text = getattr(error, "doc", None) or getattr(error, "object", None)
        if text is None:
            raise
        if text[:1] in ("{", b"{"):
            return "Your header is too long: the length has its least significant byte first, 'little', not 'big'."
        return "What you parse is not the header: it starts at byte 8 and ends at byte 8 + length."
    if _equal(got, second) and _equal(origin, first):
        return None
    if not isinstance(got, Tensor):
        return f"Return a tensor, not {type(got).__name__}."
    if _equal(got, second.flatten()):
        return "The numbers are right, their shape is not: the header states it."
    if got.numel() != second.numel():
        return (
            f"The tensor has {second.numel()} numbers, yours {got.numel()}: data_offsets are begin and end, in bytes."
        )
    at = {"begin": 16, "end": 64}
    bytes_at = lambda start: torch.frombuffer(bytearray(raw[start : start + 48].ljust(48, b"\0")), dtype=torch.float32)
    flat = got.flatten().to(torch.float32)
    if flat.view(torch.int32).equal(bytes_at(at["begin"] + length).view(torch.int32)):
        return (
            "You are 8 bytes early: the offsets count from the end of the header, which starts after the 8-byte length."
        )
    if flat.view(torch.int32).equal(bytes_at(at["begin"]).view(torch.int32)):
        return "You counted the offsets from the start of the file; they count from the end of the header."
    if flat.view(torch.int32).equal(bytes_at(at["begin"] + 8).view(torch.int32)):
        return "You skipped the 8 bytes of the length, but not the header itself."
    return "The numbers are not those of the tensor: print begin, end and the length of the header."


@exercise(lesson="25_checkpoints", level=1, minutes=5)
def check_safe_name(attempt) -> str | None:
    good = ["model.safetensors", "model-00001-of-00002.safetensors", "a..b.safetensors"]
    bad = {
        "../model.safetensors": "'../model.safetensors' passes: it leaves the folder.",
        "/etc/passwd": "'/etc/passwd' passes: an absolute name ignores the folder it is joined to.",
        "weights/../../secret": "'weights/../../secret' passes: the way out may come later in the name.",
        "weights/model.safetensors": "'weights/model.safetensors' passes: an index names files of its own folder only.",
        "..": "'..' passes: it has no slash and is a folder all the same.",
        "C:\\secret": "'C:\\\\secret' passes: on Windows this is a path.",
        "": "The empty name passes: joined to the folder, it is the folder.",
        ".": "'.' passes: it is the folder itself.",
        "C:secret": "'C:secret' passes: on Windows this is a file in whatever folder drive C stands in.",
        "a\0b": "'a\\0b' passes: a zero byte ends the name for the system, which would look for 'a'.",
        "a.safetensors\n": "A name with a line break at its end passes: `$` allows one, `re.fullmatch` does not.",
    }
    for name in good:
        if attempt(name) is not True:
            return f"{name!r} is an ordinary name and must give True; yours gives {attempt(name)!r}."
    for name, verdict in bad.items():
        if attempt(name):
            return verdict
    return None


def _half(w: Tensor, heads: int) -> Tensor:
    return rearrange(w, "(head pair two) cols -> (head two pair) cols", head=heads, two=2)


def _interleaved(w: Tensor, heads: int) -> Tensor:
    return rearrange(w, "(head two pair) cols -> (head pair two) cols", head=heads, two=2)


@exercise(lesson="25_checkpoints", level=2, minutes=15)
def check_to_hf_rows(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    n_heads, n_kv_heads, head_dim = 6, 2, 12
    wq = torch.randn(n_heads * head_dim, 5, generator=generator)
    wk = torch.randn(n_kv_heads * head_dim, 5, generator=generator)
    got = attempt(wq.clone(), wk.clone(), n_heads, n_kv_heads)
    if not isinstance(got, tuple | list) or len(got) != 2:
        return "Return two tensors: the rows of q_proj and those of k_proj."
    q, k = got
    right_q, right_k = _half(wq, n_heads), _half(wk, n_kv_heads)
    if _equal(q, right_q) and _equal(k, right_k):
        return None
    if not all(isinstance(t, Tensor) and t.shape == w.shape for t, w in ((q, wq), (k, wk))):
        return "Rows only change places: both results must have the shapes of wq and wk."
    if _equal(q, _interleaved(wq, n_heads)):
        return "Wrong direction: that turns Hugging Face's order into Meta's. First members must come first."
    if _equal(q, _half(wq, 1)):
        return "You treated the matrix as one head: rows must stay inside their own head."
    if _equal(q, wq) and _equal(k, wk):
        return "You changed nothing."
    if _equal(q, right_q):
        if _equal(k, _half(wk, n_heads)):
            return "wk is reordered with the number of query heads; it has n_kv_heads heads."
        if _equal(k, wk):
            return "wk stays as it was: keys are rotated like queries, so their rows move as well."
        if _equal(k, _interleaved(wk, n_kv_heads)):
            return "wq is right, but wk goes in the other direction."
        return "wq is right, wk is not."
    if _equal(k, right_k):
        return "wk is right, wq is not."
    if _equal(q, wq.unflatten(0, (n_heads, 2, -1)).flip(1).flatten(0, 2)):
        return "You exchanged the halves of each head; the members of a pair have to be separated."
    return "The rows do not stand as Hugging Face expects: in each head all first members, then all second members."


@exercise(lesson="25_checkpoints", level=2, minutes=15)
def check_merge_shards(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"wq": (8, 8), "wo": (8, 8), "w1": (12, 8), "w2": (8, 12), "output": (10, 8), "tok_embeddings": (10, 8)}
    dims = {"wq": 0, "wo": 1, "w1": 0, "w2": 1, "output": 0}
    for embedding in (0, 1):
        whole = {f"{kind}.weight": torch.randn(shape, generator=generator) for kind, shape in shapes.items()}
        whole["norm.weight"] = torch.randn(8, generator=generator)
        parts = {
            name: [w.clone() for _ in range(2)]
            if name == "norm.weight"
            else [c.clone() for c in w.chunk(2, (dims | {"tok_embeddings": embedding})[name.split(".")[0]])]
            for name, w in whole.items()
        }
        got = attempt([{name: p[rank] for name, p in parts.items()} for rank in range(2)], 8)
        if not isinstance(got, dict) or got.keys() != whole.keys():
            return "Return a dictionary with the same names as each shard."
        for name, right in whole.items():
            if _equal(got[name], right):
                continue
            one, two = parts[name]
            kind = name.split(".")[0]
            if kind == "norm":
                if _equal(got[name], torch.cat([one, two])):
                    return "You joined the norms; every shard holds them whole, so take one."
                if _equal(got[name], one + two):
                    return "You added the norms; every shard holds them whole, so take one."
            if kind == "tok_embeddings":
                return (
                    "The embedding is joined along the wrong dimension in one of the two generations: its parts are "
                    "(vocab_size / n, dim) or (vocab_size, dim / n), and dim tells which."
                )
            if dims.get(kind) == 1 and _equal(got[name], torch.cat([one, two], 0)):
                return (
                    f"Columns and rows are mixed up: {kind} takes divided input, its parts stand side by side (dim 1)."
                )
            if dims.get(kind) == 0 and _equal(got[name], torch.cat([one, two], 1)):
                return f"Columns and rows are mixed up: {kind} makes divided output, so its parts are stacked (dim 0)."
            if _equal(got[name], one + two):
                return f"You added the parts of {kind}. Outputs are added when the model runs; the weights are joined."
            if _equal(got[name], one):
                return f"{kind} comes from the first shard alone; the others hold the rest of it."
            return f"{kind} is not what was split: shape {tuple(right.shape)} is expected."
    return None
