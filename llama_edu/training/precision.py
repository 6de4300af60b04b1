"""Matrix products in bfloat16 beside float32 weights: a copy of each matrix, made anew after every optimiser step.

`torch.autocast` keeps the activations between the products in float32 and rounds them before each product: the input of
`wq`, `wk` and `wv` three times, that of `w1` and `w3` twice, each rounded copy kept for the backward pass. Here the
residual stream itself is bfloat16, as in Llama's own training: nothing to round, and half as much to move and to keep.
Weights, their gradients, moments and the loss stay float32; norms and softmax compute in float32.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["bf16_products"]


class _Product(torch.autograd.Function):
    """x @ copy.T in bfloat16; the gradient of the weight is float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.dtype = weight.dtype
        return F.linear(x, copy)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, copy = ctx.saved_tensors
        grad_x = grad @ copy if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(ctx.dtype)
        return grad_x, grad_weight, None


class _Copies:
    """The bfloat16 copies of all weights, each made anew when its weight has changed."""

    def __init__(self) -> None:
        self.step = 0
        self._made: dict[nn.Module, tuple[Tensor, tuple[int, int]]] = {}

    def after_step(self, *_: object) -> None:
        """PyTorch counts the changes of a tensor in place, but not those by a fused optimiser."""
        self.step += 1

    def of(self, module: nn.Linear) -> Tensor:
        weight, (copy, made_at) = module.weight, self._made.get(module, (None, None))
        now = (self.step, weight._version)
        if made_at != now:
            with torch.no_grad():
                same_place = copy is not None and copy.device == weight.device
                copy = copy.copy_(weight) if same_place else weight.to(torch.bfloat16)
            self._made[module] = copy, now
        return copy

    def linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        return _Product.apply(x.to(torch.bfloat16), module.weight, self.of(module))


def _embed(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, embedding.weight).to(torch.bfloat16)


def bf16_products(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """Let a model compute in bfloat16 beside its float32 weights, on one device and without torch.compile.

    Names, parameters and the state dict stay as they are; call the model without autocast. The scores come out in
    float32, as always.

    Args:
        model: a `Transformer` with float32 weights. It is changed, and returned.
        optimizer: the one that changes the weights; its steps make the copies stale.
    """
    copies = _Copies()
    optimizer.register_step_post_hook(copies.after_step)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(copies.linear, module)
        elif isinstance(module, nn.Embedding):
            module.forward = partial(_embed, module)
    return model
