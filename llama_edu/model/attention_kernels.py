"""Causal attention as machine code, for processors with long enough vectors; lesson 22 derives it.

The blocks of `attention.block_attention`, one key/value head at a time, so that what is between the products stays in
the caches. Sums are float32.

In bfloat16, what the next product reads is rounded. The instruction multiplies two neighbours by two neighbours and
adds both products to a float32, so one side of a product lies in memory as pairs of what is summed over:

    scores  = q k^T          pairs along a row of k:    k turned, [pair, key]
    mixed   = weights v      pairs of keys:             v with two rows beside each other, [pair, feature]
    grad_v  = weights^T grad pairs of queries           (likewise grad, and the weights of two queries)

Processors with AMX have an instruction for whole tiles: 16 rows of 16 pairs times 16 pairs of 16 columns, laid out in
the same way. It wants pairs along the rows of its left side too, so there grad_v^T = grad^T weights takes the place of
the last line. What is between the products is the same.

Queries and keys that are not yet rotated are turned in the copies that the products read, and their gradients where
they are written.
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
    I8,
    I16,
    I32,
    I64,
    LANES,
    atomic_add,
    broadcast,
    compiled,
    entries,
    exp2,
    has_tiles,
    in_threads,
    largest,
    narrow,
    numbers,
    pointer,
    splat,
    tile_instructions,
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


@intrinsic
def _set_tiles(typingctx, on):
    """Make the registers of this thread eight tiles of 16 rows of 64 bytes, or give them back."""

    def codegen(context, b, signature, args):
        if tile_instructions():
            form = bytearray(64)
            form[0] = 1  # palette 1; then the bytes of a row and the rows of each tile
            form[16:32], form[48:56] = (64).to_bytes(2, "little") * 8, bytes([16]) * 8
            place = cgutils.global_constant(b, "llama_edu.tiles", cgutils.make_bytearray(form))
            with b.if_else(args[0]) as (set_up, give_back):
                with set_up:
                    _call(b, "ldtilecfg", b.bitcast(place, I8.as_pointer()))
                with give_back:
                    _call(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(on), codegen


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), args)


@intrinsic
def _product_tiles(typingctx, a, a_at, a_row, b, b_at, b_row, out, o_at, o_row, n, added):
    """`_product` of bfloat16 for i < 32, c < 32 and n a multiple of 16, of `a` with steps beside each other."""

    def codegen(context, at, signature, args):
        if not tile_instructions():
            return context.get_dummy_value()
        arrays = {i: context.make_array(signature.args[i])(context, at, args[i]).data for i in (0, 3, 6)}
        numbers = [at.sext(v, I64) if v.type != I64 else v for v in (args[i] for i in (1, 2, 4, 5, 7, 8, 9))]
        a_at, a_row, b_at, b_row, o_at, o_row, n = numbers
        const, tile = (lambda v: ir.Constant(I64, v)), (lambda v: ir.Constant(I8, v))
        place = lambda base, i: at.bitcast(at.gep(base, [i]), I8.as_pointer())
        row_bytes = lambda row: at.mul(row, const(4))
        cells = [(i, c) for i in range(2) for c in range(2)]  # tiles 0 to 3 hold sums, 4 and 5 a, 6 and 7 b
        rows = [at.add(o_at, at.mul(o_row, const(16 * i))) for i in range(2)]
        outs = [place(arrays[6], at.add(rows[i], const(16 * c))) for i, c in cells]
        with at.if_else(args[10]) as (kept, new):
            with kept:
                for i, out in enumerate(outs):
                    _call(at, "tileloadd64", tile(i), out, row_bytes(o_row))
            with new:
                for i in range(4):
                    _call(at, "tilezero", tile(i))
        left = [at.add(a_at, at.mul(a_row, const(16 * i))) for i in range(2)]
        with cgutils.for_range_slice(at, const(0), n, const(16)) as (step, _):
            for i in range(2):
                _call(at, "tileloadd64", tile(4 + i), place(arrays[0], at.add(left[i], step)), row_bytes(a_row))
            here = at.add(b_at, at.mul(step, b_row))
            for c in range(2):
                _call(at, "tileloadd64", tile(6 + c), place(arrays[3], at.add(here, const(16 * c))), row_bytes(b_row))
            for i, c in cells:
                _call(at, "tdpbf16ps", tile(2 * i + c), tile(4 + i), tile(6 + c))
        for i, out in enumerate(outs):
            _call(at, "tilestored64", tile(i), out, row_bytes(o_row))
        return context.get_dummy_value()

    return types.void(a, a_at, a_row, b, b_at, b_row, out, o_at, o_row, n, added), codegen


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


@compiled
def _scores_by_tiles(block, turned, n, out, wide, rows, first):
    for i in range(0, rows, 32):
        for j in range(0, first + i + 32, 32):
            _product_tiles(block, i * n, n, turned, j, wide, out, i * wide + j, wide, n, False)


@compiled
def _mix_by_tiles(weights, row, b, d, out, rows, first):
    for i in range(0, rows, 32):
        for c in range(0, d, 32):
            _product_tiles(weights, i * row, row, b, c, d, out, i * d + c, d, (first + i + 32) // 2, False)


@compiled
def _gather_by_tiles(weights, wide, turned, d, sums, rows, first):
    """Add to sums[c, j], and not [j, c], from weights of a whole block of queries; turned[c] has number c of each."""
    for j in range(0, first + rows, 32):
        i, n = max(0, j - first) // 2, _QUERIES // 2
        for c in range(0, d, 32):
            _product_tiles(turned, c * n + i, n, weights, i * wide + j, wide, sums, c * wide + j, wide, n - i, True)


# Loops that the compiler turns into vectors do up to 256 numbers a turn, and those left over one by one. A row of q has
# 64, so what is done to rows of it is written in vectors here.


@intrinsic
def _move(typingctx, x, x_at, out, o_at):
    """Copy 8 entries."""

    def codegen(context, b, signature, args):
        source, to = (pointer(context, b, signature, args, i, i + 1, vector(I32, 8)) for i in (0, 2))
        b.store(b.load(source, align=4), to, align=4)
        return context.get_dummy_value()

    return types.void(x, x_at, out, o_at), codegen


@intrinsic
def _join(typingctx, even, e_at, odd, o_at, out, at):
    """8 pairs of each of two rows become 16 pairs of numbers that stand one below the other."""

    def codegen(context, b, signature, args):
        numbers = vector(I16)
        even, odd = (b.load(pointer(context, b, signature, args, i, i + 1, numbers), align=4) for i in (0, 2))
        turns = ir.Constant(vector(I32, 2 * LANES), [i // 2 + LANES * (i % 2) for i in range(2 * LANES)])
        to = pointer(context, b, signature, args, 4, 5, vector(I16, 2 * LANES))
        b.store(b.shuffle_vector(even, odd, turns), to, align=4)
        return context.get_dummy_value()

    return types.void(even, e_at, odd, o_at, out, at), codegen


@intrinsic
def _store(typingctx, x, x_at, out, o_at, factor):
    """16 numbers in float32, times a factor, as what `out` holds: float32 or bfloat16."""

    def codegen(context, b, signature, args):
        x = b.load(pointer(context, b, signature, args, 0, 1, vector(F32)), align=4)
        x = b.fmul(x, broadcast(b, args[4], LANES))
        x = x if signature.args[2].dtype == types.float32 else to_bf16(b, x)
        b.store(x, pointer(context, b, signature, args, 2, 3, x.type), align=2)
        return context.get_dummy_value()

    return types.void(x, x_at, out, o_at, types.float32), codegen


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
def _join_rows(x, first, last, nothing, out, d):
    """out[i, c] = number c of rows first + 2i and first + 2i + 1 of x, for products that sum over rows."""
    half = x.shape[1]
    for i in range((last - first + 1) // 2):
        row = first + 2 * i
        for p in range(0, half, 8):
            to = i * d + 2 * p
            if row + 1 < last:
                _join(x[row], p, x[row + 1], p, out, to)
            else:
                _join(x[row], p, nothing, 0, out, to)


@compiled
def _copy(x, first, last, out, row):
    for i in range(first, last):
        for p in range(0, x.shape[1], 8):
            _move(x[i], p, out, (i - first) * row + p)


@compiled
def _write(x, row, out, first, last):
    """The other way: rows of float32 to rows first to last of out, as what it holds."""
    for i in range(first, last):
        for c in range(0, out.shape[1], LANES):
            _store(x, (i - first) * row + c, out[i], c, np.float32(1))


@compiled
def _write_turned(x, row, out):
    """Columns of float32 to the rows of out."""
    for i in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[i, c] = narrow(x[c * row + i], out)


@intrinsic
def _exponentials(typingctx, row, scale, best, out):
    """out[j] = 2 to the (row[j] * scale - best), to 2e-7 of its value; returns the sum. Rows of 64, 128, ... numbers.

    As `native.exp`, written in vectors: a compiler that prefers the shorter ones takes twice as long.
    """

    def codegen(context, b, signature, args):
        floats, four = vector(F32), range(0, 64, LANES)
        row, out = (context.make_array(signature.args[i])(context, b, args[i]) for i in (0, 3))
        n = b.extract_value(row.shape, 0)
        scale, best = (broadcast(b, x, LANES) for x in args[1:3])
        fma = ir.FunctionType(floats, [floats] * 3)
        fma = cgutils.get_or_insert_function(b.module, fma, "llvm.fma.v16f32")
        before, loop, after = b.basic_block, b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(loop)
        b.position_at_end(loop)
        first, sums = b.phi(I64), [b.phi(floats) for _ in four]
        first.add_incoming(ir.Constant(I64, 0), before)
        for at, total in zip(four, sums):
            place = b.add(first, ir.Constant(I64, at))
            score = b.load(b.bitcast(b.gep(row.data, [place]), floats.as_pointer()), align=4)
            y = b.call(fma, [score, scale, b.fneg(best)])
            y = b.select(b.fcmp_ordered("<", y, splat(F32, -125.0)), splat(F32, -125.0), y)  # NaN stays
            e = exp2(b, y)
            short = e if signature.args[3].dtype == types.float32 else to_bf16(b, e)
            b.store(short, b.bitcast(b.gep(out.data, [place]), short.type.as_pointer()), align=2)
            total.add_incoming(splat(F32, 0.0), before)
            total.add_incoming(b.fadd(total, e), loop)
        following = b.add(first, ir.Constant(I64, 64))
        first.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, n), loop, after)
        b.position_at_end(after)
        total = sums[0].incomings[1][0]
        for other in sums[1:]:
            total = b.fadd(total, other.incomings[1][0])
        add = ir.FunctionType(F32, [F32, floats])
        add = cgutils.get_or_insert_function(b.module, add, "llvm.vector.reduce.fadd.v16f32")
        return b.call(add, [ir.Constant(F32, 0.0), total], fastmath=("reassoc",))

    return types.float32(row, types.float32, types.float32, out), codegen


@compiled
def _weigh(row, seen, scale, out):
    """To `out`, which may be `row`: e to the scaled score, less the largest; 0 for what is not seen. Returns the sum.

    All loops go over whole rows, which are whole vectors: numbers left over would be computed one by one.
    """
    row[seen:] = -np.inf
    scale *= np.float32(1.4426950408889634)  # e to the x is 2 to the x / log 2
    total = _exponentials(row, scale, largest(row) * scale, out)
    out[seen:] = 0
    return total


@compiled
def _lean(row, slope, seen, scale):
    """`_weigh`, and the gradient of what is not seen becomes 0. Returns 1 / the sum, and the mean gradient."""
    total, mean = _weigh(row, seen, scale, row), np.float32(0)
    slope[seen:] = np.float32(0)  # 0 * what is not seen would be NaN where that is infinite
    for j in range(row.size):
        mean += row[j] * slope[j]
    return np.float32(1) / total, mean / total


@compiled
def _slopes(row, slope, seen, scale):
    """From scores, and the gradient of the weights, to the weights and the gradient of the scores; in place."""
    part, mean = _lean(row, slope, seen, scale)
    for j in range(row.size):
        row[j] *= part
        slope[j] = row[j] * (slope[j] - mean) * scale


@intrinsic
def _slopes_of_two(typingctx, scores, slopes, even, odd, parts, means, scale, short, weights, joined, at):
    """The last loop of `_slopes` for 16 keys of two rows, in bfloat16.

    The gradients of the scores go to places even and odd of `short` and, one below the other, to `joined`; the weights
    only so, to `weights`. `parts` and `means` are of both rows.
    """

    def codegen(context, b, signature, args):
        place = lambda array, at, kind: pointer(context, b, signature, args, array, at, vector(kind))
        scale, pairs = broadcast(b, args[6], LANES), []
        for i in range(2):
            part, mean = (broadcast(b, b.extract_value(args[n], i), LANES) for n in (4, 5))
            weight = b.fmul(b.load(place(0, 2 + i, F32), align=4), part)
            slope = b.fsub(b.load(place(1, 2 + i, F32), align=4), mean)
            slope = to_bf16(b, b.fmul(b.fmul(weight, slope), scale))
            b.store(slope, place(7, 2 + i, I16), align=2)
            pairs.append([b.zext(x, vector(I32)) for x in (to_bf16(b, weight), slope)])
        for array, low, high in zip((8, 9), *pairs):
            b.store(b.or_(low, b.shl(high, splat(I32, 16))), place(array, 10, I32), align=4)
        return context.get_dummy_value()

    two = types.UniTuple(types.float32, 2)
    return types.void(scores, slopes, even, odd, two, two, types.float32, short, weights, joined, at), codegen


@compiled
def _slopes_in_pairs(scores, slopes, wide, keys, parts, means, scale, short, weights, joined):
    for i in range(0, _QUERIES, 2):
        part, mean = (parts[i], parts[i + 1]), (means[i], means[i + 1])
        for j in range(0, keys, LANES):
            even, at = i * wide + j, i // 2 * wide + j
            _slopes_of_two(scores, slopes, even, even + wide, part, mean, scale, short, weights, joined, at)


def _rotation(n: int) -> Callable:
    """A numba function for n pairs of `_rotate`: those from place `at`, by the angles from place p."""

    @intrinsic
    def rotate(typingctx, pairs, at, cos, sin, p, sign):
        def codegen(context, b, signature, args):
            place = lambda array, at, kind: pointer(context, b, signature, args, array, at, vector(kind, n))
            pairs, cos, sin = place(0, 1, I32), *(b.load(place(i, 4, F32), align=4) for i in (2, 3))
            sin, both = b.fmul(sin, broadcast(b, args[5], n)), b.load(pairs, align=4)
            x = b.bitcast(b.shl(both, splat(I32, 16, n)), vector(F32, n))
            y = b.bitcast(b.and_(both, splat(I32, 0xFFFF0000, n)), vector(F32, n))
            turned = b.fsub(b.fmul(x, cos), b.fmul(y, sin)), b.fadd(b.fmul(x, sin), b.fmul(y, cos))
            low, high = (b.zext(to_bf16(b, number), vector(I32, n)) for number in turned)
            b.store(b.or_(low, b.shl(high, splat(I32, 16, n))), pairs, align=4)
            return context.get_dummy_value()

        return types.void(pairs, types.int64, cos, sin, types.int64, types.float32), codegen

    return rotate


_rotate_8, _rotate_16 = _rotation(8), _rotation(16)


@compiled
def _rotate(pairs, cos, sin, sign):
    """Turn a row of 8, 16, 24, ... pairs of bfloat16 by their angles, or back with sign -1."""
    whole = pairs.size // 16 * 16
    for p in range(0, whole, 16):
        _rotate_16(pairs, p, cos, sin, p, sign)
    if whole < pairs.size:
        _rotate_8(pairs, whole, cos, sin, whole, sign)


@compiled
def _copy_rotated(x, first, last, out, row, cos, sin):
    """`_copy`, and turn the rows by their angles, if there are tables."""
    _copy(x, first, last, out, row)
    if cos.size > 0:
        for i in range(first, last):
            at = (i - first) * row
            _rotate(out[at : at + x.shape[1]], cos[i], sin[i], np.float32(1))


@compiled
def _forward(taken, tiles, q, k, v, cos, sin, out, parts):
    """q, k, v (batch, heads, seq, d / 2) in pairs -> out (batch, seq, heads, d), by threads that take heads in turn.

    Where these are few, every `parts`-th block of queries of a head is a unit of its own. cos and sin (1 or batch,
    seq, d / 2) turn q and k; without any, (1, 0, 0), they stay as they are.
    """
    batch, heads, seq, half = q.shape
    kv, group, wide = k.shape[1], heads // k.shape[1], (seq + 63) // 64 * 64
    d = (2 * half + 31) // 32 * 32 if tiles else 2 * half
    all_k = np.zeros((seq, half), np.uint32)
    turned_k, joined_v = np.zeros(d // 2 * wide, np.uint32), np.zeros(wide // 2 * d, np.uint32)
    block, scores = np.zeros(_QUERIES * d // 2, np.uint32), np.zeros(_QUERIES * wide, np.float32)
    weights, mixed = np.zeros(_QUERIES * wide // 2, np.uint32), np.zeros(_QUERIES * d, np.float32)
    short = weights.view(np.uint16)
    totals, nothing = np.zeros(_QUERIES, np.float32), np.zeros(8, np.uint32)
    scale = np.float32(1 / np.sqrt(2 * half))
    if tiles:
        _set_tiles(True)
    while True:
        unit = atomic_add(taken, 0, 1)
        if unit >= batch * kv * parts:
            break
        b, head, part = unit // parts // kv, unit // parts % kv, unit % parts
        table = min(b, len(cos) - 1)
        _copy_rotated(k[b, head], 0, seq, all_k.ravel(), half, cos[table], sin[table])
        _turn(all_k, turned_k, wide)
        _join_rows(v[b, head], 0, seq, nothing, joined_v, d)
        for h in range(head * group, (head + 1) * group):
            for first in range(part * _QUERIES, seq, parts * _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                _copy_rotated(q[b, h], first, last, block, d // 2, cos[table], sin[table])
                if tiles:
                    _scores_by_tiles(block, turned_k, d // 2, scores, wide, rows, first)
                else:
                    _scores(block, turned_k, d // 2, scores, wide, rows, first)
                for i in range(rows):
                    row, to = scores[i * wide : i * wide + keys], short[i * wide : i * wide + keys]
                    totals[i] = _weigh(row, first + i + 1, scale, to)
                if tiles:
                    _mix_by_tiles(weights, wide // 2, joined_v, d, mixed, rows, first)
                else:
                    _mix(weights, wide // 2, 2, joined_v, d, mixed, rows, first)
                for i in range(rows):
                    to, factor = out[b, first + i, h], np.float32(1) / totals[i]
                    for c in range(0, to.size, LANES):
                        _store(mixed, i * d + c, to, c, factor)
    if tiles:
        _set_tiles(False)


@compiled
def _backward(taken, tiles, grad, q, k, v, cos, sin, grad_q, grad_k, grad_v):
    """As `_forward`, from the gradient of its output; grad_k and grad_v are (batch, kv heads, seq, d)."""
    batch, heads, seq, half = q.shape
    kv, group, wide = k.shape[1], heads // k.shape[1], (seq + 63) // 64 * 64
    d = (2 * half + 31) // 32 * 32 if tiles else 2 * half
    all_k = np.zeros((seq, half), np.uint32)
    turned_k, turned_v = np.zeros(d // 2 * wide, np.uint32), np.zeros(d // 2 * wide, np.uint32)
    joined_k = np.zeros(wide // 2 * d, np.uint32)
    q_block, g_block = np.zeros((_QUERIES, d // 2), np.uint32), np.zeros(_QUERIES * d // 2, np.uint32)
    joined_q, joined_g = np.zeros((_QUERIES // 2, d), np.uint32), np.zeros((_QUERIES // 2, d), np.uint32)
    turned_q, turned_g = np.zeros(joined_q.size, np.uint32), np.zeros(joined_g.size, np.uint32)
    scores, slopes = np.zeros(_QUERIES * wide, np.float32), np.zeros(_QUERIES * wide, np.float32)
    short_slopes = np.zeros(_QUERIES * wide // 2, np.uint32)
    joined_weights, joined_slopes = np.zeros_like(short_slopes), np.zeros_like(short_slopes)
    sum_k, sum_v = np.zeros(wide * d, np.float32), np.zeros(wide * d, np.float32)
    sum_q, nothing = np.zeros(_QUERIES * d, np.float32), np.zeros(8, np.uint32)
    parts, means = np.zeros(_QUERIES, np.float32), np.zeros(_QUERIES, np.float32)
    scale = np.float32(1 / np.sqrt(2 * half))
    short = short_slopes.view(np.uint16)
    if tiles:
        _set_tiles(True)
    while True:
        unit = atomic_add(taken, 0, 1)
        if unit >= batch * kv:
            break
        b, head = unit // kv, unit % kv
        table = min(b, len(cos) - 1)
        _copy_rotated(k[b, head], 0, seq, all_k.ravel(), half, cos[table], sin[table])
        _turn(all_k, turned_k, wide)
        _turn(v[b, head], turned_v, wide)
        _join_rows(all_k, 0, seq, nothing, joined_k, d)
        sum_k[:], sum_v[:] = np.float32(0), np.float32(0)
        for h in range(head * group, (head + 1) * group):
            for first in range(0, seq, _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                if rows < _QUERIES:  # what is not there is joined to nothing
                    joined_q[:], joined_g[:] = np.uint32(0), np.uint32(0)
                _copy_rotated(q[b, h], first, last, q_block.ravel(), d // 2, cos[table], sin[table])
                _copy(grad[b, h], first, last, g_block, d // 2)
                _join_rows(q_block, 0, rows, nothing, joined_q.ravel(), d)
                _join_rows(grad[b, h], first, last, nothing, joined_g.ravel(), d)
                if tiles:
                    _scores_by_tiles(q_block.ravel(), turned_k, d // 2, scores, wide, rows, first)
                    _scores_by_tiles(g_block, turned_v, d // 2, slopes, wide, rows, first)
                else:
                    _scores(q_block.ravel(), turned_k, d // 2, scores, wide, rows, first)
                    _scores(g_block, turned_v, d // 2, slopes, wide, rows, first)
                for i in range(rows):
                    here = i * wide
                    row, slope = scores[here : here + keys], slopes[here : here + keys]
                    parts[i], means[i] = _lean(row, slope, first + i + 1, scale)
                scores[rows * wide :], slopes[rows * wide :] = np.float32(0), np.float32(0)
                parts[rows:], means[rows:] = np.float32(0), np.float32(0)
                _slopes_in_pairs(scores, slopes, wide, keys, parts, means, scale, short, joined_weights, joined_slopes)
                if tiles:
                    _turn(joined_q, turned_q, _QUERIES // 2)
                    _turn(joined_g, turned_g, _QUERIES // 2)
                    _mix_by_tiles(short_slopes, wide // 2, joined_k, d, sum_q, rows, first)
                    _gather_by_tiles(joined_weights, wide, turned_g, d, sum_v, rows, first)
                    _gather_by_tiles(joined_slopes, wide, turned_q, d, sum_k, rows, first)
                else:
                    _mix(short_slopes, wide // 2, 2, joined_k, d, sum_q, rows, first)
                    _gather(joined_weights, wide, 2, joined_g.ravel(), d, sum_v, rows, first)
                    _gather(joined_slopes, wide, 2, joined_q.ravel(), d, sum_k, rows, first)
                _write(sum_q, d, grad_q[b, :, h], first, last)
                if cos.size > 0:
                    for i in range(first, last):
                        turned = grad_q[b, i, h].view(np.uint32)
                        _rotate(turned, cos[table, i], sin[table, i], np.float32(-1))
        if tiles:
            _write_turned(sum_k, wide, grad_k[b, head])
            _write_turned(sum_v, wide, grad_v[b, head])
        else:
            _write(sum_k, d, grad_k[b, head], 0, seq)
            _write(sum_v, d, grad_v[b, head], 0, seq)
        if cos.size > 0:
            for i in range(seq):
                turned = grad_k[b, head, i].view(np.uint32)
                _rotate(turned, cos[table, i], sin[table, i], np.float32(-1))
    if tiles:
        _set_tiles(False)


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
        _copy(v[b, head], 0, seq, all_v, d)
        for h in range(head * group, (head + 1) * group):
            for first in range(part * _QUERIES, seq, parts * _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                _copy(q[b, h], first, last, block, d)
                _scores(block, turned_k, d, scores, wide, rows, first)
                for i in range(rows):
                    row = scores[i * wide : i * wide + keys]
                    totals[i] = _weigh(row, first + i + 1, scale, row)
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
        _copy(k[b, head], 0, seq, all_k, d)
        sum_k[:], sum_v[:] = np.float32(0), np.float32(0)
        for h in range(head * group, (head + 1) * group):
            for first in range(0, seq, _QUERIES):
                last = min(first + _QUERIES, seq)
                rows, keys = last - first, (last + 63) // 64 * 64
                _copy(q[b, h], first, last, q_block, d)
                _copy(grad[b, h], first, last, g_block, d)
                _scores(q_block, turned_k, d, scores, wide, rows, first)
                _scores(g_block, turned_v, d, slopes, wide, rows, first)
                for i in range(rows):
                    here = i * wide
                    _slopes(scores[here : here + keys], slopes[here : here + keys], first + i + 1, scale)
                _mix(slopes, wide, 1, all_k, d, sum_q, rows, first)
                _gather(scores, wide, 1, g_block, d, sum_v, rows, first)
                _gather(slopes, wide, 1, q_block, d, sum_k, rows, first)
                _write(sum_q, d, grad_q[b, :, h], first, last)
        _write(sum_k, d, grad_k[b, head], 0, seq)
        _write(sum_v, d, grad_v[b, head], 0, seq)


def _tables(*tables: Tensor) -> list[np.ndarray]:
    if not tables:
        return [np.empty((1, 0, 0), np.float32)] * 2
    return [t.detach().float().contiguous().numpy() for t in tables]


def attend(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
    *tables: Float[Tensor, "#batch seq half"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Causal attention in bfloat16 or float32, for head_dim a multiple of 16, where `has_dots` of that kind.

    In bfloat16 it also rotates q and k, given the tables of `apply_rope`.
    """
    batch, heads, seq, d = q.shape
    out = q.new_empty(batch, seq, heads, d)
    units, blocks = batch * k.shape[1], -(-seq // _QUERIES)
    parts = min(blocks, -(-4 * torch.get_num_threads() // max(1, units)))
    arrays = [entries(x) for x in (q, k, v)]
    if q.dtype == torch.float32:
        in_threads(_forward_wide, units * parts, *arrays, numbers(out), parts)
    else:
        in_threads(_forward, units * parts, has_tiles(), *arrays, *_tables(*tables), numbers(out), parts)
    return out.transpose(1, 2)


def attend_backward(
    grad: Float[Tensor, "batch heads seq head_dim"],
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
    *tables: Float[Tensor, "#batch seq half"],
) -> tuple[
    Float[Tensor, "batch heads seq head_dim"],
    Float[Tensor, "batch kv_heads seq head_dim"],
    Float[Tensor, "batch kv_heads seq head_dim"],
]:
    """Gradients of q, k and v, from that of the output of `attend`; the weights are computed again."""
    batch, heads, seq, d = q.shape
    grad_q, grad_k, grad_v = q.new_empty(batch, seq, heads, d), k.new_empty(k.shape), v.new_empty(v.shape)
    arrays, grads = [entries(x) for x in (grad, q, k, v)], [numbers(x) for x in (grad_q, grad_k, grad_v)]
    if q.dtype == torch.float32:
        in_threads(_backward_wide, batch * k.shape[1], *arrays, *grads)
    else:
        in_threads(_backward, batch * k.shape[1], has_tiles(), *arrays, *_tables(*tables), *grads)
    return grad_q.transpose(1, 2), grad_k, grad_v
