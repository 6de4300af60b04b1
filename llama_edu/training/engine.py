"""How a step is run: on one device here; another engine, handed to `train`, runs the same loop on many.

The loop holds the decisions (data, schedule, checkpoints, faults), the engine the machine. Every rank runs the same
loop with the same configuration; what one rank alone can know (a signal, a full disk) passes through `any`, `gather`
and `broadcast`, so that all ranks take the same way or raise the same sentence. Rank 0 alone writes files of the run,
apart from the tensors of a checkpoint, of which every rank writes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama_edu.data.tokens import Batch, TokenFile
from llama_edu.errors import UserError
from llama_edu.model.transformer import Transformer
from llama_edu.training.evaluation import evaluate
from llama_edu.training.loss import backward_batch
from llama_edu.training.optimizer import clip_in_step, make_optimizer
from llama_edu.training.precision import bf16_products
from llama_edu.training.recompute import compile_layers, recompute

if TYPE_CHECKING:
    from llama_edu.training.config import TrainConfig

__all__ = ["Engine", "agreed"]


class Engine:
    """One device. The methods that a subclass for many ranks overrides say what must be equal on all of them.

    Attributes:
        rank, world_size: this process, and how many there are.
        saving_group: process group in which a checkpoint is written. Background saving needs one of its own, that no
            other collective uses (gloo); None is the default group.
    """

    rank = 0
    world_size = 1
    saving_group: Any = None

    def device(self, wanted: str) -> torch.device:
        """The device of this rank; `wanted` is "auto", "cpu", "cuda" or "cuda:N"."""
        if wanted == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device is {wanted!r}, but this machine or this torch has no CUDA; use 'cpu' or 'auto'")
        try:
            return torch.device(wanted)
        except RuntimeError as error:
            raise UserError(f"device is {wanted!r}; it must be 'auto', 'cpu', 'cuda' or 'cuda:N'") from error

    def build(self, config: TrainConfig) -> nn.Module:
        """Fresh weights, the same on all ranks; every random generator has just been seeded with `config.seed`."""
        return Transformer(config.model)

    def prepare(self, model: nn.Module, config: TrainConfig) -> nn.Module:
        """What is trained: the model moved, recomputing, compiled, divided. Called once, on all ranks.

        A configuration that cannot be divided raises UserError here, the same on all ranks.

        Args:
            model: the whole model, with the same weights on all ranks; it may still be on the CPU.
        """
        model = model.to(self.device(config.device), torch.float32).train()
        return (compile_layers if config.compile else recompute)(model, config.recompute)

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        """The optimiser of this rank's parameters, with moments that exist from the start."""
        optimizer = make_optimizer(
            model, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        if config.precision == "bf16_copies":
            bf16_products(model, optimizer)
        return optimizer

    def share(self, first: int, count: int) -> tuple[int, int]:
        """Which sequences, (first, count), of the global batch `first .. first + count - 1` this rank reads.

        Raises UserError, on all ranks, where the batch cannot be shared out. The loop asks for every batch size of a
        run before its first step.
        """
        return first, count

    def backward(self, model: nn.Module, batch: Batch, count: Tensor, config: TrainConfig, *, autocast: bool) -> Tensor:
        """Add the gradient of this rank's part of sum(loss) / count to its parameters. Returns that part.

        Args:
            batch: this rank's sequences, on its device.
            count: number of targets of the whole global batch, the same on all ranks.
            autocast: run the matrix products in bfloat16.
        """
        return backward_batch(
            model,
            batch,
            count=count,
            accumulate=config.accumulate,
            document_mask=config.document_mask,
            autocast=autocast,
            z_loss=config.z_loss,
            chunk_size=config.loss_chunk or None,
        )

    def clip(self, model: nn.Module, max_norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
        """Scale the gradients down to a global norm of `max_norm`. Returns the norm before, the same on all ranks.

        Called before every step of the optimiser, which may do the scaling.
        """
        if optimizer.defaults.get("fused"):
            return clip_in_step(optimizer, max_norm)
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

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
        """Held-out loss in nats a token, the same on all ranks. See `llama_edu.training.evaluate`."""
        return evaluate(
            model,
            token_file,
            batch_size=config.batch_size // config.accumulate,
            seq_len=config.seq_len,
            max_batches=max_batches,
            document_mask=config.document_mask,
            autocast=autocast,
            chunk_size=config.loss_chunk or None,
            progress=progress,
        )

    def sample(self, model: nn.Module, sampler: Callable[[nn.Module, list[str]], list[str]], prompts: list[str]):
        """Texts that go on from the prompts, by the sampler that `train` was given; None where this engine cannot.

        Called on all ranks, because a divided model computes with all of them; only rank 0's texts are kept.
        """
        return sampler(model, prompts)

    def whole(self, model: nn.Module, config: TrainConfig) -> nn.Module | None:
        """The trained model, undivided, on rank 0; None on other ranks. Called on all ranks when a run is complete."""
        return model

    # --- what the ranks tell each other -------------------------------------------------------------------------------

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks that hold different data. All ranks get the same bits: decisions hang on it."""
        return x

    def any(self, flag: bool) -> bool:
        """True on all ranks if true on one. Called once a step, so it should be cheap."""
        return flag

    def gather(self, value: Any) -> list[Any]:
        """The plain values (JSON) of all ranks, by rank, on all ranks. Not called in an ordinary step."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value (JSON), on all ranks. Not called in an ordinary step."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    # --- what a checkpoint holds --------------------------------------------------------------------------------------

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Tensors under the names of the whole model's parameters: they fit however the model is later divided.

        The dict has the keys "model" and "optimizer"; a tensor may be a DTensor, and a rank may have only its part (a
        pipeline stage). The optimiser's settings are left out, the configuration has them.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        weights, moments = get_state_dict(model, optimizer, options=options)
        return {"model": weights, "optimizer": {k: v for k, v in moments.items() if isinstance(v, Tensor)}}

    def load_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]
    ) -> None:
        """Put back what `state` returned, with the numbers of a checkpoint read into it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        moments = get_optimizer_state_dict(model, optimizer, options=options) | state["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=moments, options=options)

    def snapshot(self, tensor: Tensor, buffer: Tensor | None) -> Tensor:
        """A copy in host memory that training does not touch, in `buffer`, an earlier copy, where there is one."""
        if buffer is None:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
        return buffer.copy_(tensor.detach())


@contextmanager
def agreed(engine: Engine) -> Iterator[None]:
    """What fails inside on one rank is raised on all, so that none waits for one that has gone.

    The block does this rank's own work: a collective inside it would wait for a rank that has already failed.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not engine.any(error is not None):
        return
    sentences = engine.gather(None if error is None else str(error))
    if error is not None:
        raise error
    rank, sentence = next((rank, text) for rank, text in enumerate(sentences) if text is not None)
    raise UserError(f"rank {rank}: {sentence}")
