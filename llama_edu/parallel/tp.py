"""Tensor parallel: matrices cut by columns and rows in turn, between them the sequence, at the ends the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

__all__ = ["apply_tp", "parallel_cross_entropy"]


def apply_tp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divide a Transformer, or a stage of one, over the ranks of a mesh of one axis.

    What is sent, for N bytes of the residual stream over n ranks, by each rank:
        before attention and before the feed-forward half   all-gather of the sequence, (n - 1)/n N;
        after each                                          reduce-scatter of the summands, (n - 1)/n N;
        in the backward pass                                the same two, the other way round;
        at the ends                                         reduce-scatter of the embedding, all-gather before the
                                                            output; of the loss three numbers a token.

    Between the matrices each rank holds a part of the sequence (sequence parallel): norms and additions are divided
    too, and only there. The residual stream is a DTensor, so that its shape is the whole one everywhere; inside
    attention and feed-forward the tensors are plain, with fewer heads and columns. Logits come out cut along the
    vocabulary: see `parallel_cross_entropy`.

    Heads, key/value heads, `ffn_dim` and vocabulary must divide by the ranks: `ParallelPlan.check_model`. Fewer
    key/value heads than ranks are refused, not copied.

    Source: Shoeybi et al., arXiv 1909.08053; sequence parallel: Korthikanti et al., arXiv 2205.05198.
    """
    tied = model.cfg.tie_embeddings
    sequence = Shard(1)
    ends = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence, use_local_output=False),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, {name: style for name, style in ends.items() if getattr(model, name) is not None})
    if tied and model.output is not None and model.tok_embeddings is not None:
        model.output.weight = model.tok_embeddings.weight
    rest = (None,) * 5  # rotations, mask, cache and layer are the same on all ranks
    for layer in model.layers.children():
        styles = {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(
                input_layouts=(sequence, *rest), desired_input_layouts=(Replicate(), *rest)
            ),
            "attention.wo": RowwiseParallel(output_layouts=sequence, use_local_output=False),
            "ffn_norm": SequenceParallel(),
            "feed_forward": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(Replicate(),)),
            "feed_forward.w2": RowwiseParallel(output_layouts=sequence, use_local_output=False),
        }
        styles |= {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
        styles |= {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
        parallelize_module(layer, mesh, styles)
    return model


def parallel_cross_entropy(logits: Tensor, targets: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum of the cross-entropy of logits of which each rank has a part of the vocabulary. The same on all ranks.

    Each rank sends a maximum, a sum of exponentials and the score of the target for every token, instead of the logits.
    Both this function and the backward pass run inside `torch.distributed.tensor.parallel.loss_parallel()`.

    Args:
        logits: (rows, vocabulary), a DTensor or this rank's columns.
    """
    if not isinstance(logits, DTensor):
        logits = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False)
    return F.cross_entropy(logits, targets, reduction="sum").to_local()
