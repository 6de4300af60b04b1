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

import math
from collections.abc import Callable
from functools import reduce

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
    address,
    atomic_add,
    broadcast,
    compiled,
    entries,
    exp2,
    has_tiles,
    in_threads,
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


def _row_spot(context, b, signature, args, array: int, row: int, column: int, kind: ir.Type) -> ir.Value:
    """A pointer to row args[row], column args[column] of a matrix, whose rows need not follow each other."""
    x = context.make_array(signature.args[array])(context, b, args[array])
    by_row, by_column = cgutils.unpack_tuple(b, x.strides)
    return address(b, x.data, b.add(b.mul(args[row], by_row), b.mul(args[column], by_column)), kind)


@intrinsic
def _move(typingctx, x, row, p, out, at):
    """Copy 8 entries."""

    def codegen(context, b, signature, args):
        source = _row_spot(context, b, signature, args, 0, 1, 2, vector(I32, 8))
        b.store(b.load(source, align=4), pointer(context, b, signature, args, 3, 4, vector(I32, 8)), align=4)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, out, types.int64), codegen


@intrinsic
def _join(typingctx, x, even, p, y, odd, q, out, at):
    """8 pairs of a row of x, from place p, and of a row of y become 16 pairs of numbers, one below the other."""

    def codegen(context, b, signature, args):
        rows = (_row_spot(context, b, signature, args, i, i + 1, i + 2, vector(I16)) for i in (0, 3))
        even, odd = (b.load(row, align=4) for row in rows)
        turns = ir.Constant(vector(I32, 2 * LANES), [i // 2 + LANES * (i % 2) for i in range(2 * LANES)])
        to = pointer(context, b, signature, args, 6, 7, vector(I16, 2 * LANES))
        b.store(b.shuffle_vector(even, odd, turns), to, align=4)
        return context.get_dummy_value()

    place = types.int64, types.int64
    return types.void(x, *place, y, *place, out, types.int64), codegen


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


@intrinsic
def _turn_16(typingctx, x, row, p, out, at, width):
    """out[at + c * width + j] = x[row + j, p + c], for c < 4 and j < 16."""

    def codegen(context, b, signature, args):
        x, four = context.make_array(signature.args[0])(context, b, args[0]), vector(I32, 4)
        join = lambda x, y, order: b.shuffle_vector(x, y, ir.Constant(vector(I32, len(order)), order))
        corner, by_row = _row_spot(context, b, signature, args, 0, 1, 2, four), b.extract_value(x.strides, 0)
        rows = [address(b, corner, b.mul(by_row, ir.Constant(I64, j)), four) for j in range(LANES)]
        rows = [b.load(row, align=4) for row in rows]
        one_in_four = []  # each quarter of a vector is of another row: 0, 4, 8 and 12, or the next
        for j in range(4):
            halves = [join(rows[j + first], rows[j + first + 4], list(range(8))) for first in (0, 8)]
            one_in_four.append(join(*halves, list(range(16))))
        # Four rows become four columns in two steps: neighbours that stand one below the other, then pairs of these.
        quarters = lambda order: [4 * quarter + i for quarter in range(4) for i in order]
        singles = [quarters((0, 16, 1, 17)), quarters((2, 18, 3, 19))]
        pairs = [quarters((0, 1, 16, 17)), quarters((2, 3, 18, 19))]
        above, below = ([join(*one_in_four[i : i + 2], order) for order in singles] for i in (0, 2))
        columns = [join(above[c // 2], below[c // 2], pairs[c % 2]) for c in range(4)]
        data = context.make_array(signature.args[3])(context, b, args[3]).data
        for c, column in enumerate(columns):
            place = b.add(args[4], b.mul(args[5], ir.Constant(I64, c)))
            b.store(column, b.bitcast(b.gep(data, [place]), column.type.as_pointer()), align=4)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(x, whole, whole, out, whole, whole), codegen


@compiled
def _turn(x, out, width):
    """out[p, j] = pair p of row j of x, for products that sum along a row."""
    n, half = x.shape
    whole = n // LANES * LANES
    for first in range(0, whole, LANES):
        for p in range(0, half, 4):
            _turn_16(x, first, p, out, p * width + first, width)
    for p in range(half):
        for j in range(whole, n):
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
                _join(x, row, p, x, row + 1, p, out, to)
            else:
                _join(x, row, p, nothing, 0, 0, out, to)


@compiled
def _copy(x, first, last, out, row):
    for i in range(first, last):
        for p in range(0, x.shape[1], 8):
            _move(x, i, p, out, (i - first) * row + p)


@compiled
def _write(x, row, out, first, last):
    """The other way: rows of float32 to rows first to last of out, as what it holds."""
    for i in range(first, last):
        for c in range(0, out.shape[1], LANES):
            _store(x, (i - first) * row + c, out[i], c, np.float32(1))


def _weigh_row(context, b, signature, args, degree: int, out: int, slope: int | None = None) -> tuple[ir.Value, ...]:
    """To args[out], which may be the row: e to the scaled scores, less the largest. Their sum, and that times slopes.

    The first arguments are row, at, keys, seen and scale; behind `out` and `slope` stands where theirs begin. Of `keys`
    numbers, a multiple of 64, all but up to 63 are seen; what is not gets 0, and so does its slope. `degree` is that of
    `native.exp2`. In vectors: a compiler that prefers the shorter ones takes twice as long.
    """
    _, _, keys, seen, scale, *_ = args
    starts, const = range(0, 64, LANES), lambda v: ir.Constant(I64, v)
    short = signature.args[out].dtype != types.float32
    tail = b.sub(keys, const(64))

    def spot(array: int, first: ir.Value, start: int) -> ir.Value:
        data = context.make_array(signature.args[array])(context, b, args[array]).data
        place = b.add(b.add(args[array + 1], first), const(start))
        return b.bitcast(b.gep(data, [place]), vector(I16 if array == out and short else F32).as_pointer())

    def keep_seen(array: int, start: int, otherwise: float) -> ir.Value:
        lanes = ir.Constant(vector(I32), list(range(start, start + LANES)))
        is_seen = b.icmp_signed("<", lanes, broadcast(b, b.trunc(b.sub(seen, tail), I32), LANES))
        x = b.load(here := spot(array, tail, start), align=2)
        b.store(x := b.select(is_seen, x, splat(x.type.element, otherwise)), here, align=2)
        return x

    larger = lambda x, best: b.select(b.fcmp_ordered(">", x, best), x, best)
    bests = [cgutils.alloca_once_value(b, keep_seen(0, start, -math.inf)) for start in starts]
    with cgutils.for_range_slice(b, const(0), tail, const(64)) as (first, _):
        for best, start in zip(bests, starts):
            b.store(larger(b.load(spot(0, first, start), align=4), b.load(best)), best)
    best = reduce(larger, [b.load(best) for best in bests])
    for apart in (8, 4, 2, 1):
        best = larger(best, b.shuffle_vector(best, best, ir.Constant(vector(I32), [i ^ apart for i in range(LANES)])))
    if slope is not None:
        for start in starts:
            keep_seen(slope, start, 0.0)  # 0 * what is not seen would be NaN where that is infinite

    scale = broadcast(b, b.fmul(scale, ir.Constant(F32, 1 / math.log(2))), LANES)  # e to the x is 2 to the x / log 2
    shift = b.fneg(b.fmul(best, scale))
    fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(best.type, [best.type] * 3), "llvm.fma.v16f32")
    sums = [[cgutils.alloca_once_value(b, splat(F32, 0.0)) for _ in starts] for _ in range(2)]
    with cgutils.for_range_slice(b, const(0), keys, const(64)) as (first, _):
        for total, mean, start in zip(*sums, starts):
            y = b.call(fma, [b.load(spot(0, first, start), align=4), scale, shift])
            y = b.select(b.fcmp_ordered("<", y, splat(F32, -125.0)), splat(F32, -125.0), y)  # NaN stays
            e = exp2(b, y, degree)
            b.store(to_bf16(b, e) if short else e, spot(out, first, start), align=2)
            b.store(b.fadd(b.load(total), e), total)
            if slope is not None:
                b.store(b.call(fma, [e, b.load(spot(slope, first, start), align=4), b.load(mean)]), mean)
    for start in starts:
        keep_seen(out, start, 0)
    add = ir.FunctionType(F32, [F32, best.type])
    add = cgutils.get_or_insert_function(b.module, add, "llvm.vector.reduce.fadd.v16f32")
    sums = [reduce(b.fadd, [b.load(part) for part in parts]) for parts in sums]
    return tuple(b.call(add, [ir.Constant(F32, 0.0), total], fastmath=("reassoc",)) for total in sums)


@intrinsic
def _weigh(typingctx, row, at, keys, seen, scale, out, o_at):
    """`_weigh_row` for weights that stay float32, or are rounded to bfloat16; returns the sum."""
    degree, whole = 5 if out.dtype == types.float32 else 3, types.int64

    def codegen(context, b, signature, args):
        return _weigh_row(context, b, signature, args, degree, out=5)[0]

    return types.float32(row, whole, whole, whole, types.float32, out, whole), codegen


def _leaning(degree: int) -> Callable:
    """A numba function: `_weigh_row` in place. Returns 1 / the sum, and the mean slope."""

    @intrinsic
    def lean(typingctx, row, at, keys, seen, scale, slope, s_at):
        def codegen(context, b, signature, args):
            total, mean = _weigh_row(context, b, signature, args, degree, out=0, slope=5)
            values = [b.fdiv(ir.Constant(F32, 1.0), total), b.fdiv(mean, total)]
            return context.make_tuple(b, signature.return_type, values)

        whole, two = types.int64, types.UniTuple(types.float32, 2)
        return two(row, whole, whole, whole, types.float32, slope, whole), codegen

    return lean


_lean, _lean_short = _leaning(5), _leaning(3)  # for weights that stay float32, and for those that are rounded later


@compiled
def _slopes(row, slope, seen, scale):
    """From scores, and the gradient of the weights, to the weights and the gradient of the scores; in place."""
    part, mean = _lean(row, 0, row.size, seen, scale, slope, 0)
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
    """A numba function: copy n pairs of bfloat16 from row i of x, place p, turned by the angles in row i, place p."""

    @intrinsic
    def rotate(typingctx, x, i, p, cos, sin, out, at):
        def codegen(context, b, signature, args):
            spot = lambda array, kind: _row_spot(context, b, signature, args, array, 1, 2, vector(kind, n))
            cos, sin, both = (b.load(spot(*array), align=4) for array in ((3, F32), (4, F32), (0, I32)))
            x = b.bitcast(b.shl(both, splat(I32, 16, n)), vector(F32, n))
            y = b.bitcast(b.and_(both, splat(I32, 0xFFFF0000, n)), vector(F32, n))
            turned = b.fsub(b.fmul(x, cos), b.fmul(y, sin)), b.fadd(b.fmul(x, sin), b.fmul(y, cos))
            low, high = (b.zext(to_bf16(b, number), vector(I32, n)) for number in turned)
            to = pointer(context, b, signature, args, 5, 6, vector(I32, n))
            b.store(b.or_(low, b.shl(high, splat(I32, 16, n))), to, align=4)
            return context.get_dummy_value()

        return types.void(x, types.int64, types.int64, cos, sin, out, types.int64), codegen

    return rotate


_rotate_8, _rotate_16 = _rotation(8), _rotation(16)


@compiled
def _copy_rotated(x, first, last, out, row, cos, sin):
    """`_copy`, and turn the rows by their angles, if there are tables."""
    if cos.size == 0:
        _copy(x, first, last, out, row)
        return
    whole = x.shape[1] // LANES * LANES
    for i in range(first, last):
        at = (i - first) * row
        for p in range(0, whole, LANES):
            _rotate_16(x, i, p, cos, sin, out, at + p)
        if whole < x.shape[1]:
            _rotate_8(x, i, whole, cos, sin, out, at + whole)


@intrinsic
def _store_rotated(typingctx, x, at, out, i, c, cos, sin, p):
    """8 pairs of float32 to row i of bfloat16, place c, turned back by the angles in row i, place p."""

    def codegen(context, b, signature, args):
        spot = lambda array, column, kind: _row_spot(context, b, signature, args, array, 3, column, kind)
        order = lambda x, places: b.shuffle_vector(x, x, ir.Constant(vector(I32), places))
        twice = [i // 2 for i in range(LANES)]
        cos, sin = (order(b.load(spot(array, 7, vector(F32, 8)), align=4), twice) for array in (5, 6))
        x = b.load(pointer(context, b, signature, args, 0, 1, vector(F32)), align=4)
        across = b.fmul(order(x, [i ^ 1 for i in range(LANES)]), ir.Constant(vector(F32), [1.0, -1.0] * 8))
        turned = b.fadd(b.fmul(x, cos), b.fmul(across, sin))
        b.store(to_bf16(b, turned), spot(2, 4, vector(I16)), align=2)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(x, whole, out, whole, whole, cos, sin, whole), codegen


@compiled
def _write_rotated(x, row, out, first, last, cos, sin):
    """`_write`, turned back by the angles, if there are tables."""
    if cos.size == 0:
        _write(x, row, out, first, last)
        return
    for i in range(first, last):
        for c in range(0, out.shape[1], LANES):
            _store_rotated(x, (i - first) * row + c, out, i, c, cos, sin, c // 2)


@compiled
def _write_turned(x, row, part, out, cos, sin):
    """`_write_rotated` of float32 whose columns are the rows of out; `part` holds 16 of these at a time."""
    seq, d = out.shape
    for first in range(0, seq, LANES):
        for p in range(0, LANES, 4):
            for c in range(0, d, LANES):
                _turn_16(x, c, first + p, part, p * d + c, d)
        _write_rotated(part.view(np.float32), d, out, first, min(first + LANES, seq), cos, sin)


@compiled
def _wide(seq):
    """Numbers from row to row of a table over `seq` keys: whole vectors, and not a power of 2.

    Rows a power of 2 apart share few places of the cache, and the 16 of a tile would drive each other out.
    """
    return (seq + 63) // 64 * 64 + 32


@compiled
def _new_entries(n):
    """Entries that begin with a line of the cache: a row of a tile is then one line, and not parts of two."""
    memory = np.zeros(n + 15, np.uint32)
    first = np.int64(-np.int64(memory.ctypes.data) % 64) // 4
    return memory[first : first + n]


@compiled
def _new_floats(n):
    return _new_entries(n).view(np.float32)


@compiled
def _forward(taken, tiles, q, k, v, cos, sin, out, parts):
    """q, k, v (batch, heads, seq, d / 2) in pairs -> out (batch, seq, heads, d), by threads that take heads in turn.

    Where these are few, every `parts`-th block of queries of a head is a unit of its own. cos and sin (1 or batch,
    seq, d / 2) turn q and k; without any, (1, 0, 0), they stay as they are.
    """
    batch, heads, seq, half = q.shape
    kv, group, wide = k.shape[1], heads // k.shape[1], _wide(seq)
    d = (2 * half + 31) // 32 * 32 if tiles else 2 * half
    all_k = _new_entries(seq * half).reshape(seq, half)
    turned_k, joined_v = _new_entries(d // 2 * wide), _new_entries(wide // 2 * d)
    block, scores = _new_entries(_QUERIES * d // 2), _new_floats(_QUERIES * wide)
    weights, mixed = _new_entries(_QUERIES * wide // 2), _new_floats(_QUERIES * d)
    short = weights.view(np.uint16)
    totals, nothing = _new_floats(_QUERIES), np.zeros((1, 8), np.uint32)
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
                    totals[i] = _weigh(scores, i * wide, keys, first + i + 1, scale, short, i * wide)
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
    kv, group, wide = k.shape[1], heads // k.shape[1], _wide(seq)
    d = (2 * half + 31) // 32 * 32 if tiles else 2 * half
    all_k = _new_entries(seq * half).reshape(seq, half)
    turned_k, turned_v = _new_entries(d // 2 * wide), _new_entries(d // 2 * wide)
    joined_k = _new_entries(wide // 2 * d)
    q_block, g_block = _new_entries(_QUERIES * d // 2).reshape(_QUERIES, d // 2), _new_entries(_QUERIES * d // 2)
    joined_q, turned_q = _new_entries(_QUERIES // 2 * d).reshape(_QUERIES // 2, d), _new_entries(_QUERIES // 2 * d)
    joined_g, turned_g = _new_entries(_QUERIES // 2 * d).reshape(_QUERIES // 2, d), _new_entries(_QUERIES // 2 * d)
    scores, slopes = _new_floats(_QUERIES * wide), _new_floats(_QUERIES * wide)
    short_slopes = _new_entries(_QUERIES * wide // 2)
    joined_weights, joined_slopes = _new_entries(short_slopes.size), _new_entries(short_slopes.size)
    sum_k, sum_v = _new_floats(wide * d), _new_floats(wide * d)
    sum_q, nothing = _new_floats(_QUERIES * d), np.zeros((1, 8), np.uint32)
    parts, means = _new_floats(_QUERIES), _new_floats(_QUERIES)
    scale = np.float32(1 / np.sqrt(2 * half))
    short, sixteen = short_slopes.view(np.uint16), _new_entries(LANES * d)
    turned_sum_k = sum_k.view(np.uint32).reshape(d, wide)
    turned_sum_v = sum_v.view(np.uint32).reshape(d, wide)
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
                    row, seen = i * wide, first + i + 1
                    parts[i], means[i] = _lean_short(scores, row, keys, seen, scale, slopes, row)
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
                _write_rotated(sum_q, d, grad_q[b, :, h], first, last, cos[table], sin[table])
        if tiles:
            _write_turned(turned_sum_k, wide, sixteen, grad_k[b, head], cos[table], sin[table])
            _write_turned(turned_sum_v, wide, sixteen, grad_v[b, head], cos[table][:0], sin[table])
        else:
            _write_rotated(sum_k, d, grad_k[b, head], 0, seq, cos[table], sin[table])
            _write(sum_v, d, grad_v[b, head], 0, seq)
    if tiles:
        _set_tiles(False)


@compiled
def _forward_wide(taken, q, k, v, out, parts):
    """`_forward` in float32, d numbers a row: nothing is rounded, and nothing joined."""
    batch, heads, seq, d = q.shape
    kv = k.shape[1]
    group, wide = heads // kv, _wide(seq)
    turned_k, all_v = _new_floats(d * wide), _new_floats(wide * d)
    block, scores = _new_floats(_QUERIES * d), _new_floats(_QUERIES * wide)
    mixed, totals = _new_floats(_QUERIES * d), _new_floats(_QUERIES)
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
                    totals[i] = _weigh(scores, i * wide, keys, first + i + 1, scale, scores, i * wide)
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
    group, wide = heads // kv, _wide(seq)
    turned_k, turned_v = _new_floats(d * wide), _new_floats(d * wide)
    all_k, sum_q = _new_floats(wide * d), _new_floats(_QUERIES * d)
    q_block, g_block = _new_floats(_QUERIES * d), _new_floats(_QUERIES * d)
    scores, slopes = _new_floats(_QUERIES * wide), _new_floats(_QUERIES * wide)
    sum_k, sum_v = _new_floats(wide * d), _new_floats(wide * d)
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
