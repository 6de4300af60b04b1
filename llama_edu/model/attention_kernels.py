"""Causal attention as machine code, for processors with long enough vectors; lesson 22 derives it.

The blocks of `attention.block_attention`, one key/value head at a time, so that what is between the products stays in
the caches. Sums are float32.

In bfloat16, what the next product reads is rounded. The instruction multiplies two neighbours by two neighbours and
adds both products to a float32, so one side of a product lies in memory as pairs of what is summed over:

    scores  = q k^T          pairs along a row of k:    k turned, [pair, key]
    mixed   = weights v      pairs of keys:             v with two rows beside each other, [pair, feature]
    grad_v  = weights^T grad pairs of queries           (likewise grad, and the weights of two queries)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
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
    I64,
    LANES,
    atomic_add,
    broadcast,
    compiled,
    exp,
    in_threads,
    largest,
    splat,
    to_bf16,
    vector,
)

__all__ = ["attend", "attend_backward"]

_QUERIES = 64  # a block: its scores over 512 keys take 128 KiB
_TILE = 4  # rows of a product that are summed in registers at a time, for up to 64 columns


def _product(columns: int) -> Callable:
    """A numba function: out[i, c] = sum over s of a[i, s] . b[s, c], or that added; i < 4, c < 16 columns, s < n.

    An entry of a or b is a float32, or a pair of bfloat16 in 32 bits. Each array is flat and comes with the place of
    its first entry; a with the distances between rows and between steps, b and out with those of their rows.
    """

    @intrinsic
    def product(typingctx, a, a_at, a_row, a_step, b, b_at, b_row, out, o_at, o_row, n, added):
        def codegen(context, at, signature, args):
            arrays = {i: context.make_array(signature.args[i])(context, at, args[i]).data for i in (0, 4, 7)}
            numbers = [at.sext(v, I64) if v.type != I64 else v for v in (args[i] for i in (1, 2, 3, 5, 6, 8, 9, 10))]
            a_at, a_row, a_step, b_at, b_row, o_at, o_row, n = numbers
            const, floats = (lambda v: ir.Constant(I64, v)), vector(F32)
            floating = signature.args[0].dtype == types.float32
            entries = floats if floating else vector(I32)
            name = "llvm.fma.v16f32" if floating else "llvm.x86.avx512bf16.dpbf16ps.512"
            kind = ir.FunctionType(floats, [floats, entries, entries])
            add = cgutils.get_or_insert_function(at.module, kind, name)
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
            spots = [at.add(here, const(LANES * c)) for c in range(columns)]
            right = [at.load(place(arrays[4], spot, entries), align=4) for spot in spots]
            here = at.mul(step, a_step)
            left = [broadcast(at, at.load(at.gep(arrays[0], [at.add(row, here)])), LANES) for row in a_rows]
            sort = (lambda total, x, y: (x, y, total)) if floating else (lambda *args: args)
            new = [at.call(add, sort(total, left[i], right[c])) for total, (i, c) in zip(sums, cells)]
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
def _tile(a, a_at, a_row, a_step, b, b_at, b_row, out, o_at, o_row, n, added, columns):
    """`_product` for as many columns, or 64 if these are more."""
    if columns > 48:
        _product_64(a, a_at, a_row, a_step, b, b_at, b_row, out, o_at, o_row, n, added)
    elif columns > 32:
        _product_48(a, a_at, a_row, a_step, b, b_at, b_row, out, o_at, o_row, n, added)
    elif columns > 16:
        _product_32(a, a_at, a_row, a_step, b, b_at, b_row, out, o_at, o_row, n, added)
    else:
        _product_16(a, a_at, a_row, a_step, b, b_at, b_row, out, o_at, o_row, n, added)


# The three products with the table of scores, in which row i of a block is query first + i and column j is key j. What
# lies in the future of all rows of a tile is left out. `per` is how many keys or queries an entry holds.


@compiled
def _scores(block, turned, n, out, wide, rows, first):
    """out[i, j] = query i of the block times key j, of n entries each."""
    for j in range(0, first + rows, 64):
        for i in range(0, rows, _TILE):
            keys = first + i + _TILE - j
            if keys > 0:
                _tile(block, i * n, n, 1, turned, j, wide, out, i * wide + j, wide, n, False, keys)


@compiled
def _mix(weights, row, per, b, d, out, rows, first):
    """out[i] = the sum over keys j of weights[i, j] . b[j]; weights have `row` entries from row to row."""
    for c in range(0, d, 64):
        for i in range(0, rows, _TILE):
            n = (first + i + _TILE + per - 1) // per
            _tile(weights, i * row, row, 1, b, c, d, out, i * d + c, d, n, False, d - c)


@compiled
def _gather(weights, row, per, b, d, sums, rows, first):
    """Add to sums[j] the sum over queries i of weights[i, j] . b[i]; weights have `row` entries from row to row."""
    for c in range(0, d, 64):
        for j in range(0, first + rows, _TILE):
            i = max(0, j - first) // per
            n = (rows + per - 1) // per - i
            _tile(weights, i * row + j, 1, row, b, i * d + c, d, sums, j * d + c, d, n, True, d - c)


# Loops that the compiler turns into vectors do up to 256 numbers a turn, and those left over one by one. A row of q has
# 64, so what is done to rows of it is written in vectors here.


def _place(context, b: ir.IRBuilder, signature, args, array: int, at: int, kind: ir.Type) -> ir.Value:
    """A pointer to `kind` at place args[at] of args[array]."""
    data = context.make_array(signature.args[array])(context, b, args[array]).data
    return b.bitcast(b.gep(data, [args[at]]), kind.as_pointer())


@intrinsic
def _move(typingctx, x, x_at, out, o_at):
    """Copy 8 entries."""

    def codegen(context, b, signature, args):
        source, to = (_place(context, b, signature, args, i, i + 1, vector(I32, 8)) for i in (0, 2))
        b.store(b.load(source, align=4), to, align=4)
        return context.get_dummy_value()

    return types.void(x, x_at, out, o_at), codegen


@intrinsic
def _join(typingctx, even, e_at, odd, o_at, out, at):
    """8 pairs of each of two rows become 16 pairs of numbers that stand one below the other."""

    def codegen(context, b, signature, args):
        numbers = vector(I16)
        even, odd = (b.load(_place(context, b, signature, args, i, i + 1, numbers), align=4) for i in (0, 2))
        turns = ir.Constant(vector(I32, 2 * LANES), [i // 2 + LANES * (i % 2) for i in range(2 * LANES)])
        to = _place(context, b, signature, args, 4, 5, vector(I16, 2 * LANES))
        b.store(b.shuffle_vector(even, odd, turns), to, align=4)
        return context.get_dummy_value()

    return types.void(even, e_at, odd, o_at, out, at), codegen


@intrinsic
def _store(typingctx, x, x_at, out, o_at, factor):
    """16 numbers in float32, times a factor, as what `out` holds: float32 or bfloat16."""

    def codegen(context, b, signature, args):
        x = b.load(_place(context, b, signature, args, 0, 1, vector(F32)), align=4)
        x = b.fmul(x, broadcast(b, args[4], LANES))
        x = x if signature.args[2].dtype == types.float32 else to_bf16(b, x)
        b.store(x, _place(context, b, signature, args, 2, 3, x.type), align=2)
        return context.get_dummy_value()

    return types.void(x, x_at, out, o_at, types.float32), codegen


@intrinsic
def _shorten_two(typingctx, x, even, odd, out, o_at):
    """16 numbers of each of two rows of float32 as pairs of bfloat16 that stand one below the other."""

    def codegen(context, b, signature, args):
        rows = (b.load(_place(context, b, signature, args, 0, i, vector(F32)), align=4) for i in (1, 2))
        low, high = (b.zext(to_bf16(b, row), vector(I32)) for row in rows)
        pairs = b.or_(low, b.shl(high, splat(I32, 16)))
        b.store(pairs, _place(context, b, signature, args, 3, 4, vector(I32)), align=4)
        return context.get_dummy_value()

    return types.void(x, even, odd, out, o_at), codegen


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
def _join_rows(x, first, last, nothing, out):
    """out[i, c] = number c of rows first + 2i and first + 2i + 1 of x, for products that sum over rows."""
    half = x.shape[1]
    for i in range((last - first + 1) // 2):
        row = first + 2 * i
        for p in range(0, half, 8):
            to = 2 * (i * half + p)
            if row + 1 < last:
                _join(x[row], p, x[row + 1], p, out, to)
            else:
                _join(x[row], p, nothing, 0, out, to)


@compiled
def _copy(x, first, last, out):
    half = x.shape[1]
    for i in range(first, last):
        for p in range(0, half, 8):
            _move(x[i], p, out, (i - first) * half + p)


@compiled
def _write(x, out, first, last):
    """The other way: rows of float32 to rows first to last of out, as what it holds."""
    d = out.shape[1]
    for i in range(first, last):
        for c in range(0, d, LANES):
            _store(x, (i - first) * d + c, out[i], c, np.float32(1))


@compiled
def _weigh(row, seen, scale):
    """Scores become e to the scaled score, less the largest; what is not seen becomes 0. Returns the sum.

    All loops go over whole rows, which are whole vectors: numbers left over would be computed one by one.
    """
    row[seen:] = -np.inf
    best, total = largest(row) * scale, np.float32(0)
    for j in range(row.size):
        e = exp(row[j] * scale - best)
        row[j] = e
        total += e
    row[seen:] = np.float32(0)
    return total


@compiled
def _slopes(row, slope, seen, scale):
    """From scores, and the gradient of the weights, to the weights and the gradient of the scores; in place."""
    part, mean = np.float32(1) / _weigh(row, seen, scale), np.float32(0)
    slope[seen:] = np.float32(0)  # 0 * what is not seen would be NaN where that is infinite
    for j in range(row.size):
        mean += row[j] * slope[j]
    mean *= part
    for j in range(row.size):
        row[j] *= part
        slope[j] = row[j] * (slope[j] - mean) * scale


@compiled
def _forward(taken, q, k, v, out, parts):
    """q, k, v (batch, heads, seq, d / 2) in pairs -> out (batch, seq, heads, d), by threads that take heads in turn.

    Where these are few, every `parts`-th block of queries of a head is a unit of its own.
    """
    batch, heads, seq, half = q.shape
    kv, d = k.shape[1], 2 * half
    group, wide = heads // kv, (seq + 63) // 64 * 64
    turned_k, joined_v = np.zeros(half * wide, np.uint32), np.zeros(wide // 2 * d, np.uint32)
    block, scores = np.zeros(_QUERIES * half, np.uint32), np.zeros(_QUERIES * wide, np.float32)
    weights, mixed = np.zeros(_QUERIES * wide // 2, np.uint32), np.zeros(_QUERIES * d, np.float32)
    short = weights.view(np.uint16)
    totals, nothing = np.zeros(_QUERIES, np.float32), np.zeros(8, np.uint32)
    scale, one = np.float32(1 / np.sqrt(d)), np.float32(1)
    while True:
        unit = atomic_add(taken, 0, 1)
        if unit >= batch * kv * parts:
            return
        b, head, part = unit // parts // kv, unit // parts % kv, unit % parts
        _turn(k[b, head], turned_k, wide)
        _join_rows(v[b, head], 0, seq, nothing, joined_v)
        for h in range(head * group, (head + 1) * group):
            for first in range(part * _QUERIES, seq, parts * _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                _copy(q[b, h], first, last, block)
                _scores(block, turned_k, half, scores, wide, rows, first)
                for i in range(rows):
                    row, to = scores[i * wide : i * wide + keys], short[i * wide : i * wide + keys]
                    totals[i] = _weigh(row, first + i + 1, scale)
                    for j in range(0, keys, LANES):
                        _store(row, j, to, j, one)
                _mix(weights, wide // 2, 2, joined_v, d, mixed, rows, first)
                for i in range(rows):
                    to, factor = out[b, first + i, h], np.float32(1) / totals[i]
                    for c in range(0, d, LANES):
                        _store(mixed, i * d + c, to, c, factor)


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
    sum_q, nothing = np.zeros(_QUERIES * d, np.float32), np.zeros(8, np.uint32)
    scale, one = np.float32(1 / np.sqrt(d)), np.float32(1)
    short = short_slopes.view(np.uint16)
    while True:
        unit = atomic_add(taken, 0, 1)
        if unit >= batch * kv:
            return
        b, head = unit // kv, unit % kv
        _turn(k[b, head], turned_k, wide)
        _turn(v[b, head], turned_v, wide)
        _join_rows(k[b, head], 0, seq, nothing, joined_k)
        sum_k[:], sum_v[:] = np.float32(0), np.float32(0)
        for h in range(head * group, (head + 1) * group):
            for first in range(0, seq, _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                pairs = (rows + 1) // 2
                _copy(q[b, h], first, last, q_block)
                _copy(grad[b, h], first, last, g_block)
                _join_rows(q[b, h], first, last, nothing, joined_q)
                _join_rows(grad[b, h], first, last, nothing, joined_g)
                _scores(q_block, turned_k, half, scores, wide, rows, first)
                _scores(g_block, turned_v, half, slopes, wide, rows, first)
                for i in range(rows):
                    slope, to = slopes[i * wide : i * wide + keys], short[i * wide : i * wide + keys]
                    _slopes(scores[i * wide : i * wide + keys], slope, first + i + 1, scale)
                    for j in range(0, keys, LANES):
                        _store(slope, j, to, j, one)
                if rows % 2:  # an odd row out is joined to nothing
                    scores[rows * wide : rows * wide + keys] = np.float32(0)
                    slopes[rows * wide : rows * wide + keys] = np.float32(0)
                for i in range(pairs):
                    here, even, odd = i * wide, 2 * i * wide, (2 * i + 1) * wide
                    for j in range(0, keys, LANES):
                        _shorten_two(scores, even + j, odd + j, joined_weights, here + j)
                        _shorten_two(slopes, even + j, odd + j, joined_slopes, here + j)
                _mix(short_slopes, wide // 2, 2, joined_k, d, sum_q, rows, first)
                _gather(joined_weights, wide, 2, joined_g, d, sum_v, rows, first)
                _gather(joined_slopes, wide, 2, joined_q, d, sum_k, rows, first)
                _write(sum_q, grad_q[b, :, h], first, last)
        _write(sum_k, grad_k[b, head], 0, seq)
        _write(sum_v, grad_v[b, head], 0, seq)


@compiled
def _forward_wide(taken, q, k, v, out, parts):
    """`_forward` in float32, d numbers a row: nothing is rounded, and nothing joined."""
    batch, heads, seq, d = q.shape
    kv = k.shape[1]
    group, wide = heads // kv, (seq + 63) // 64 * 64
    turned_k, all_v = np.zeros(d * wide, np.float32), np.zeros(wide * d, np.float32)
    block, scores = np.zeros(_QUERIES * d, np.float32), np.zeros(_QUERIES * wide, np.float32)
    mixed, totals = np.zeros(_QUERIES * d, np.float32), np.zeros(_QUERIES, np.float32)
    scale = np.float32(1 / np.sqrt(d))
    while True:
        unit = atomic_add(taken, 0, 1)
        if unit >= batch * kv * parts:
            return
        b, head, part = unit // parts // kv, unit // parts % kv, unit % parts
        _turn(k[b, head], turned_k, wide)
        _copy(v[b, head], 0, seq, all_v)
        for h in range(head * group, (head + 1) * group):
            for first in range(part * _QUERIES, seq, parts * _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                _copy(q[b, h], first, last, block)
                _scores(block, turned_k, d, scores, wide, rows, first)
                for i in range(rows):
                    totals[i] = _weigh(scores[i * wide : i * wide + keys], first + i + 1, scale)
                _mix(scores, wide, 1, all_v, d, mixed, rows, first)
                for i in range(rows):
                    to, factor = out[b, first + i, h], np.float32(1) / totals[i]
                    for c in range(0, d, LANES):
                        _store(mixed, i * d + c, to, c, factor)


@compiled
def _backward_wide(taken, grad, q, k, v, grad_q, grad_k, grad_v):
    """`_backward` in float32."""
    batch, heads, seq, d = q.shape
    kv = k.shape[1]
    group, wide = heads // kv, (seq + 63) // 64 * 64
    turned_k, turned_v = np.zeros(d * wide, np.float32), np.zeros(d * wide, np.float32)
    all_k, sum_q = np.zeros(wide * d, np.float32), np.zeros(_QUERIES * d, np.float32)
    q_block, g_block = np.zeros(_QUERIES * d, np.float32), np.zeros(_QUERIES * d, np.float32)
    scores, slopes = np.zeros(_QUERIES * wide, np.float32), np.zeros(_QUERIES * wide, np.float32)
    sum_k, sum_v = np.zeros(wide * d, np.float32), np.zeros(wide * d, np.float32)
    scale = np.float32(1 / np.sqrt(d))
    while True:
        unit = atomic_add(taken, 0, 1)
        if unit >= batch * kv:
            return
        b, head = unit // kv, unit % kv
        _turn(k[b, head], turned_k, wide)
        _turn(v[b, head], turned_v, wide)
        _copy(k[b, head], 0, seq, all_k)
        sum_k[:], sum_v[:] = np.float32(0), np.float32(0)
        for h in range(head * group, (head + 1) * group):
            for first in range(0, seq, _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                _copy(q[b, h], first, last, q_block)
                _copy(grad[b, h], first, last, g_block)
                _scores(q_block, turned_k, d, scores, wide, rows, first)
                _scores(g_block, turned_v, d, slopes, wide, rows, first)
                for i in range(rows):
                    here = i * wide
                    _slopes(scores[here : here + keys], slopes[here : here + keys], first + i + 1, scale)
                _mix(slopes, wide, 1, all_k, d, sum_q, rows, first)
                _gather(scores, wide, 1, g_block, d, sum_v, rows, first)
                _gather(slopes, wide, 1, q_block, d, sum_k, rows, first)
                _write(sum_q, grad_q[b, :, h], first, last)
        _write(sum_k, grad_k[b, head], 0, seq)
        _write(sum_v, grad_v[b, head], 0, seq)


def _entries(x: Tensor) -> np.ndarray:
    """float32, or bfloat16 as neighbours in 32 bits; without a copy where a row lies so that this can be."""
    even = x.dtype == torch.float32 or not any(s % 2 for s in (*x.stride()[:-1], x.storage_offset()))
    x = (x if even and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)).detach()
    return (x if x.dtype == torch.float32 else x.view(torch.uint32)).numpy()


def _numbers(x: Tensor) -> np.ndarray:
    return (x if x.dtype == torch.float32 else x.view(torch.uint16)).numpy()


def attend(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Causal attention in bfloat16 or float32, for head_dim a multiple of 16, where `has_dots` of that kind."""
    batch, heads, seq, d = q.shape
    out = q.new_empty(batch, seq, heads, d)
    units, blocks = batch * k.shape[1], -(-seq // _QUERIES)
    parts = min(blocks, -(-4 * torch.get_num_threads() // max(1, units)))
    kernel = _forward_wide if q.dtype == torch.float32 else _forward
    in_threads(kernel, units * parts, *map(_entries, (q, k, v)), _numbers(out), parts)
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
    results = grad_q, grad_k, grad_v
    kernel = _backward_wide if q.dtype == torch.float32 else _backward
    in_threads(kernel, batch * k.shape[1], *map(_entries, (grad, q, k, v)), *map(_numbers, results))
    return grad_q.transpose(1, 2), grad_k, grad_v
