"""The engine that runs a training step on many ranks: same loop, same data order, same numbers as one process."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_edu.data.tokens import IGNORE, Batch, TokenFile, sequential_batches
from llama_edu.errors import UserError
from llama_edu.model.transformer import Transformer
from llama_edu.parallel.checkpoint import host_copy, whole_model
from llama_edu.parallel.clip import clip_gradients
from llama_edu.parallel.cp import chunk_positions
from llama_edu.parallel.dims import ParallelPlan, build_mesh
from llama_edu.parallel.divide import parallelize
from llama_edu.parallel.pp import Pipeline
from llama_edu.parallel.resilience import attempt_store, limit_waiting
from llama_edu.parallel.tp import parallel_cross_entropy
from llama_edu.parallel.weights import allocate, draw_weights, read_weights
from llama_edu.training.config import TrainConfig
from llama_edu.training.engine import Engine, agreed
from llama_edu.training.optimizer import make_optimizer
from llama_edu.training.utilisation import has_bf16

__all__ = ["ParallelEngine", "join_ranks"]

_TIED = ("tok_embeddings.weight", "output.weight")


def join_ranks(timeout: float = 600.0) -> None:
    """Make this process a rank: of the group that torchrun describes in the environment, or the only one of its own.

    Args:
        timeout: seconds after which a collective that a rank does not join fails.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = timedelta(seconds=timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = attempt_store(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)


class ParallelEngine(Engine):
    """A step on all ranks of a `ParallelPlan`. The process group must be running (`join_ranks`), or is begun here.

    A batch's sequences are shared out over dp; the ranks along cp, pp and tp read the same ones, and cp takes its part
    of each. The loss is divided by the targets of all ranks, and gradients are added: the sum is the gradient of one
    process but for the order of additions.

    Args:
        plan: how the work is divided.
        timeout: seconds after which a collective that a rank does not join fails.
        weights: folder or Hub id of a pretrained model to start from, in place of fresh weights. No rank holds all of
            it, as it would with a model handed to `train`.

    Raises:
        UserError: there are more or fewer ranks than the plan needs.
    """

    def __init__(self, plan: ParallelPlan, *, timeout: float = 600.0, weights: str | Path | None = None) -> None:
        join_ranks(timeout)
        self.timeout, self.weights = timeout, weights
        self.plan, self.rank, self.world_size = plan, dist.get_rank(), dist.get_world_size()
        plan.check_world(self.world_size)
        # Small things travel between the hosts, on a group that no tensor of the step can block.
        self._control = dist.new_group(backend="gloo")
        self.saving_group = dist.new_group(backend="gloo")
        self._device: torch.device | None = None
        self._mesh: dist.DeviceMesh | None = None

    def device(self, wanted: str) -> torch.device:
        device = super().device(wanted)
        if device.type == "cuda":
            if device.index not in (None, torch.cuda.current_device()):
                raise UserError(f"device is {wanted!r}; with several ranks each takes its own: say 'cuda' or 'auto'")
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        return device

    @property
    def mesh(self) -> dist.DeviceMesh:
        """The ranks, on the axes of the plan."""
        if self._mesh is None:
            self._mesh = build_mesh(self.plan, (self._device or self.device("auto")).type)
        return self._mesh

    def build(self, config: TrainConfig) -> nn.Module:
        """A model without weights: `prepare` draws those of one process, or reads `weights`, and keeps a part."""
        with torch.device("meta"):
            return Transformer(config.model)

    def prepare(self, model: nn.Module, config: TrainConfig) -> nn.Module:
        """See `Engine.prepare`. A model on the meta device gets its weights here."""
        plan, device = self.plan, self.device(config.device)
        self._cfg = model.cfg
        plan.check_model(model.cfg)
        plan.check_sequence(config.seq_len)
        for size in (config.batch_size, *(size for _, size in config.batch_ramp)):
            plan.check_batch(size, config.accumulate)
        first = next(model.parameters())
        if not first.is_meta:
            model = model.to(device, torch.promote_types(first.dtype, torch.float32))
        divided = parallelize(
            model.train(),
            self.mesh,
            plan,
            recompute=config.recompute,
            compile=config.compile,
            bf16=config.precision.startswith("bf16") or (config.precision == "auto" and has_bf16(device)),
        )
        if first.is_meta:
            allocate(divided, device)
            if self.weights is None:
                draw_weights(divided, model.cfg)
            else:
                with agreed(self):  # the disk of one host may fail
                    read_weights(divided, model.cfg, self.weights)
        limit_waiting(self.timeout)  # the groups of the mesh are all there now
        return divided

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        """As on one device. FSDP makes the bfloat16 copies of a precision that asks for them."""
        optimizer = make_optimizer(
            model, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        # The fused step takes DTensors of one mesh at a time, and shared key/value heads have another.
        groups = []
        for group in optimizer.param_groups:
            meshes = defaultdict(list)
            for p in group["params"]:
                meshes[p.device_mesh].append(p)
            groups += [group | {"params": parameters} for parameters in meshes.values()]
        optimizer.param_groups = groups
        return optimizer

    def share(self, first: int, count: int) -> tuple[int, int]:
        if count % self.plan.dp:
            raise UserError(f"a batch of {count} sequences does not divide by dp {self.plan.dp}: change one")
        each = count // self.plan.dp
        # dp is the outermost axis.
        return first + self.rank // (self.world_size // self.plan.dp) * each, each

    def backward(self, model: nn.Module, batch: Batch, count: Tensor, config: TrainConfig, *, autocast: bool) -> Tensor:
        """See `Engine.backward`. `autocast` is not used: FSDP computes in bfloat16 where the configuration says so."""
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        total, scale = torch.zeros((), device=batch.tokens.device, dtype=dtype), count.to(dtype).reciprocal()
        for tokens, targets, documents in zip(*(t.chunk(config.accumulate) for t in batch)):
            tokens, targets, kwargs = self._part(tokens, targets, documents if config.document_mask else None)
            seen: list[Tensor] = []
            with self._without_output(model, config) as output:
                loss = partial(self._loss, output=output, scale=scale, config=config, seen=seen)
                if isinstance(model, Pipeline):
                    model.step(loss, tokens, targets, **kwargs)
                else:
                    loss(model(tokens, **kwargs), targets).backward()
            total += sum(seen)
        return self._sum_of_parts(total)

    def _part(self, tokens: Tensor, targets: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor, dict]:
        """This rank's tokens of its sequences, their targets, and what else the model must know."""
        kwargs: dict[str, Tensor] = {} if documents is None else {"document_ids": documents}
        if self.plan.cp == 1:
            return tokens, targets, kwargs
        mine = chunk_positions(tokens.shape[1], self.plan.cp)[self.mesh["cp"].get_local_rank()].to(tokens.device)
        kwargs = {name: t[:, mine] for name, t in kwargs.items()}
        # A row for each sequence: a pipeline cuts it into micro-batches like everything else.
        return tokens[:, mine], targets[:, mine], kwargs | {"positions": mine.expand(len(tokens), -1)}

    @contextmanager
    def _without_output(self, model: nn.Module, config: TrainConfig) -> Iterator[nn.Module | None]:
        """With `loss_chunk` the model returns what its output matrix would read, and the loss gets the matrix."""
        last = model.stages[-1][1] if isinstance(model, Pipeline) else model
        output = last.output
        if not config.loss_chunk or output is None:
            yield None
            return
        last.output, last.without = None, output  # still a part of it: a pipeline asks a stage for its parameters
        try:
            yield output
        finally:
            last.output = output
            del last.without

    def _loss(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        output: nn.Module | None,
        scale: Tensor | float,
        config: TrainConfig,
        seen: list[Tensor],
    ) -> Tensor:
        """What is differentiated. Its cross-entropy is appended to `seen`. FSDP leaves the output matrix gathered."""
        objective, loss = parallel_cross_entropy(
            x,
            targets,
            self.mesh["tp"],
            weight=None if output is None else output.weight,
            chunk_size=config.loss_chunk,
            z_loss=config.z_loss,
            scale=scale,
        )
        seen.append(loss)
        return objective

    def _sum_of_parts(self, x: Tensor) -> Tensor:
        """Sum over the ranks that share sequences: parts of them along cp, and the last stage of pp."""
        for axis in ("cp", "pp"):
            if self.mesh[axis].size() > 1:
                dist.all_reduce(x, group=self.mesh[axis].get_group())
        return x

    def clip(self, model: nn.Module, max_norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
        counted_elsewhere = ()
        if isinstance(model, Pipeline) and model.tied is not None:
            model.add_tied_gradients()
            counted_elsewhere = () if model.has_first else (model.tied,)
        return clip_gradients(model, max_norm, stages=self.plan.pp, counted_elsewhere=counted_elsewhere)

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        token_file: TokenFile,
        config: TrainConfig,
        *,
        max_batches: int | None,
        autocast: bool,
        progress: bool,
    ) -> float:
        """Each dp-th batch goes to a dp rank; losses are added in the order of the batches, as one process does.

        A rank reads as many sequences at a time as in training, whose memory is what there is.
        """
        plan, ranks_of_one = self.plan, self.world_size // self.plan.dp
        dp, at = plan.dp, self.rank // ranks_of_one
        size = config.batch_size // config.accumulate
        rows = max(1, size // (dp * (plan.n_micro_batches if plan.pp > 1 else 1)))
        batches = sequential_batches(token_file, size, config.seq_len, max_batches=max_batches)
        was_training = model.training
        model.eval()
        losses, turns, counts = [], [], 0
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        for turn in self._turns(batches, dp):
            turns.append(len(turn))
            batch = Batch(*(t.to(self._device) for t in turn[min(at, len(turn) - 1)]))
            counts += sum(int((b.targets != IGNORE).sum()) for b in turn)
            loss = torch.zeros((), device=self._device, dtype=dtype)
            for part in map(Batch, *(t.split(rows) for t in batch)):
                tokens, targets, kwargs = self._part(
                    part.tokens, part.targets, part.document_ids if config.document_mask else None
                )
                with self._without_output(model, config) as output:
                    x, seen = model(tokens, **kwargs), []
                    if x is not None:
                        self._loss(x, targets, output=output, scale=1.0, config=config, seen=seen)
                loss += sum(seen)
            losses.append(self._sum_of_parts(loss).item())
        model.train(was_training)
        everybody = self.gather(losses)
        total = 0.0
        for i, n in enumerate(turns):
            for r in range(n):
                total += everybody[r * ranks_of_one][i]
        return total / counts

    @staticmethod
    def _turns(batches: Any, size: int) -> Any:
        turn: list[Batch] = []
        for batch in batches:
            turn.append(batch)
            if len(turn) == size:
                yield turn
                turn = []
        if turn:
            yield turn

    def sample(self, model: nn.Module, sampler: Callable[[nn.Module, list[str]], list[str]], prompts: list[str]):
        """Rank 0 gathers the whole model and writes: generation is no forward pass, which a divided model needs."""
        whole = whole_model(model, self._cfg, self.mesh, self._control)
        texts = None if whole is None else sampler(whole.eval(), prompts)
        self.barrier()
        return texts

    def whole(self, model: nn.Module, config: TrainConfig) -> nn.Module | None:
        return whole_model(model, config.model, self.mesh, self._control)

    # --- what the ranks tell each other -------------------------------------------------------------------------------

    def total(self, x: Tensor) -> Tensor:
        """One rank for each part of the data counts, and all get the result of the same sum."""
        others = self.rank % (self.world_size // self.plan.dp)
        x = torch.zeros_like(x) if others else x.clone()
        dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._control)
        return bool(found)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self._control)

    # --- what a checkpoint holds --------------------------------------------------------------------------------------

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """See `Engine.state`. Both copies of a tied matrix have the names of one process, and are written once."""
        state = super().state(model, optimizer)
        if isinstance(model, Pipeline) and model.tied is not None:
            matrix = next(t for name, t in state["model"].items() if name in _TIED)
            state["model"] |= dict.fromkeys(_TIED, matrix)
            moments = state["optimizer"].items()
            state["optimizer"] = {name.replace(".output.", ".tok_embeddings."): t for name, t in moments}
        return state

    def load_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]
    ) -> None:
        if isinstance(model, Pipeline) and model.tied is not None:
            moments = state["optimizer"]
            if model.has_last:
                moments = {name.replace(".tok_embeddings.", ".output."): t for name, t in moments.items()}
            state = {"model": {name: state["model"][name] for name in model.state_dict()}, "optimizer": moments}
        super().load_state(model, optimizer, state)

    def snapshot(self, tensor: Tensor, buffer: Tensor | None) -> Tensor:
        return host_copy(tensor, buffer)
