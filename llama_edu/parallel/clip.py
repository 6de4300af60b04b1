"""One norm of all gradients, wherever their parts lie, and one scale for all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

__all__ = ["clip_gradients"]


@torch.no_grad()
def clip_gradients(
    model: nn.Module, max_norm: float, *, stages: int = 1, counted_elsewhere: Sequence[nn.Parameter] = ()
) -> Tensor:
    """Scale the gradients of a divided model down to a global norm of `max_norm`. Returns the norm before.

    What is sent: one number, over all ranks, so that all get the same bits. A part of which n ranks hold a copy counts
    for 1/n on each.

    Args:
        model: this rank's part; its parameters may be DTensors over any axes of the mesh but that of the pipeline.
        stages: ranks among which different layers are shared out.
        counted_elsewhere: parameters of this rank that another stage holds too, and counts.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    local: list[Tensor] = []
    skipped = set(map(id, counted_elsewhere))
    parts: dict[int, list[Tensor]] = defaultdict(list)
    for p in parameters:
        grad, pieces = p.grad, 1
        if isinstance(grad, DTensor):
            if any(place.is_partial() for place in grad.placements):  # norms under TP without FSDP: summands
                grad = p.grad = grad.redistribute(placements=p.placements)
            sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
            pieces, grad = math.prod(n for place, n in sizes if not place.is_replicate()), grad.to_local()
        local.append(grad)
        if id(p) not in skipped:
            parts[pieces].append(grad)
    copies = dist.get_world_size() // stages
    squares = [get_total_norm(grads).double().square() * (pieces / copies) for pieces, grads in parts.items()]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    norm = total.sqrt().to(parameters[0].grad.dtype)
    # As torch.nn.utils.clip_grads_with_norm_ does, but for its wish that all DTensors have the same mesh.
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
