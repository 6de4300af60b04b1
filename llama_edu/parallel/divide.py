"""One function that divides a model in every way at once, in the order in which the ways rest on each other."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from llama_edu.errors import UserError
from llama_edu.parallel.compat import arrived
from llama_edu.parallel.cp import apply_cp
from llama_edu.parallel.dims import ParallelPlan
from llama_edu.parallel.fsdp import apply_fsdp, fsdp_mesh
from llama_edu.parallel.pp import Pipeline, cut_stages
from llama_edu.parallel.tp import apply_tp, head_mesh
from llama_edu.training.recompute import check_mode, compile_layers, compiler_recomputes, run_again
from llama_edu.training.recompute import recompute as apply_recompute

__all__ = ["parallelize"]


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: ParallelPlan,
    *,
    recompute: str = "none",
    compile: bool = False,
    bf16: bool = False,
) -> nn.Module:
    """Divide a Transformer over the ranks of a mesh. Returns this rank's part of it.

    Stages are cut first, then each stage's matrices (TP) and its attention (CP); then layers are told what to compute
    again and are compiled; FSDP comes last, around all of it.

    Args:
        model: whole, with the same weights on every rank, or on the meta device. It is changed.
        mesh: of `build_mesh(plan)`.
        recompute: "none", "selective" or "full"; see `llama_edu.training.recompute`.
        compile: compile each layer.
        bf16: compute in bfloat16 beside float32 parameters, gradients and sums.

    Returns:
        The model itself; with pp > 1 a `Pipeline`.

    Raises:
        UserError: the model cannot be divided so, the mesh is another plan's, or PyTorch cannot run the schedule.
    """
    names = mesh.mesh_dim_names or ()
    found = {axis: mesh.size(names.index(axis)) if axis in names else 1 for axis in ("pp", "cp", "tp")}
    wanted = {axis: getattr(plan, axis) for axis in found}
    if found != wanted or mesh.size() != plan.world_size:
        raise UserError(
            f"the mesh has {mesh.size()} ranks, {found}, and the plan {plan.world_size}, {wanted}: make the mesh by "
            "build_mesh(plan)"
        )
    plan.check_model(model.cfg)
    check_mode(recompute)
    plan.check_schedule(recompute, compile=compile)
    layers = plan.stage_layers(model.cfg.n_layers)
    rank = mesh["pp"].get_local_rank()
    stages = {i: part for i, part in enumerate(cut_stages(model, layers)) if i % plan.pp == rank}
    if plan.pp == 1:
        stages = {0: model}
    shards = fsdp_mesh(mesh)
    tp = mesh["tp"]  # one object for all: a compiled layer must not meet another of the same ranks
    heads = head_mesh(tp, model.cfg.n_kv_heads)
    dtype = torch.bfloat16 if bf16 else next(model.parameters()).dtype
    for stage in stages.values():
        if plan.tp > 1:
            apply_tp(stage, tp, heads)
        if plan.cp > 1:
            apply_cp(stage, mesh["cp"])
        if compile and plan.tp > 1:
            for layer in stage.layers.children():
                _compile_divided(layer, tp, recompute)
        elif compile:
            compile_layers(stage, recompute)
        else:
            apply_recompute(stage, recompute)
    if plan.pp == 1:
        return apply_fsdp(model, shards, reshard_after_forward=plan.reshard_after_forward, bf16=bf16)
    pipeline = Pipeline(
        stages,
        plan.stages,
        mesh["pp"],
        schedule=plan.schedule,
        micro_batches=plan.n_micro_batches,
        contiguous=plan.contiguous,
        tp=tp if plan.tp > 1 else None,
        dtype=dtype,
    )
    for stage in stages.values():
        apply_fsdp(stage, shards, reshard_after_forward=plan.reshard_after_forward, bf16=bf16)
    return pipeline


def _compile_divided(layer: nn.Module, tp: DeviceMesh, recompute: str) -> None:
    """Compile a layer under tensor parallel: only this rank's part of the residual stream crosses the border.

    What a compiled function takes and returns is then plain: of a DTensor's gradient PyTorch would have to guess, while
    it compiles, how it will be placed. Nor can a compiled function keep the mesh of its parameters for a second forward
    pass inside it. So "full" runs all of it again from outside, and "selective" is the compiler's own rule: keep what
    products and attention give, compute all else again.
    """
    whole = layer.forward

    def part(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return whole(DTensor.from_local(x, tp, [Shard(1)], run_check=False), *rest).to_local()

    compiled = torch.compile(part, dynamic=False)

    def forward(x: DTensor, *rest: object) -> DTensor:
        with compiler_recomputes(recompute == "selective"):  # it compiles at the first call
            y = compiled(arrived(x.to_local()), *rest)
        return DTensor.from_local(y, tp, [Shard(1)], run_check=False)

    layer.forward = run_again(forward) if recompute == "full" else forward
