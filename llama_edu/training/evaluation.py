"""Held-out loss, in nats a token and in bits a byte."""

from __future__ import annotations

import math

import torch
from torch import nn

from llama_edu.data.tokens import IGNORE, TokenFile, sequential_batches
from llama_edu.training.loss import next_token_loss

__all__ = ["bits_per_byte", "evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    token_file: TokenFile,
    *,
    batch_size: int,
    seq_len: int,
    max_batches: int | None = None,
    document_mask: bool = False,
    autocast: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
) -> float:
    """Mean loss in nats a token, each window of `seq_len` tokens read from its own start.

    Args:
        max_batches: use only so many batches, spread evenly over the file; None reads all of it.
        autocast: run the matrix products in bfloat16.
        chunk_size: positions whose scores exist at a time; None computes all of a batch at once.
        progress: show a progress bar.

    Raises:
        ValueError: max_batches is less than 1.
    """
    from tqdm import tqdm

    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}; it must be at least 1, or None for all of the text")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    n_batches = math.ceil((token_file.n_tokens - 1) / (batch_size * seq_len))
    bar = tqdm(
        sequential_batches(token_file, batch_size, seq_len, max_batches=max_batches),
        desc="evaluating",
        unit="batch",
        total=n_batches if max_batches is None else min(n_batches, max_batches),
        leave=False,
        disable=None if progress else True,
    )
    try:
        for batch in bar:
            tokens, targets, documents = (t.to(device) for t in batch)
            documents = documents if document_mask else None
            loss = next_token_loss(model, tokens, targets, documents, autocast=autocast, chunk_size=chunk_size)
            total += loss.item()
            count += int((batch.targets != IGNORE).sum())
    finally:
        model.train(was_training)
    return total / count


def bits_per_byte(loss: float, token_file: TokenFile) -> float:
    """Nats a token into bits a byte of the text: comparable between tokenizers, and with compressors."""
    return loss * token_file.n_tokens / (math.log(2) * token_file.n_bytes)
