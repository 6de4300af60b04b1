"""Causal attention in bfloat16 as machine code, for processors that multiply such numbers; lesson 22 derives it.

The blocks of `attention.block_attention`, one key/value head at a time. What a product yields stays in float32 and in
the caches; only what the next product reads is rounded. The instruction multiplies two neighbours by two neighbours
and adds both products to a float32, so one side of a product lies in memory as pairs of what is summed over:

    scores  = q k^T          pairs along a row of k:    k turned, [pair, key]
    mixed   = weights v      pairs of keys:             v with two rows beside each other, [pair, feature]
    grad_v  = weights^T grad pairs of queries           (likewise grad, and the weights of two queries)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from llama_edu.native import F32, I32, I64, LANES, atomic_add, broadcast, compiled, exp, narrow, splat, vector

__all__ = ["attend", "attend_backward"]

_QUERIES = 64  # a block: its scores over 512 keys take 128 KiB
_TILE = 4  # rows of a product that are summed in registers at a time, for up to 64 columns


def _product(columns: int) -> Callable:
    """A numba function: out[i, c] = sum over s of a[i, s] . b[s, c], or that added; i < 4, c < 16 columns, s < n.

    An entry of a or b is a pair of bfloat16 in 32 bits. Each array is flat and comes with the place of its first entry;
    a with the distances between rows and between steps, b and out with those of their rows.
    """

    @intrinsic
    def product(typingctx, a, a_at, a_row, a_step, b, b_at, b_row, out, o_at, o_row, n, added):
        def codegen(context, at, signature, args):
            arrays = {i: context.make_array(signature.args[i])(context, at, args[i]).data for i in (0, 4, 7)}
            numbers = [at.sext(v, I64) if v.type != I64 else v for v in (args[i] for i in (1, 2, 3, 5, 6, 8, 9, 10))]
            a_at, a_row, a_step, b_at, b_row, o_at, o_row, n = numbers
            const, floats, pairs = (lambda v: ir.Constant(I64, v)), vector(F32), vector(I32)
            kind = ir.FunctionType(floats, [floats, pairs, pairs])
            dot = cgutils.get_or_insert_function(at.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
            place = lambda base, i, kind: at.bitcast(at.gep(base, [i]), kind.as_pointer())
            cells = [(i, c) for i in range(_TILE) for c in range(columns)]
            a_rows = [at.add(a_at, at.mul(a_row, const(i))) for i in range(_TILE)]
            o_rows = [at.add(o_at, at.mul(o_row, const(i))) for i in range(_TILE)]
            outs = [place(arrays[7], at.add(o_rows[i], const(LANES * c)), floats) for i, c in cells]
            first = [at.select(args[11], at.load(out, align=4), splat(F32, 0.0)) for out in outs]
            before = at.basic_block
            loop, after = at.append_basic_block("loop"), at.append_basic_block("after")
            at.branch(loop)
            at.position_at_end(loop)
            step = at.phi(I64)
            step.add_incoming(const(0), before)
            sums = [at.phi(floats) for _ in cells]
            here = at.add(b_at, at.mul(step, b_row))
            right = [at.load(place(arrays[4], at.add(here, const(LANES * c)), pairs), align=4) for c in range(columns)]
            here = at.mul(step, a_step)
            left = [broadcast(at, at.load(at.gep(arrays[0], [at.add(row, here)])), LANES) for row in a_rows]
            new = [at.call(dot, [total, left[i], right[c]]) for total, (i, c) in zip(sums, cells)]
            following = at.add(step, const(1))
            step.add_incoming(following, loop)
            for total, start, value in zip(sums, first, new):
                total.add_incoming(start, before)
                total.add_incoming(value, loop)
            at.cbranch(at.icmp_signed("<", following, n), loop, after)
            at.position_at_end(after)
            for out, value in zip(outs, new):
                at.store(value, out, align=4)
            return context.get_dummy_value()

        return types.void(a, a_at, a_row, a_step, b, b_at, b_row, out, o_at, o_row, n, added), codegen

    return product


_product_16, _product_32, _product_48, _product_64 = (_product(columns) for columns in (1, 2, 3, 4))


@compiled
def _multiply(a, a_row, a_step, b, b_row, out, o_row, rows, columns, n, added):
    """`_product` for as many rows and columns: rows up to the next multiple of 4, columns a multiple of 16."""
    whole = columns // 64 * 64
    for c in range(0, whole, 64):
        for i in range(0, rows, _TILE):
            _product_64(a, i * a_row, a_row, a_step, b, c, b_row, out, i * o_row + c, o_row, n, added)
    for i in range(0, rows, _TILE):
        to = i * o_row + whole
        if columns - whole == 48:
            _product_48(a, i * a_row, a_row, a_step, b, whole, b_row, out, to, o_row, n, added)
        elif columns - whole == 32:
            _product_32(a, i * a_row, a_row, a_step, b, whole, b_row, out, to, o_row, n, added)
        elif columns - whole == 16:
            _product_16(a, i * a_row, a_row, a_step, b, whole, b_row, out, to, o_row, n, added)


@compiled
def _turn(x, out, width):
    """out[p, j] = pair p of row j of x, for products that sum along a row."""
    n, half = x.shape
    for first in range(0, n, 16):
        if first + 16 <= n:
            for p in range(half):
                for j in range(16):
                    out[p * width + first + j] = x[first + j, p]
        else:
            for p in range(half):
                for j in range(first, n):
                    out[p * width + j] = x[j, p]


@compiled
def _join(x, first, last, out):
    """out[i, c] = number c of rows first + 2i and first + 2i + 1 of x, for products that sum over rows."""
    width, low, high = 2 * x.shape[1], np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    for i in range((last - first) // 2):
        even, odd, to = x[first + 2 * i], x[first + 2 * i + 1], out[i * width : (i + 1) * width]
        for p in range(even.size):
            to[2 * p] = (even[p] & low) | (odd[p] << np.uint32(16))
            to[2 * p + 1] = (even[p] >> np.uint32(16)) | (odd[p] & high)
    if (last - first) % 2:
        even, to = x[last - 1], out[(last - first) // 2 * width :]
        for p in range(even.size):
            to[2 * p], to[2 * p + 1] = even[p] & low, even[p] >> np.uint32(16)


@compiled
def _join_rows(even, odd, out):
    """Two rows of float32 as pairs of bfloat16."""
    halves = out.view(np.uint16)
    for j in range(out.size):
        out[j] = np.uint32(narrow(even[j], halves)) | np.uint32(narrow(odd[j], halves)) << np.uint32(16)


@compiled
def _copy(x, first, last, out):
    half = x.shape[1]
    for i in range(first, last):
        for p in range(half):
            out[(i - first) * half + p] = x[i, p]


@compiled
def _weigh(row, seen, scale, lanes):
    """Scores become e to the scaled score, less the largest; what is not seen becomes 0. Returns the sum."""
    for j in range(seen, row.size):
        row[j] = -np.inf
    for c in range(16):
        lanes[c] = row[c]
    for j in range(16, row.size, 16):
        for c in range(16):  # sixteen maxima side by side: one vector
            lanes[c] = row[j + c] if row[j + c] > lanes[c] else lanes[c]
    best = lanes[0]
    for c in range(16):
        best = max(best, lanes[c])
    best, total = best * scale, np.float32(0)
    for j in range(seen):
        e = exp(row[j] * scale - best)
        row[j] = e
        total += e
    for j in range(seen, row.size):
        row[j] = np.float32(0)
    return total


@compiled
def _forward(taken, q, k, v, out):
    """q, k, v (batch, heads, seq, d / 2) in pairs -> out (batch, seq, heads, d), by threads that take heads in turn."""
    batch, heads, seq, half = q.shape
    kv, d = k.shape[1], 2 * half
    group, wide = heads // kv, (seq + 63) // 64 * 64
    turned_k, joined_v = np.zeros(half * wide, np.uint32), np.zeros(wide // 2 * d, np.uint32)
    block, scores = np.zeros(_QUERIES * half, np.uint32), np.zeros(_QUERIES * wide, np.float32)
    weights, mixed = np.zeros(_QUERIES * wide // 2, np.uint32), np.zeros(_QUERIES * d, np.float32)
    short = weights.view(np.uint16)
    scale, lanes, totals = np.float32(1 / np.sqrt(d)), np.zeros(16, np.float32), np.zeros(_QUERIES, np.float32)
    while True:
        unit = atomic_add(taken, 0, 1)
        if unit >= batch * kv:
            return
        b, head = unit // kv, unit % kv
        _turn(k[b, head], turned_k, wide)
        _join(v[b, head], 0, seq, joined_v)
        for h in range(head * group, (head + 1) * group):
            for first in range(0, seq, _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                _copy(q[b, h], first, last, block)
                _multiply(block, half, 1, turned_k, wide, scores, wide, rows, keys, half, False)
                for i in range(rows):
                    row, to = scores[i * wide : i * wide + keys], short[i * wide : i * wide + keys]
                    totals[i] = _weigh(row, first + i + 1, scale, lanes)
                    for j in range(keys):
                        to[j] = narrow(row[j], to)
                _multiply(weights, wide // 2, 1, joined_v, d, mixed, d, rows, d, keys // 2, False)
                for i in range(rows):
                    to, part = out[b, first + i, h], np.float32(1) / totals[i]
                    for c in range(d):
                        to[c] = narrow(mixed[i * d + c] * part, to)


@compiled
def _backward(taken, grad, q, k, v, grad_q, grad_k, grad_v):
    """As `_forward`, from the gradient of its output; grad_k and grad_v are (batch, kv heads, seq, d)."""
    batch, heads, seq, half = q.shape
    kv, d = k.shape[1], 2 * half
    group, wide = heads // kv, (seq + 63) // 64 * 64
    turned_k, turned_v = np.zeros(half * wide, np.uint32), np.zeros(half * wide, np.uint32)
    joined_k = np.zeros(wide // 2 * d, np.uint32)
    q_block, g_block = np.zeros(_QUERIES * half, np.uint32), np.zeros(_QUERIES * half, np.uint32)
    joined_q, joined_g = np.zeros(_QUERIES * half, np.uint32), np.zeros(_QUERIES * half, np.uint32)
    scores, slopes = np.zeros(_QUERIES * wide, np.float32), np.zeros(_QUERIES * wide, np.float32)
    short_slopes = np.zeros(_QUERIES * wide // 2, np.uint32)
    joined_weights, joined_slopes = np.zeros_like(short_slopes), np.zeros_like(short_slopes)
    sum_k, sum_v = np.zeros(wide * d, np.float32), np.zeros(wide * d, np.float32)
    sum_q, scale, lanes = np.zeros(_QUERIES * d, np.float32), np.float32(1 / np.sqrt(d)), np.zeros(16, np.float32)
    short = short_slopes.view(np.uint16)
    while True:
        unit = atomic_add(taken, 0, 1)
        if unit >= batch * kv:
            return
        b, head = unit // kv, unit % kv
        _turn(k[b, head], turned_k, wide)
        _turn(v[b, head], turned_v, wide)
        _join(k[b, head], 0, seq, joined_k)
        sum_k[:], sum_v[:] = np.float32(0), np.float32(0)
        for h in range(head * group, (head + 1) * group):
            for first in range(0, seq, _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                pairs = (rows + 1) // 2
                _copy(q[b, h], first, last, q_block)
                _copy(grad[b, h], first, last, g_block)
                _join(q[b, h], first, last, joined_q)
                _join(grad[b, h], first, last, joined_g)
                _multiply(q_block, half, 1, turned_k, wide, scores, wide, rows, keys, half, False)
                _multiply(g_block, half, 1, turned_v, wide, slopes, wide, rows, keys, half, False)
                for i in range(rows):
                    seen, here = first + i + 1, i * wide
                    row, slope, to = scores[here : here + keys], slopes[here : here + keys], short[here : here + keys]
                    part, mean = np.float32(1) / _weigh(row, seen, scale, lanes), np.float32(0)
                    for j in range(seen):
                        mean += row[j] * slope[j]
                    mean *= part
                    for j in range(keys):
                        row[j] *= part
                    for j in range(seen):
                        slope[j] = row[j] * (slope[j] - mean) * scale
                    for j in range(seen, keys):
                        slope[j] = np.float32(0)
                    for j in range(keys):
                        to[j] = narrow(slope[j], to)
                if rows % 2:  # an odd row out is joined to nothing
                    scores[rows * wide : rows * wide + keys] = np.float32(0)
                    slopes[rows * wide : rows * wide + keys] = np.float32(0)
                for i in range(pairs):
                    here, even, odd = i * wide, 2 * i * wide, (2 * i + 1) * wide
                    to = joined_weights[here : here + keys]
                    _join_rows(scores[even : even + keys], scores[odd : odd + keys], to)
                    to = joined_slopes[here : here + keys]
                    _join_rows(slopes[even : even + keys], slopes[odd : odd + keys], to)
                _multiply(short_slopes, wide // 2, 1, joined_k, d, sum_q, d, rows, d, keys // 2, False)
                _multiply(joined_weights, 1, wide, joined_g, d, sum_v, d, keys, d, pairs, True)
                _multiply(joined_slopes, 1, wide, joined_q, d, sum_k, d, keys, d, pairs, True)
                for i in range(rows):
                    to = grad_q[b, first + i, h]
                    for c in range(d):
                        to[c] = narrow(sum_q[i * d + c], to)
        for j in range(seq):
            to_k, to_v = grad_k[b, head, j], grad_v[b, head, j]
            for c in range(d):
                to_k[c], to_v[c] = narrow(sum_k[j * d + c], to_k), narrow(sum_v[j * d + c], to_v)


@cache
def _openmp() -> Callable | None:
    """`GOMP_parallel` of the OpenMP that PyTorch has loaded, which runs a function in its threads; None without one."""
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None


def _run(kernel: Callable, units: int, *arrays: np.ndarray) -> None:
    """Call the kernel in as many threads as PyTorch has; they share the `units` of work among themselves.

    They are PyTorch's own threads where it uses OpenMP. Others would have to share the cores with these, which do not
    sleep at once after an operation but spin, to be quick for the next.
    """
    taken, threads = np.zeros(1, np.int64), torch.get_num_threads()
    errors: list[BaseException] = []

    def body(_: int | None) -> None:
        try:
            kernel(taken, *arrays)
        except BaseException as error:  # C would drop it; an interrupt from the keyboard may come here too
            errors.append(error)

    if threads == 1:
        kernel(taken, *arrays)
    elif _openmp() is not None:
        _openmp()(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(body, [None] * threads))
    if errors:
        raise errors[0]
    if taken[0] < units:
        raise RuntimeError(f"attention did {taken[0]} of {units} heads: its threads did not start")


def _pairs(x: Tensor) -> np.ndarray:
    """Neighbours of a row in 32 bits, without a copy where they lie beside each other on even places."""
    even = x.stride(-1) == 1 and not any(s % 2 for s in (*x.stride()[:-1], x.storage_offset()))
    return (x if even else x.clone(memory_format=torch.contiguous_format)).detach().view(torch.uint32).numpy()


def _bits(x: Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy()


def attend(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Causal attention in bfloat16, for a head_dim that is a multiple of 16, where `has_dots("bfloat16")`."""
    batch, heads, seq, d = q.shape
    out = q.new_empty(batch, seq, heads, d)
    _run(_forward, batch * k.shape[1], *map(_pairs, (q, k, v)), _bits(out))
    return out.transpose(1, 2)


def attend_backward(
    grad: Float[Tensor, "batch heads seq head_dim"],
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
) -> tuple[
    Float[Tensor, "batch heads seq head_dim"],
    Float[Tensor, "batch kv_heads seq head_dim"],
    Float[Tensor, "batch kv_heads seq head_dim"],
]:
    """Gradients of q, k and v, from that of the output of `attend`; the weights are computed again."""
    batch, heads, seq, d = q.shape
    grad_q, grad_k, grad_v = q.new_empty(batch, seq, heads, d), k.new_empty(k.shape), v.new_empty(v.shape)
    _run(_backward, batch * k.shape[1], *map(_pairs, (grad, q, k, v)), *map(_bits, (grad_q, grad_k, grad_v)))
    return grad_q.transpose(1, 2), grad_k, grad_v
