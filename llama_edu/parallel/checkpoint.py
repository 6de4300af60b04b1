"""What a divided model needs around its checkpoints: copies in host memory, and the model made whole again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llama_edu.config import LlamaConfig
from llama_edu.model.transformer import Transformer
from llama_edu.parallel.compat import quiet_gathers

__all__ = ["host_copy", "whole_model", "whole_state"]


def host_copy(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    """A copy of a tensor, or of this rank's part of a DTensor, in host memory that training does not touch.

    Args:
        buffer: an earlier copy, which is written over; None makes one.
    """
    if buffer is None:
        buffer = torch.empty_like(tensor.detach(), device="cpu")
    target, source = (t.to_local() if isinstance(t, DTensor) else t for t in (buffer, tensor.detach()))
    target.copy_(source)
    return buffer


def whole_state(model: nn.Module, mesh: DeviceMesh, control: Any) -> dict[str, Tensor] | None:
    """All parameters of a divided model, whole, by name, in host memory: on rank 0; None elsewhere. All ranks call it.

    Parameters are gathered one at a time, so that no rank but 0 holds more than its part and one whole parameter.

    Args:
        control: gloo process group of all ranks, over which stages of a pipeline send theirs.
    """
    quiet_gathers()
    stage, n_stages = mesh["pp"].get_local_rank(), mesh["pp"].size()
    sender = stage * mesh["cp"].size() * mesh["tp"].size()  # the stage's rank with 0 on all other axes
    rank, state = dist.get_rank(), {}
    state_dict = model.state_dict()
    shapes = [(name, tuple(t.shape), t.dtype) for name, t in state_dict.items()]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, shapes, group=control)
    for index in range(n_stages):
        source = index * mesh["cp"].size() * mesh["tp"].size()
        for name, shape, dtype in everybody[source]:
            if stage == index:
                tensor = state_dict[name].detach()
                tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
                if rank == 0:
                    state[name] = tensor.clone()
                elif rank == sender:
                    dist.send(tensor.contiguous(), 0, group=control)
            elif rank == 0:
                state[name] = torch.empty(shape, dtype=dtype)
                dist.recv(state[name], source, group=control)
    return state if rank == 0 else None


def whole_model(model: nn.Module, cfg: LlamaConfig, mesh: DeviceMesh, control: Any) -> Transformer | None:
    """The divided model as a plain Transformer in host memory on rank 0, None elsewhere. All ranks call it.

    `save_pretrained` writes it for other programs.
    """
    state = whole_state(model, mesh, control)
    if state is None:
        return None
    with torch.device("meta"):
        whole = Transformer(cfg)
    whole = whole.to_empty(device="cpu").to(next(iter(state.values())).dtype)
    whole.load_state_dict(state)
    return whole
