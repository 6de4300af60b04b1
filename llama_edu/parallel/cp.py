"""Context parallel: every sequence in 2 * cp chunks, two a rank; attention gathers the keys and values of all."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from llama_edu.model.attention import causal_mask

__all__ = ["ContextAttention", "apply_cp", "chunk_positions", "gather_chunks"]


def chunk_positions(seq_len: int, cp: int) -> Int[Tensor, "{cp} local"]:
    """Positions of the tokens that each rank holds: chunks i and 2 * cp - 1 - i of 2 * cp, an early and a late one.

    A late chunk sees many keys and an early one few; together every rank has the same work.

    Example:
        >>> chunk_positions(8, 2)
        tensor([[0, 1, 6, 7],
                [2, 3, 4, 5]])

    Source: Llama 3, arXiv 2407.21783, section 3.3.2.
    """
    chunks = torch.arange(seq_len).view(2 * cp, -1)
    return torch.cat([chunks[:cp], chunks.flip(0)[:cp]], dim=1)


def gather_chunks(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """The tokens of all ranks along `dim`, in the order of the sequence. Backward: a reduce-scatter.

    What is sent: each rank's part to all others, forward; a summand of each part to its owner, backward.
    """
    n, dim = mesh.size(), dim % x.dim()
    whole = DTensor.from_local(x, mesh, [Shard(dim)], run_check=False).redistribute(placements=[Replicate()])
    early, late = whole.to_local(grad_placements=[Partial()]).unflatten(dim, (n, 2, -1)).unbind(dim + 1)
    return torch.cat([early, late.flip(dim)], dim).flatten(dim, dim + 1)


class ContextAttention(nn.Module):
    """The inner product of attention for a rank's two chunks of queries and everybody's keys and values.

    Each chunk reads the keys up to its own end only, so no work is done for keys in its future. Keys and values travel
    together: with grouped heads they are small beside the activations, and one all-gather a layer is simpler than a
    ring of sends.

    Args:
        inner: computes softmax(q k^T / sqrt(head_dim)) v under a mask.
        mesh: the ranks of axis cp.
    """

    def __init__(self, inner: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.inner, self.mesh = inner, mesh

    def forward(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        k: Float[Tensor, "batch kv_heads queries head_dim"],
        v: Float[Tensor, "batch kv_heads queries head_dim"],
        mask: Bool[Tensor, "batch 1 queries keys"] | None = None,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """`mask`: a row for each query of this rank, a column for every token of the sequence; None: causal."""
        n, rank, size = self.mesh.size(), self.mesh.get_local_rank(), q.shape[2] // 2
        k, v = gather_chunks(torch.cat([k, v], dim=1), self.mesh, 2).chunk(2, dim=1)
        parts = []
        for half, chunk in enumerate((rank, 2 * n - 1 - rank)):
            rows, end = slice(half * size, (half + 1) * size), (chunk + 1) * size
            if mask is not None:
                visible = mask[:, :, rows, :end]
            elif chunk == 0:
                visible = None  # as many keys as queries
            else:
                visible = causal_mask(torch.arange(end - size, end, device=q.device)[None], end)
            parts.append(self.inner(q[:, :, rows], k[:, :, :end], v[:, :, :end], visible))
        return torch.cat(parts, dim=2)


def apply_cp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Exchange the inner product of every layer for `ContextAttention`. Changed, and returned.

    The model is then called with a rank's part of tokens, positions and document ids (`chunk_positions`). What is sent,
    a layer: one all-gather of keys and values forward, one reduce-scatter of their gradients backward; once a forward
    pass, the document ids. Everything else in a Transformer looks at one token at a time.
    """
    visible: list[Tensor | None] = [None]

    def before_model(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        documents, positions = kwargs.pop("document_ids", None), kwargs["positions"]
        visible[0] = None
        if documents is not None:
            everybody = gather_chunks(documents, mesh, 1)
            keys = torch.arange(everybody.shape[1], device=documents.device)
            same = documents[:, :, None] == everybody[:, None, :]
            visible[0] = (same & (keys <= positions[:, :, None]))[:, None]
        return args, kwargs

    def before_layer(module: nn.Module, args: tuple) -> tuple:
        # As an argument, not as state: a recomputed layer must see the mask of its own micro-batch.
        x, cos, sin, _, *rest = args
        return (x, cos, sin, visible[0], *rest)

    model.register_forward_pre_hook(before_model, with_kwargs=True)
    for layer in model.layers.children():
        layer.register_forward_pre_hook(before_layer)
        layer.attention.inner = ContextAttention(layer.attention.inner, mesh)
    return model
