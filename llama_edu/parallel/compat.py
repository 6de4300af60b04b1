"""The only place for names of torch that are private or differ between versions (2.11 to 2.13)."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

__all__ = [
    "arrived",
    "flatten_mesh",
    "own_schedule",
    "pair_mesh",
    "quiet",
    "quiet_gathers",
    "split_mesh",
    "splits_backward",
    "sum_gradients",
    "takes",
]


def arrived(x: Tensor) -> Tensor:
    """`x`; where a collective may still be writing it, a copy made when it is there, which is a plain tensor.

    A compiled function takes the waiting kind for a constant: it would get no gradient.
    """
    return x.clone() if isinstance(x, AsyncCollectiveTensor) else x


def flatten_mesh(mesh: DeviceMesh, axes: tuple[str, ...], name: str) -> DeviceMesh:
    """One axis made of several of a mesh, the first the outermost. Asked for again, the same is returned.

    Every rank of the mesh must ask, in the same order: it makes process groups.
    """
    return mesh[axes]._flatten(name)


def own_schedule(stages: list[Any], actions: list[list[Any]], **options: Any) -> Any:
    """PyTorch's runtime of a pipeline for a schedule that PyTorch does not have.

    Args:
        stages: each a `PipelineStage`, of this rank.
        actions: for each rank in order, what PyTorch writes as "0F3": forward (B: backward) of stage 0, micro-batch 3.
        options: of `ScheduleInterleaved1F1B` and its like.
    """
    from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

    run = _PipelineScheduleRuntime(stages, **options)
    run._prepare_schedule_with_comms({r: [_Action.from_str(str(a)) for a in mine] for r, mine in enumerate(actions)})
    return run


def pair_mesh(mesh: DeviceMesh, axis: str, flattened: str) -> DeviceMesh:
    """Two axes of a mesh, the second one that `flatten_mesh` made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        return mesh[axis, flattened]


def split_mesh(mesh: DeviceMesh, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of one axis as one of several, the first the outermost. Its root stays the same, as FSDP wants it.

    Every rank of the mesh must ask, in the same order: it makes process groups.
    """
    return mesh._unflatten(0, sizes, names)


def splits_backward() -> bool:
    """Whether PyTorch's pipeline can compute the gradients of weights apart from those of inputs, as zero-bubble does.

    Before 2.13 it lost the nodes of functions written in Python between the two, and counted gradients twice where
    several nodes lead to one weight.
    """
    return torch.__version__ >= (2, 13)


def quiet(message: str) -> None:
    """Do not print this warning of torch (a regular expression for its beginning)."""
    warnings.filterwarnings("ignore", message=message)


def quiet_gathers() -> None:
    """Do not tell that a parameter divided along two axes is gathered along one after the other."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def sum_gradients(module: FSDPModule) -> None:
    """Let the reduce-scatter of a `fully_shard` module add gradients instead of averaging them."""
    if hasattr(module, "set_gradient_divide_factor"):
        module.set_gradient_divide_factor(1.0)
    else:
        module.set_reduce_scatter_divide_factor(1.0)
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor


def takes(function: Any, name: str) -> bool:
    """Whether a function of this torch has an argument of this name."""
    return name in inspect.signature(function).parameters
