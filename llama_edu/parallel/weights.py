"""Weights of a model that no rank holds whole: drawn or read a tensor at a time, of which each rank keeps its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama_edu.config import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.model.checkpoint import read_pretrained, tensor_shapes
from llama_edu.model.rope import rope_table
from llama_edu.model.transformer import Transformer, TransformerBlock
from llama_edu.parallel.pp import Pipeline

__all__ = ["allocate", "draw_weights", "keep_part", "read_weights"]


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a divided model that is still on the meta device memory for this rank's part, with nothing in it yet."""
    for part in dict(model.stages).values() if isinstance(model, Pipeline) else (model,):
        if next(part.parameters(), None) is not None:
            part.to_empty(device=device)
        else:  # a stage of no layers in the middle: only the tables of rotations
            part.rope_cos, part.rope_sin = (table.to(device) for table in rope_table(part.cfg))


@torch.no_grad()
def keep_part(parameter: Tensor, whole: Tensor) -> None:
    """Copy what this rank holds of a parameter out of the whole tensor. Nothing is sent."""
    if isinstance(parameter, DTensor):
        (chunk,) = parameter.__create_chunk_list__()
        whole = whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes))]
        parameter = parameter.to_local()
    parameter.copy_(whole)


def draw_weights(model: nn.Module, cfg: LlamaConfig) -> None:
    """Fill this rank's part with the numbers that `Transformer(cfg)` would have on the CPU, to the last bit.

    Every rank draws everything, in the order of one process and from its global generator, and keeps its part; beside
    that, it holds a layer or two parameters at most. The generator is left where one process leaves it.

    Args:
        model: divided, with memory (`allocate`).
    """
    own = _own_parameters(model, cfg)
    # The layers of PyTorch draw as they are made, before `init_weights` draws again.
    nn.Embedding(cfg.vocab_size, cfg.dim)
    for _ in range(cfg.n_layers):
        TransformerBlock(cfg)
    nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
    Transformer.init_weights(_OneByOne(cfg, lambda name, whole: keep_part(own[name], whole) if name in own else None))


def read_weights(model: nn.Module, cfg: LlamaConfig, path: str | Path) -> None:
    """Fill this rank's part with the weights of a Hugging Face or Meta folder, or of a Hub id.

    Every rank reads all files, a tensor at a time.

    Args:
        model: divided, with memory (`allocate`).

    Raises:
        UserError: the folder is no model, is damaged, or has another model than the configuration.
    """
    found, tensors = read_pretrained(path)
    theirs, ours = (dict(tensor_shapes(c)) for c in (found, cfg))
    if theirs != ours:
        name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
        raise UserError(
            f"{name} is {theirs.get(name, 'absent')} in {path} and {ours.get(name, 'absent')} in the configuration: "
            "give that of the folder"
        )
    for name in ("n_heads", "n_kv_heads", "head_dim", "rope_theta", "rope_scaling", "norm_eps"):
        if getattr(found, name) != getattr(cfg, name):
            raise UserError(
                f"{name} is {getattr(found, name)} in {path} and {getattr(cfg, name)} in the configuration: give that "
                "of the folder"
            )
    own = _own_parameters(model, cfg)
    for name, whole in tensors:
        if name in own:
            keep_part(own[name], whole)


def _own_parameters(model: nn.Module, cfg: LlamaConfig) -> dict[str, Tensor]:
    """This rank's parameters, a tied matrix under the name it has in a whole model."""
    own: dict[str, Tensor] = dict(model.named_parameters())
    if cfg.tie_embeddings and "output.weight" in own:  # on the last stage of a pipeline
        own.setdefault("tok_embeddings.weight", own["output.weight"])
    return own


class _OneByOne:
    """What `Transformer.init_weights` sees of a model: each parameter in its turn, at most two at a time."""

    def __init__(self, cfg: LlamaConfig, take: Callable[[str, Tensor], None]) -> None:
        self.cfg, self._take = cfg, take

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        with torch.device("meta"):
            whole = Transformer(self.cfg)
        for name, shape in [(name, p.shape) for name, p in whole.named_parameters()]:
            drawn = torch.empty(shape)
            yield name, drawn
            self._take(name, drawn)  # filled by now
            del drawn
