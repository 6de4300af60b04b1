"""Matrix products in bfloat16 beside float32 weights: a copy of each matrix, made anew after every optimiser step.

`torch.autocast` keeps the activations between the products in float32 and rounds them before each product: the input of
`wq`, `wk` and `wv` three times, that of `w1` and `w3` twice, each rounded copy kept for the backward pass. Here the
residual stream itself is bfloat16, as in Llama's own training: nothing to round, and half as much to move and to keep.
Weights, their gradients, moments and the loss stay float32; norms and softmax compute in float32.
"""

from __future__ import annotations

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


class _Linear(nn.Linear):
    """Its buffer `bf16_weight` is the copy."""

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x.to(torch.bfloat16), self.weight, self.bf16_weight)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)  # .to(dtype) means the weight
        self.bf16_weight = self.bf16_weight.to(torch.bfloat16)
        return self


class _Embedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(torch.bfloat16)


class _Copies:
    """Keeps the copies equal to the weights."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.linears = linears
        self.versions = [-1] * len(linears)

    @torch.no_grad()
    def after_step(self, *_: object) -> None:
        for linear in self.linears:
            linear.bf16_weight.copy_(linear.weight)
        self.versions = [linear.weight._version for linear in self.linears]

    def before_forward(self, *_: object) -> None:
        """PyTorch counts the changes of a tensor in place, as by loading; but not those by a fused optimiser."""
        if self.versions != [linear.weight._version for linear in self.linears]:
            self.after_step()


def bf16_products(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """Let a model compute in bfloat16 beside its float32 weights, on one device.

    Names, parameters and the state dict stay as they are; call the model without autocast. The scores come out in
    float32, as always. The layers may be compiled (`layer.compile()`), the whole model may not: it looks before each
    forward pass whether weights were changed or loaded. It cannot see changes of `weight.data`, which PyTorch does not
    count: change weights in place under `torch.no_grad()`.

    Args:
        model: a `Transformer` with float32 weights. It is changed, and returned.
        optimizer: the one that changes the weights; its steps make the copies anew.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        linear.__class__ = _Linear
        linear.register_buffer("bf16_weight", linear.weight.detach().to(torch.bfloat16), persistent=False)
    copies = _Copies(linears)
    optimizer.register_step_post_hook(copies.after_step)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.__class__ = _Embedding
            # Not a hook of the model: `Transformer.hidden`, which generation calls, has none.
            module.register_forward_pre_hook(copies.before_forward)
    return model
