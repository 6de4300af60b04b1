"""Wrong answers to the exercises of lesson 25, and the words their diagnosis must contain."""

from llama_edu.exercises.checkpoints import check_merge_shards, check_read_float32, check_safe_name, check_to_hf_rows


def read_float32(order="little", head="8", data="8 + n", end="end", shape=".view(said['shape'])"):
    return f"""
import json
import torch
def read_float32(raw, name):
    n = int.from_bytes(raw[:8], "{order}")
    said = json.loads(raw[{head} : {head} + n])[name]
    begin, end = said["data_offsets"]
    start = {data}
    return torch.frombuffer(bytearray(raw[start + begin : start + {end}]), dtype=torch.float32){shape}
"""


def safe_name(body):
    return f"import re\nfrom pathlib import Path\ndef safe_name(name):\n    return {body}\n"


def to_hf_rows(q, k):
    return f"""
from einops import rearrange
def half(w, n):
    return rearrange(w, "(h p two) c -> (h two p) c", h=n, two=2)
def back(w, n):
    return rearrange(w, "(h two p) c -> (h p two) c", h=n, two=2)
def to_hf_rows(wq, wk, n_heads, n_kv_heads):
    return {q}, {k}
"""


def merge_shards(
    rows="('wo', 'w2')", embedding="0 if parts[0].shape[1] == dim else 1", norm="parts[0]", how="torch.cat(parts, d)"
):
    return f"""
import torch
def merge_shards(shards, dim):
    merged = {{}}
    for name in shards[0]:
        parts, kind = [s[name] for s in shards], name.split(".")[0]
        d = 1 if kind in {rows} else 0
        if kind == "tok_embeddings":
            d = {embedding}
        merged[name] = {norm} if kind == "norm" else {how}
    return merged
"""


MISTAKES = [
    (check_read_float32, read_float32(order="big"), "'little', not 'big'"),
    (check_read_float32, read_float32(head="0"), "not the header"),
    (check_read_float32, read_float32(data="n"), "8 bytes early"),
    (check_read_float32, read_float32(data="0"), "from the start of the file"),
    (check_read_float32, read_float32(data="8"), "not the header itself"),
    (check_read_float32, read_float32(shape=""), "their shape is not"),
    (check_read_float32, read_float32(end="begin + end", shape=""), "begin and end, in bytes"),
    (check_safe_name, safe_name("True"), "leaves the folder"),
    (check_safe_name, safe_name("not name.startswith('..')"), "absolute name"),
    (check_safe_name, safe_name("not name.startswith(('..', '/'))"), "may come later"),
    (check_safe_name, safe_name("'..' not in name"), "ordinary name"),
    (check_safe_name, safe_name("'..' not in Path(name).parts and not name.startswith('/')"), "its own folder only"),
    (check_safe_name, safe_name("'/' not in name"), "has no slash"),
    (check_safe_name, safe_name("Path(name).name == name and name != '..'"), "on Windows"),
    (check_safe_name, safe_name("'/' not in name and '\\\\' not in name and name != '..'"), "empty name"),
    (check_safe_name, safe_name("bool(name) and name != '..' and not set(name) & set('/\\\\')"), "the folder itself"),
    (check_safe_name, safe_name("name not in ('', '.', '..') and not set(name) & set('/\\\\')"), "drive C"),
    (check_safe_name, safe_name("name not in ('', '.', '..') and not set(name) & set('/\\\\:')"), "zero byte"),
    (check_safe_name, safe_name("re.match(r'\\w[\\w.-]*$', name) is not None"), "line break"),
    (check_to_hf_rows, to_hf_rows("back(wq, n_heads)", "back(wk, n_kv_heads)"), "Wrong direction"),
    (check_to_hf_rows, to_hf_rows("half(wq, n_heads)", "half(wk, n_heads)"), "number of query heads"),
    (check_to_hf_rows, to_hf_rows("half(wq, n_heads)", "wk"), "wk stays as it was"),
    (check_to_hf_rows, to_hf_rows("half(wq, n_heads)", "back(wk, n_kv_heads)"), "in the other direction"),
    (check_to_hf_rows, to_hf_rows("half(wq, 1)", "half(wk, 1)"), "as one head"),
    (check_to_hf_rows, to_hf_rows("wq", "wk"), "changed nothing"),
    (check_to_hf_rows, to_hf_rows("half(wq, n_heads)", "half(wk, 1)"), "wk is not"),
    (check_merge_shards, merge_shards(rows="()"), "wo takes divided input"),
    (check_merge_shards, merge_shards(rows="('wq', 'w1')"), "wq makes divided output"),
    (check_merge_shards, merge_shards(rows="('wo',)"), "w2 takes divided input"),
    (check_merge_shards, merge_shards(norm="torch.cat(parts)"), "joined the norms"),
    (check_merge_shards, merge_shards(norm="parts[0] + parts[1]"), "added the norms"),
    (check_merge_shards, merge_shards(embedding="0"), "dim tells which"),
    (check_merge_shards, merge_shards(embedding="1"), "dim tells which"),
    (check_merge_shards, merge_shards(how="parts[0]"), "first shard alone"),
    (check_merge_shards, merge_shards(how="parts[0] + parts[1]"), "You added the parts"),
]
