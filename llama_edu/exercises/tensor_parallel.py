"""Checks for the exercises of lesson 42: the way a matrix is cut, the loss of cut logits, a layer that stays cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_edu.exercises import exercise
from llama_edu.parallel.simulated import Cluster

__all__ = ["check_cut", "check_sequence_parallel", "check_vocab_loss"]

_OUT = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3")
_CUT = {
    **{f"layers.0.{name}.weight": 0 for name in _OUT},
    "layers.0.attention.wo.weight": 1,
    "layers.0.feed_forward.w2.weight": 1,
    "tok_embeddings.weight": 0,
    "output.weight": 0,
    "layers.0.attention_norm.weight": None,
    "norm.weight": None,
}


def _same(blocks: list[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(blocks, wanted))


@exercise(lesson="42_tensor_parallel", level=1, minutes=10)
def check_cut(attempt) -> str | None:
    for name, dim in _CUT.items():
        weight = torch.arange(16.0) if dim is None else torch.arange(128.0).view(16, 8)
        blocks = attempt(name, weight.clone(), 4)
        if not isinstance(blocks, (list, tuple)) or len(blocks) != 4:
            return f"{name}: return a list of 4 blocks."
        same = functools.partial(_same, blocks)
        if same([weight] * 4 if dim is None else weight.chunk(4, dim)):
            continue
        if dim is None:
            return f"{name}: a norm scales every feature of the stream, and is held whole by everyone."
        if same(weight.chunk(4, 1 - dim)):
            if dim == 1:
                return (
                    f"{name} reads what is cut already (heads or features): it is row parallel, cut along its input, "
                    "dimension 1 of (out, in)."
                )
            return f"{name} makes what is to be cut: it is column parallel, cut along its output, dimension 0."
        if same([weight] * 4):
            return f"{name} is not cut at all."
        return f"{name}: the blocks are not the weight cut in order along dimension {dim}."
    return None


def _logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 300 * torch.randn(32, 256, dtype=torch.float64, generator=generator)
    return logits, torch.randint(256, (32,), generator=generator)


_LOSS_BYTES = 1200


@exercise(lesson="42_tensor_parallel", level=2, minutes=25)
def check_vocab_loss(attempt) -> str | None:
    logits, targets = _logits()
    right = F.cross_entropy(logits, targets)
    cluster = Cluster(tp=4)
    blocks = cluster.place(logits, 1)
    with cluster.watch(blocks):
        try:
            out = attempt(cluster, list(blocks), targets.clone())
        except RuntimeError as error:
            if "has to be sent first" in str(error):
                return "A rank read another rank's logits without a message: only collectives may cross."
            raise
    if not isinstance(out, (list, tuple)) or len(out) != 4:
        return "Return a list with the loss of each rank."
    values = torch.stack([torch.as_tensor(v).double().detach() for v in out])
    if not values.isfinite().all():
        return "The loss is not finite: subtract the maximum over the whole vocabulary before the exponential."
    if values.dim() != 1:
        return "Each rank returns one number, the mean over the tokens."
    sent = max(cluster.ledger.by("source").values(), default=0)
    if not torch.allclose(values, right.expand(4), rtol=1e-9, atol=1e-9):
        if torch.allclose(values, (right * 32).expand(4), rtol=1e-9):
            return "That is the sum over tokens; return the mean."
        top = logits.amax(-1).mean()
        if torch.allclose(values, (right - top).expand(4), rtol=1e-9) or torch.allclose(
            values, (right + 3 * logits.gather(1, targets[:, None]).mean()).expand(4), rtol=1e-9
        ):
            return "The maximum was subtracted from the sum, but not from the logit of the target: add it again."
        found = logits.gather(1, targets[:, None])[:, 0]
        local = torch.stack([b.gather(1, (targets % 64)[:, None])[:, 0] for b in blocks]).sum(0)
        if torch.allclose(values, (right + (found - local).mean()).expand(4), rtol=1e-9):
            return "Every rank added a logit for the target: those that do not have it must contribute 0."
        if not torch.allclose(values, values[0].expand(4), rtol=1e-9):
            return "The ranks have different losses: what each knows of the sum or the target has to be added up."
        return "All ranks agree on a wrong loss. Does only the rank that has the target contribute its logit?"
    if sent > _LOSS_BYTES:
        return (
            f"The loss is right, but a rank sent {sent:,} bytes, and {_LOSS_BYTES:,} are allowed: send one number a "
            "token, three times, never the logits."
        )
    return None


_LAYER_BYTES = 6144


@exercise(lesson="42_tensor_parallel", level=2, minutes=20)
def check_sequence_parallel(attempt) -> str | None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    x, w1, w3, w2 = draw(32, 16), draw(64, 16), draw(64, 16), draw(16, 64)
    right = (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    cluster = Cluster(tp=4)
    held = [cluster.place(v, dim) for v, dim in ((x, 0), (w1, 0), (w3, 0), (w2, 1))]
    with cluster.watch([[v[r] for v in held] for r in range(4)]):
        try:
            out = attempt(cluster, *[list(v) for v in held])
        except RuntimeError as error:
            if "has to be sent first" in str(error):
                return "A rank read another rank's tensor without a message: only collectives may cross."
            raise
    if not isinstance(out, (list, tuple)) or len(out) != 4:
        return "Return a list with the tokens of each rank."
    sent = max(cluster.ledger.by("source").values(), default=0)
    if out[0].shape == (32, 16):
        return "Each rank has all 32 tokens at the end: leave with a reduce-scatter, so that each keeps its own 8."
    if out[0].shape != (8, 16):
        return f"Each rank must end with its 8 tokens, 16 wide; yours has {tuple(out[0].shape)}."
    if not torch.allclose(torch.cat(list(out)), right, rtol=1e-9, atol=1e-9):
        if not cluster.ledger.calls().get("all_gather"):
            return "Nothing was gathered: each rank's features are needed for all tokens, so the tokens come first."
        if not {"reduce_scatter", "all_reduce", "reduce"} & cluster.ledger.calls().keys():
            return "Each rank's product with its part of w2 is only a summand: the ranks' results have to be added up."
        return "The collectives are there, but the values are wrong. Is it silu(w1 x) * w3 x?"
    if sent > _LAYER_BYTES:
        return (
            f"The result is right, but a rank sent {sent:,} bytes, and {_LAYER_BYTES:,} are allowed: one all-gather "
            "and one reduce-scatter of the tokens; no weights, and no all-reduce whose result is cut again."
        )
    return None
