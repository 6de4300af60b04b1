"""silu(gate) * up and its derivatives as machine code: reads each number once; lesson 23 derives them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from llama_edu.native import (
    F32,
    I16,
    I32,
    LANES,
    atomic_add,
    compiled,
    exp2,
    in_threads,
    numbers,
    pointer,
    splat,
    to_bf16,
    vector,
)

__all__ = ["gated", "gated_backward"]

_NUMBERS = 8192  # that a thread takes at a time


class _Access:
    """Vectors of 16 numbers at one place of arrays of float32, or of the bits of bfloat16."""

    def __init__(self, context, b: ir.IRBuilder, signature, args) -> None:
        self.b, self.floats = b, signature.args[0].dtype == types.float32
        kind = vector(F32 if self.floats else I16)
        self.spot = lambda array: pointer(context, b, signature, args, array, len(args) - 1, kind)

    def read(self, array: int) -> ir.Value:
        x = self.b.load(self.spot(array), align=2)
        if self.floats:
            return x
        return self.b.bitcast(self.b.shl(self.b.zext(x, vector(I32)), splat(I32, 16)), vector(F32))

    def write(self, x: ir.Value, array: int) -> None:
        self.b.store(x if self.floats else to_bf16(self.b, x), self.spot(array), align=2)

    def sigmoid(self, x: ir.Value) -> ir.Value:
        """1 / (1 + e to the -x); for bfloat16 to 1e-4 of its value, a twentieth of what rounding may change."""
        b, one = self.b, splat(F32, 1.0)
        y = b.fmul(x, splat(F32, -1 / math.log(2)))
        for sign, limit in ((">", 200.0), ("<", -125.0)):  # 2 to the 200 is infinite, and one by that 0
            y = b.select(b.fcmp_ordered(sign, y, splat(F32, limit)), splat(F32, limit), y)  # NaN stays
        if self.floats:
            return b.fdiv(one, b.fadd(one, exp2(b, y)))
        kind = ir.FunctionType(vector(F32), [vector(F32), vector(F32), I16])
        reciprocal = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.rcp14.ps.512")
        return b.call(reciprocal, [b.fadd(one, exp2(b, y, degree=4)), one, ir.Constant(I16, -1)])


@intrinsic
def _gate_16(typingctx, gate, up, out, at):
    def codegen(context, b, signature, args):
        at = _Access(context, b, signature, args)
        x = at.read(0)
        at.write(b.fmul(b.fmul(x, at.sigmoid(x)), at.read(1)), 2)
        return context.get_dummy_value()

    return types.void(gate, up, out, types.int64), codegen


@intrinsic
def _gate_16_backward(typingctx, grad, gate, up, grad_gate, grad_up, at):
    def codegen(context, b, signature, args):
        at = _Access(context, b, signature, args)
        grad, x, one = at.read(0), at.read(1), splat(F32, 1.0)
        sigmoid = at.sigmoid(x)
        silu = b.fmul(x, sigmoid)
        slope = b.fadd(sigmoid, b.fmul(silu, b.fsub(one, sigmoid)))
        at.write(b.fmul(b.fmul(slope, at.read(2)), grad), 3)
        at.write(b.fmul(silu, grad), 4)
        return context.get_dummy_value()

    return types.void(grad, gate, up, grad_gate, grad_up, types.int64), codegen


@compiled
def _gate(taken, gate, up, out):
    while True:
        first = atomic_add(taken, 0, 1) * _NUMBERS
        if first >= gate.size:
            return
        for at in range(first, min(first + _NUMBERS, gate.size), LANES):
            _gate_16(gate, up, out, at)


@compiled
def _gate_backward(taken, grad, gate, up, grad_gate, grad_up):
    while True:
        first = atomic_add(taken, 0, 1) * _NUMBERS
        if first >= gate.size:
            return
        for at in range(first, min(first + _NUMBERS, gate.size), LANES):
            _gate_16_backward(grad, gate, up, grad_gate, grad_up, at)


def _run(kernel: Callable, inputs: tuple[Tensor, ...], outs: tuple[Tensor, ...]) -> None:
    gate = inputs[-1]
    if any(t.shape != gate.shape or t.dtype != gate.dtype for t in inputs) or gate.numel() % LANES:
        told = ", ".join(f"{tuple(t.shape)} in {str(t.dtype)[6:]}" for t in inputs)
        raise ValueError(f"the kernel gates tensors of one shape and dtype, a multiple of {LANES} numbers; got {told}")
    flat = (numbers(t.detach().contiguous()).reshape(-1) for t in (*inputs, *outs))
    in_threads(kernel, -(-gate.numel() // _NUMBERS), *flat)


def gated(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up of float32 or bfloat16, computed in float32 and rounded once."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _run(_gate, (gate, up), (out,))
    return out


def gated_backward(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The gradients of both arguments of `gated` from that of its result."""
    outs = tuple(torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    _run(_gate_backward, (grad, gate, up), outs)
    return outs
