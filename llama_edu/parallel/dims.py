"""Into how many parts a run is cut along which axis, what cannot be cut so, and the mesh of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama_edu.config import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.parallel.compat import splits_backward
from llama_edu.parallel.planner import stage_layers

__all__ = ["ParallelPlan", "build_mesh", "data_axes", "size_of"]

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How the work of one model is divided among dp * pp * cp * tp ranks.

    Args:
        dp: data parallel: ranks with sequences of their own; FSDP divides parameters, gradients and moments among them.
        tp: tensor parallel: ranks that share every matrix and, between matrices, the sequence.
        pp: pipeline parallel: ranks that hold different layers.
        cp: context parallel: ranks that hold different parts of each sequence.
        dp_replicate: of the dp ranks, groups that hold a copy of everything instead of parts (HSDP); divides dp.
        micro_batches: parts in which a batch goes through the pipeline; 0: as many as it has stages.
        schedule: order of forward and backward passes in the pipeline. "interleaved" and "zero-bubble" want several
            virtual_stages. "zero-bubble" needs torch 2.13, and comes back to a layer later, for each of its matrices:
            a compiled one does all of its backward pass twice, one that is not cannot be recomputed.
        virtual_stages: stages a rank holds.
        contiguous: of the schedule "interleaved", micro-batches that pass through a stage before the rank turns to its
            next one, from pp (depth first) to micro_batches (breadth first): N of Llama 3 (section 3.3.2). With it
            micro_batches need not divide by pp. 0: pp.
        trim_ends: the first and the last stage get a layer less, as they hold embedding and output (Llama 3, arXiv
            2407.21783, section 3.3.2).
        layers: layers of each stage in order, instead of an even division; empty: even.
        reshard: let FSDP free a layer's parameters between its forward and backward pass: "always", "never", or "auto":
            only without a pipeline, where each micro-batch would gather them again. Llama 3 never did.

    Raises:
        UserError: a value is out of range, or two do not fit together.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp_replicate: int = 1
    micro_batches: int = 0
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    contiguous: int = 0
    trim_ends: bool = True
    layers: tuple[int, ...] = ()
    reshard: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "dp_replicate", "virtual_stages", "micro_batches", "contiguous"):
            least = 0 if name in ("micro_batches", "contiguous") else 1
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.schedule not in ("gpipe", "1f1b", "interleaved", "zero-bubble"):
            raise UserError(f"schedule is {self.schedule!r}; it must be gpipe, 1f1b, interleaved or zero-bubble")
        if self.reshard not in ("auto", "always", "never"):
            raise UserError(f"reshard is {self.reshard!r}; it must be auto, always or never")
        if self.dp % self.dp_replicate:
            raise UserError(f"dp {self.dp} does not divide by dp_replicate {self.dp_replicate}: change one")
        if self.virtual_stages > 1 and (self.pp == 1 or self.schedule in ("gpipe", "1f1b")):
            raise UserError(
                f"virtual_stages is {self.virtual_stages}, which needs pp of at least 2 (here {self.pp}) and the "
                f"schedule interleaved or zero-bubble (here {self.schedule})"
            )
        if self.layers and len(self.layers) != self.stages:
            raise UserError(f"layers names {len(self.layers)} stages, pp * virtual_stages makes {self.stages}")
        if self.pp > 1 and self.schedule in ("gpipe", "1f1b") and self.n_micro_batches < self.pp:
            raise UserError(
                f"micro_batches is {self.micro_batches}; the schedule {self.schedule} needs at least pp {self.pp}: "
                "raise it, or take a smaller pp"
            )
        if self.contiguous and (self.schedule != "interleaved" or self.pp == 1):
            raise UserError(
                f"contiguous is {self.contiguous}, which needs pp of at least 2 (here {self.pp}) and the schedule "
                f"interleaved (here {self.schedule})"
            )
        if self.contiguous and not self.pp <= self.contiguous <= self.n_micro_batches:
            raise UserError(
                f"contiguous is {self.contiguous}; it must lie between pp {self.pp} and micro_batches "
                f"{self.n_micro_batches}"
            )
        if self.schedule == "interleaved" and not self.contiguous and self.n_micro_batches % self.pp:
            raise UserError(
                f"micro_batches {self.micro_batches} does not divide by pp {self.pp}: change one, or set contiguous "
                f"to at least {self.pp}"
            )
        rounds = max(1, self.n_micro_batches // self.pp)
        if self.schedule == "zero-bubble" and self.n_micro_batches % rounds:
            raise UserError(
                f"micro_batches {self.micro_batches} does not divide into {rounds} rounds, which the schedule "
                f"zero-bubble makes of it with pp {self.pp}: take a multiple of pp"
            )

    @property
    def world_size(self) -> int:
        """Ranks that the plan needs."""
        return self.dp * self.pp * self.cp * self.tp

    @property
    def dp_shard(self) -> int:
        """Data parallel ranks among which FSDP divides one copy."""
        return self.dp // self.dp_replicate

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp * self.virtual_stages

    @property
    def n_micro_batches(self) -> int:
        """`micro_batches`, or what stands for 0."""
        return self.micro_batches or self.stages

    @property
    def reshard_after_forward(self) -> bool:
        """What `reshard` comes to."""
        return self.pp == 1 if self.reshard == "auto" else self.reshard == "always"

    def stage_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers of each stage, in order."""
        return self.layers or tuple(stage_layers(n_layers, self.stages, trim_ends=self.trim_ends))

    def check_world(self, world_size: int) -> None:
        """Raise UserError unless there are as many ranks as the plan needs."""
        if world_size != self.world_size:
            raise UserError(
                f"dp {self.dp} * pp {self.pp} * cp {self.cp} * tp {self.tp} makes {self.world_size} ranks, and "
                f"{world_size} are running: change the plan or the number of processes"
            )

    def check_model(self, cfg: LlamaConfig) -> None:
        """Raise UserError where the model cannot be divided so."""
        for name in ("n_heads", "ffn_dim", "vocab_size"):
            if getattr(cfg, name) % self.tp:
                way_out = "take another tp"
                if name == "vocab_size":
                    way_out += f", or a vocabulary of {-(-cfg.vocab_size // self.tp) * self.tp}"
                raise UserError(f"{name} {getattr(cfg, name)} does not divide by tp {self.tp}: {way_out}")
        if cfg.n_kv_heads % self.tp and self.tp % cfg.n_kv_heads:
            raise UserError(
                f"n_kv_heads {cfg.n_kv_heads} and tp {self.tp}: a rank holds whole key/value heads, or several ranks "
                "hold the same one, so one number must divide the other: take another tp"
            )
        if self.stages > 1:
            if not self.layers and cfg.n_layers + 2 * self.trim_ends < self.stages:
                raise UserError(f"{cfg.n_layers} layers do not fill {self.stages} pipeline stages: take a smaller pp")
            if sum(self.layers or (cfg.n_layers,)) != cfg.n_layers or min(self.layers or (0,)) < 0:
                raise UserError(f"layers {self.layers} have the sum {sum(self.layers)}; the model has {cfg.n_layers}")
            layers = self.stage_layers(cfg.n_layers)
            for rank in range(1, self.pp - 1):
                if not any(layers[rank :: self.pp]):
                    raise UserError(
                        f"layers {layers} leave rank {rank} of the {self.pp} of the pipeline without any: give it one, "
                        "or take a smaller pp"
                    )

    def check_schedule(self, recompute: str = "none", *, compile: bool = False) -> None:
        """Raise UserError where PyTorch cannot run the schedule over layers that are recomputed or compiled so."""
        if self.pp == 1 or self.schedule != "zero-bubble":
            return
        if not splits_backward():
            raise UserError(
                f"schedule is zero-bubble, which needs torch 2.13, and this is {torch.__version__}: install torch "
                "2.13, or take the schedule interleaved"
            )
        if self.reshard_after_forward:
            raise UserError(
                "reshard is always and schedule is zero-bubble, which needs a layer's parameters once more after its "
                "backward pass, when FSDP has freed them: gradients would be lost. Take reshard auto or never, or the "
                "schedule interleaved"
            )
        if recompute != "none" and not compile:
            raise UserError(
                f"recompute is {recompute} and schedule is zero-bubble, which comes back to a layer for each of its "
                "matrices and would compute it again every time: take recompute none, compile the layers, or take the "
                "schedule interleaved"
            )

    def check_sequence(self, seq_len: int) -> None:
        """Raise UserError where a sequence cannot be divided so."""
        if self.cp > 1 and seq_len % (2 * self.cp):
            raise UserError(
                f"a sequence of {seq_len} tokens does not divide by 2 * cp = {2 * self.cp}: change seq_len or cp"
            )
        if (seq_len // self.cp) % self.tp:
            raise UserError(
                f"the {seq_len // self.cp} tokens of a sequence that a rank holds do not divide by tp {self.tp}: "
                "change seq_len or tp"
            )

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Raise UserError where a batch of so many sequences, worked off in `accumulate` parts, cannot be divided."""
        if batch_size % (self.dp * accumulate):
            raise UserError(
                f"batch_size {batch_size} does not divide by dp {self.dp} * accumulate {accumulate}: change one"
            )
        part = batch_size // (self.dp * accumulate)
        if self.pp > 1 and part % self.n_micro_batches:
            raise UserError(
                f"the {part} sequences that enter the pipeline together do not divide into {self.n_micro_batches} "
                "micro_batches: change batch_size, accumulate or micro_batches"
            )


def build_mesh(plan: ParallelPlan, device_type: str = "cpu") -> DeviceMesh:
    """The ranks of a running process group on axes dp, pp, cp, tp: tp innermost, between the nearest neighbours.

    With dp_replicate the first axis falls into two, "dp_replicate" and "dp_shard". Every rank calls it.

    Raises:
        UserError: there are more or fewer ranks than the plan needs.

    Source: Llama 3, arXiv 2407.21783, section 3.3.2 and figure 5.
    """
    plan.check_world(dist.get_world_size() if dist.is_initialized() else 1)
    shape, names = (plan.pp, plan.cp, plan.tp), ("pp", "cp", "tp")
    if plan.dp_replicate == 1:
        return init_device_mesh(device_type, (plan.dp, *shape), mesh_dim_names=("dp", *names))
    sizes = (plan.dp_replicate, plan.dp_shard)
    return init_device_mesh(device_type, (*sizes, *shape), mesh_dim_names=("dp_replicate", "dp_shard", *names))


def data_axes(mesh: DeviceMesh) -> tuple[str, ...]:
    """Names of the axes, outermost first, along which the data of ranks differs by sequences."""
    return tuple(name for name in mesh.mesh_dim_names or () if name.startswith("dp"))


def size_of(mesh: DeviceMesh, axis: str) -> int:
    """Ranks along an axis; 1 where the mesh has none of this name."""
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(axis)) if axis in names else 1
