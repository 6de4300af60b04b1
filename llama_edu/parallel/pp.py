"""Pipeline parallel: every rank has some of the layers, and micro-batches pass from rank to rank and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor, Shard

from llama_edu.parallel.compat import quiet, takes

__all__ = ["Pipeline", "cut_stages"]

_SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}


def cut_stages(model: nn.Module, layers: Sequence[int]) -> list[nn.Module]:
    """The stages of a pipeline, in order: Transformers that share the model's modules and lack what is not theirs.

    Parameters keep the names that they have in the whole model.

    Args:
        layers: how many layers each stage gets. The first stage has the embedding as well, the last one the final norm
            and the output.
    """
    names, stages, start = list(model.layers), [], 0
    for index, count in enumerate(layers):
        stage = copy.copy(model)
        for name, value in vars(model).items():
            if isinstance(value, dict):  # modules, buffers, hooks: its own tables of them
                stage.__dict__[name] = copy.copy(value)
        stage.layers = nn.ModuleDict({name: model.layers[name] for name in names[start : start + count]})
        if index > 0:
            stage.tok_embeddings = None
        if index < len(layers) - 1:
            stage.norm = stage.output = None
        stages.append(stage)
        start += count
    return stages


class Pipeline(nn.Module):
    """The stages of this rank, as one module whose parameters have the names of the whole model.

    Stage s lies on rank s modulo pp. What is sent, a micro-batch and stage: the residual stream forward, its gradient
    backward, each to one neighbour; with sequence parallel only this rank's part of it.

    Args:
        stages: this rank's stages by number, parallelised already.
        n_stages: of the whole pipeline.
        mesh: the ranks of axis pp.
        schedule, micro_batches: see `ParallelPlan`.
        tp: the ranks of axis tp, or None.
        dtype: of the residual stream.
    """

    def __init__(
        self,
        stages: dict[int, nn.Module],
        n_stages: int,
        mesh: DeviceMesh,
        *,
        schedule: str,
        micro_batches: int,
        tp: DeviceMesh | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        first, *_, last = [*stages.values(), *stages.values()]
        self.cfg = first.cfg
        self.tok_embeddings, self.norm, self.output = first.tok_embeddings, last.norm, last.output
        self.layers = nn.ModuleDict({name: layer for stage in stages.values() for name, layer in stage.layers.items()})
        self.stages = tuple(stages.items())  # a tuple: their parameters are registered above, under their full names
        self.n_stages, self.mesh, self.tp, self.dtype = n_stages, mesh, tp, dtype
        self.schedule, self.micro_batches = schedule, micro_batches
        self._running: dict[tuple, Any] = {}
        self._loss: Callable[[Tensor, Tensor], Tensor] | None = None
        for stage in stages.values():
            if tp is not None:
                stage.register_forward_pre_hook(self._enter)
                quiet("FSDP2-wrapped module .* returned a view")  # nobody adds to it in place
            stage.register_forward_hook(self._leave)

    @property
    def has_first(self) -> bool:
        """This rank has the embedding."""
        return self.stages[0][0] == 0

    @property
    def has_last(self) -> bool:
        """This rank has the output, and with it the loss."""
        return self.stages[-1][0] == self.n_stages - 1

    def step(self, loss: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, targets: Tensor, **kwargs: Tensor) -> None:
        """Run a batch forward and backward in micro-batches. The gradients are added to the parameters.

        Args:
            loss: (logits, targets) of a micro-batch -> what is differentiated; called on the rank of the last stage.
            kwargs: for every stage, such as positions and document ids; their first axis is cut into micro-batches.
        """
        self._loss = loss
        run = self._schedule(tuple(tokens.shape), tokens.device)
        args = (tokens,) if self.has_first else ()
        options = {"return_outputs": False} if takes(run.step, "return_outputs") else {}
        run.step(*args, target=targets if self.has_last else None, **options, **kwargs)

    @torch.no_grad()
    def forward(self, tokens: Tensor, **kwargs: Tensor) -> Tensor | None:
        """Logits of one batch on the rank with the last stage, None elsewhere; no gradient. Arguments as in `step`."""
        group, logits = self.mesh.get_group(), None
        rank, size = self.mesh.get_local_rank(), self.mesh.size()
        for index, stage in self.stages:
            x = tokens
            if index > 0:
                x = torch.empty(self._stream(tuple(tokens.shape)), dtype=self.dtype, device=tokens.device)
                dist.recv(x, dist.get_global_rank(group, (rank - 1) % size), group=group)
            x = stage(x, **kwargs)
            if index == self.n_stages - 1:
                logits = x
            else:
                dist.send(x.contiguous(), dist.get_global_rank(group, (rank + 1) % size), group=group)
        return logits

    def _stream(self, tokens: tuple[int, int]) -> tuple[int, int, int]:
        """Shape of the residual stream between two stages, on this rank."""
        return tokens[0], tokens[1] // (self.tp.size() if self.tp is not None else 1), self.cfg.dim

    def _schedule(self, shape: tuple[int, int], device: torch.device) -> Any:
        """The schedule for batches of this shape. PyTorch's stages have buffers of a fixed shape."""
        if shape in self._running:
            return self._running[shape]
        part = (shape[0] // self.micro_batches, shape[1])
        tokens = torch.empty(part, dtype=torch.int64, device="meta")
        stream = torch.empty(self._stream(part), dtype=self.dtype, device="meta", requires_grad=True)
        columns = self.cfg.vocab_size // (self.tp.size() if self.tp is not None else 1)
        logits = torch.empty((*part, columns), dtype=torch.promote_types(self.dtype, torch.float32), device="meta")
        logits.requires_grad_()
        stages = [
            PipelineStage(
                stage,
                index,
                self.n_stages,
                device,
                input_args=(tokens if index == 0 else stream,),
                output_args=(logits if index == self.n_stages - 1 else stream,),
                group=self.mesh.get_group(),
            )
            for index, stage in self.stages
        ]
        several = self.schedule in ("interleaved", "zero-bubble")
        run = _SCHEDULES[self.schedule](
            stages if several else stages[0],
            n_microbatches=self.micro_batches,
            loss_fn=lambda logits, targets: self._loss(logits, targets),
            scale_grads=False,  # the loss has been divided by the number of all targets
        )
        self._running[shape] = run
        return run

    def _enter(self, stage: nn.Module, args: tuple) -> tuple:
        """What comes from another stage is a part of the sequence."""
        (x,) = args
        return (x if stage.tok_embeddings is not None else DTensor.from_local(x, self.tp, [Shard(1)], run_check=False),)

    def _leave(self, stage: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out.to_local() if isinstance(out, DTensor) else out
