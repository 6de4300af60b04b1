"""Data parallel with everything divided: FSDP2 gathers a layer's parameters when it runs and scatters its gradient."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from llama_edu.parallel.compat import flatten_mesh, pair_mesh, sum_gradients

__all__ = ["apply_fsdp", "fsdp_mesh"]


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks among which one copy of the parameters is divided: dp and cp together, as one axis "fsdp".

    Ranks along cp read the same sequences, but different tokens of them: their gradients are summands like those of dp.
    With an axis "dp_replicate" it stands before: copies on the first axis, parts on the second (HSDP).
    """
    names = mesh.mesh_dim_names or ()
    if "dp_replicate" not in names:
        return flatten_mesh(mesh, ("dp", "cp"), "fsdp")
    flatten_mesh(mesh, ("dp_shard", "cp"), "fsdp")
    return pair_mesh(mesh, "dp_replicate", "fsdp")


def apply_fsdp(
    model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool = True, bf16: bool = False
) -> nn.Module:
    """Divide every parameter over a mesh: each layer one group, what lies outside the layers another.

    What is sent, of a layer's N bytes over n ranks, by each rank:
        before its forward pass    all-gather of the parameters, (n - 1)/n N;
        before its backward pass   the same again, if `reshard_after_forward` has freed them;
        after its backward pass    reduce-scatter of the gradient, (n - 1)/n N in float32;
        on a mesh of two axes      all-reduce of the rank's part of the gradient over the first.
    While a layer computes, the next one's parameters are on their way.

    Gradients are added, not averaged: the loss has been divided by the number of targets of all ranks.

    Args:
        model: has `layers`. Its parameters may be DTensors already (tensor parallel). Changed, and returned.
        mesh: one axis, or two: copies, then parts.
        reshard_after_forward: free a layer's parameters until its backward pass. Costs the second all-gather.
        bf16: gather and compute in bfloat16; parameters, their gradients and the reduce-scatter stay float32.

    Source: Zhao et al., arXiv 2304.11277; float32 reduction: Llama 3, arXiv 2407.21783, section 3.3.2.
    """
    policy = MixedPrecisionPolicy()
    if bf16:
        # Rotations come to a layer as float32 arguments, and stay so.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers.children():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            sum_gradients(module)
    return model
