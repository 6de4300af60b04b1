"""The decode step as machine code: one call of a small team of threads computes a token of every sequence.

numba compiles what stands here. Three things decide the speed, and lesson 52 measures them:

- a weight is read once, as a stream, in the form it has in memory (float32, bfloat16, int8, int4), for all vectors.
  `_product` writes this loop with LLVM's vectors, so the same source serves AVX-512, AVX2 and NEON. Weights are widened
  in registers; but where the processor has a dot product of bfloat16 or of bytes, the vectors are rounded to such
  numbers instead, which is less work a weight and less to hold in the nearest cache;
- the whole network is one call, and its phases are kept apart by barriers in which threads spin, not sleep;
- norms, rotations, attention and activations use what is in the caches from the product before them.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_edu.native import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    address,
    atomic_add,
    atomic_load,
    atomic_store,
    broadcast,
    compiled,
    exp,
    has_dots,
    load,
    narrow,
    splat,
    vector,
    widen,
)

__all__ = ["Team", "prepare_rows", "product_rows", "work"]

_AHEAD = 4096  # bytes between the end of what is read and what is asked for


def _nibbles(b: ir.IRBuilder, row: ir.Value, at: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The next 32 weights of an int4 row, 8 added to each: the first 16 in low bits, the others in high ones."""
    packed = load(b, row, b.lshr(at, ir.Constant(I64, 1)), vector(I8))
    return b.and_(packed, splat(I8, 15)), b.lshr(packed, splat(I8, 4))


def _group_scale(b: ir.IRBuilder, scales: ir.Value, at: ir.Value) -> ir.Value:
    """The scale of the next 32 weights of an int4 row, in float32."""
    scale = load(b, scales, b.lshr(at, ir.Constant(I64, 4)), I16)
    return b.bitcast(b.shl(b.zext(scale, I32), ir.Constant(I32, 16)), F32)


def _expand(b: ir.IRBuilder, kind: str, row: ir.Value, scales: ir.Value, at: ir.Value) -> list[ir.Value]:
    """The next 32 weights of a row as two float32 vectors; those in bfloat16 as the even ones and the odd ones.

    A bfloat16 is the upper half of a float32. Two neighbours are the halves of 32 bits, so a shift gives one and a mask
    the other, without spreading 16 numbers over a register first.
    """
    if kind == "int4":
        halves = [b.sext(b.sub(half, splat(I8, 8)), vector(I32)) for half in _nibbles(b, row, at)]
        scale = broadcast(b, _group_scale(b, scales, at), LANES)
        return [b.fmul(b.sitofp(half, vector(F32)), scale) for half in halves]
    if kind == "bfloat16":
        pairs = load(b, row, b.shl(at, ir.Constant(I64, 1)), vector(I32))
        halves = b.shl(pairs, splat(I32, 16)), b.and_(pairs, splat(I32, 0xFFFF0000))
        return [b.bitcast(half, vector(F32)) for half in halves]
    vectors = []
    for u in range(2):
        i = b.add(at, ir.Constant(I64, u * LANES))
        if kind == "float32":
            vectors.append(load(b, row, b.shl(i, ir.Constant(I64, 2)), vector(F32)))
        else:
            whole = b.sext(load(b, row, i, vector(I8)), vector(I32))
            vectors.append(b.sitofp(whole, vector(F32)))
    return vectors


_KINDS = {types.float32: ("float32", 4.0), types.uint16: ("bfloat16", 2.0), types.int8: ("int8", 1.0)}
_KINDS |= {types.uint8: ("int4", 0.5)}


def _product(rows: int, columns: int) -> Callable:
    """A numba function (w, scales, r, x, c, out): out[c + j, r + i] = w[r + i] . x[c + j], i < rows, j < columns.

    The length of a row is a multiple of 32. The kind of weight follows from the dtype of `w`: uint16 is bfloat16, uint8
    is two int4. `scales` is (rows, 1) float32 for int8 and (rows, length / 32) bfloat16 for int4, else unused. `x` is
    what `prepare_rows` makes for this kind; its dtype says which form that is.
    """

    @intrinsic
    def product(typingctx, w, scales, r, x, c, out):
        kind, width = _KINDS[w.dtype]
        form = {types.float32: "float32", types.uint16: "bfloat16", types.int8: "int8"}[x.dtype]

        def codegen(context, b, signature, args):
            if form != "float32" and form != _dots(kind):
                return context.get_dummy_value()  # compiled beside what is used here, never called
            arrays = [context.make_array(signature.args[i])(context, b, args[i]) for i in (0, 1, 3, 5)]
            w, scales, x, out = arrays
            r, c = (b.sext(args[i], I64) if args[i].type != I64 else args[i] for i in (2, 4))
            const = lambda value: ir.Constant(I64, value)
            shape = lambda array, axis: b.extract_value(array.shape, axis)
            row_bytes = b.mul(shape(w, 1), const(signature.args[0].dtype.bitwidth // 8))
            length = b.udiv(b.mul(row_bytes, const(2)), const(int(2 * width)))
            w_row = [address(b, w.data, b.mul(b.add(r, const(i)), row_bytes), I8) for i in range(rows)]
            per_row = b.mul(shape(scales, 1), const(2 if kind == "int4" else 4))
            s_row = [address(b, scales.data, b.mul(b.add(r, const(i)), per_row), I8) for i in range(rows)]
            x_bytes = b.mul(shape(x, 1), const(signature.args[3].dtype.bitwidth // 8))
            x_row = [address(b, x.data, b.mul(b.add(c, const(j)), x_bytes), I8) for j in range(columns)]
            n = 8 if form == "int8" else LANES  # partial sums of an output that a register holds
            float_n, whole_n = vector(F32, n), vector(I32, n)
            declare = lambda name, *kinds: cgutils.get_or_insert_function(b.module, ir.FunctionType(*kinds), name)
            fma = declare(f"llvm.fma.v{n}f32", float_n, [float_n] * 3)
            prefetch = declare("llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
            if form == "bfloat16":
                dot = declare("llvm.x86.avx512bf16.dpbf16ps.512", float_n, [float_n, whole_n, whole_n])
            elif form == "int8":
                dot = declare("llvm.x86.avx512.vpdpbusd.256", whole_n, [whole_n] * 3)

            several = 2 if rows * columns * 2 <= 16 else 1  # accumulators an output, to hide how long an addition takes
            before = b.basic_block
            loop, after = b.append_basic_block("loop"), b.append_basic_block("after")
            b.branch(loop)
            b.position_at_end(loop)
            at = b.phi(I64)
            at.add_incoming(const(0), before)
            sums = [b.phi(float_n) for _ in range(rows * columns * several)]
            for s in sums:
                s.add_incoming(splat(F32, 0.0, n), before)
            new = list(sums)
            here = b.lshr(b.mul(at, const(int(2 * width))), const(1))  # bytes from the beginning of a row
            # A processor guesses what a single row reads next, but loses its way among four side by side. So ask, in
            # the order of memory, for what follows these rows. One row of bfloat16 runs ahead by itself, faster.
            if rows > 1 or form != "bfloat16":
                ahead = b.add(b.mul(b.add(here, row_bytes), const(rows)), const(_AHEAD))
                for line in range(max(1, int(32 * width * rows) // 64)):
                    place = address(b, w_row[0], b.add(ahead, const(64 * line)), I8)
                    b.call(prefetch, [place, *(ir.Constant(I32, v) for v in (0, 2, 1))])  # into the second cache
            weights = []
            for i in range(rows):
                if form == "float32":
                    weights.append(_expand(b, kind, w_row[i], s_row[i], at))
                elif form == "bfloat16":  # 32 of them in one register, as they are
                    weights.append(load(b, w_row[i], here, whole_n))
                elif kind == "int8":  # plus 128, because the instruction takes bytes without a sign on one side
                    signed = load(b, w_row[i], here, vector(I8, 32))
                    weights.append(b.bitcast(b.xor(signed, splat(I8, -128, 32)), whole_n))
                else:  # plus 8, as they are
                    both = b.shuffle_vector(*_nibbles(b, w_row[i], at), ir.Constant(vector(I32, 32), list(range(32))))
                    weights.append(b.bitcast(both, whole_n))
            if form == "int8" and kind == "int4":
                w_scales = [broadcast(b, _group_scale(b, row, at), n) for row in s_row]
            for j in range(columns):
                if form == "float32":
                    offsets = [b.shl(b.add(at, const(u * LANES)), const(2)) for u in range(2)]
                    values = [load(b, x_row[j], offset, float_n) for offset in offsets]
                elif form == "bfloat16":
                    values = load(b, x_row[j], b.shl(at, const(1)), whole_n)
                else:
                    values = load(b, x_row[j], at, whole_n)
                    scale = load(b, x_row[j], b.add(length, b.lshr(at, const(3))), F32)
                    scale = broadcast(b, scale, n)
                    start = splat(I32, 0, n)
                    if kind == "int4":  # take off what the 8 of each weight will add
                        start = b.neg(b.call(dot, [start, b.bitcast(splat(I8, 8, 32), whole_n), values]))
                for i in range(rows):
                    k = (i * columns + j) * several
                    if form == "float32":
                        for u in range(2):
                            new[k + u % several] = b.call(fma, [weights[i][u], values[u], new[k + u % several]])
                        continue
                    if form == "bfloat16":
                        total = b.call(dot, [new[k], weights[i], values])
                    else:
                        part = b.sitofp(b.call(dot, [start, weights[i], values]), float_n)
                        part = b.fmul(part, w_scales[i]) if kind == "int4" else part
                        total = b.call(fma, [part, scale, new[k]])
                    new[k : k + several] = [*new[k + 1 : k + several], total]  # the accumulators take turns
            following = b.add(at, const(2 * LANES))
            at.add_incoming(following, b.basic_block)
            for s, value in zip(sums, new):
                s.add_incoming(value, b.basic_block)
            b.cbranch(b.icmp_signed("<", following, length), loop, after)
            b.position_at_end(after)
            add = declare(f"llvm.vector.reduce.fadd.v{n}f32", F32, [F32, float_n])
            out_bytes = b.shl(shape(out, 1), const(2))
            for j in range(columns):
                if form == kind == "int8":  # what the 128 of all weights have added
                    excess = load(b, x_row[j], b.add(length, b.lshr(length, const(3))), F32)
                for i in range(rows):
                    k = (i * columns + j) * several
                    total = new[k] if several == 1 else b.fadd(new[k], new[k + 1])
                    total = b.call(add, [ir.Constant(F32, -0.0), total], fastmath=("reassoc",))
                    if form == kind == "int8":
                        total = b.fsub(total, excess)
                    if kind == "int8":
                        total = b.fmul(total, b.load(b.bitcast(s_row[i], F32.as_pointer())))
                    place = b.add(b.mul(b.add(c, const(j)), out_bytes), b.shl(b.add(r, const(i)), const(2)))
                    b.store(total, address(b, out.data, place, F32), align=4)
            return context.get_dummy_value()

        return types.void(w, scales, r, x, c, out), codegen

    return product


_one, _one_by_four, _four_by_one, _four_by_four = _product(1, 1), _product(1, 4), _product(4, 1), _product(4, 4)


def _dots(kind: str) -> str | None:
    """The kind of number that vectors are rounded to for weights of this kind; None where they are not."""
    form = "int8" if kind == "int4" else kind
    return form if has_dots(form) else None


def _constant(test: Callable[[str], bool]) -> Callable:
    """A numba function of an array of weights: `test` of their kind, a constant of the program."""

    @intrinsic
    def answer(typingctx, w):
        def codegen(context, b, signature, args):
            return ir.Constant(ir.IntType(1), test(_KINDS[signature.args[0].dtype][0]))

        return types.boolean(w), codegen

    return answer


_short_dots = _constant(lambda kind: _dots(kind) == "bfloat16")
_byte_dots = _constant(lambda kind: _dots(kind) == "int8")
_halves = _constant(lambda kind: kind == "bfloat16")


if sys.platform == "win32":
    _yield = types.ExternalFunction("SwitchToThread", types.int32())
    _sleep = types.ExternalFunction("Sleep", types.void(types.uint32))  # of milliseconds
    _NAP = np.uint32(1)
else:
    _yield = types.ExternalFunction("sched_yield", types.int32())
    _sleep = types.ExternalFunction("usleep", types.int32(types.uint32))
    _NAP = np.uint32(50)

# Places of `sync`, an int64 a cache line apart.
_ARRIVED, _PHASE, _CALLS, _STOP, _TAKEN, _N_SYNC = 0, 8, 16, 24, 32, 40


@compiled
def _wait(sync, place, seen):
    """Return when sync[place] differs from `seen`: spin, then let others run, then sleep between looks."""
    spins = 0
    while atomic_load(sync, place, 0) == seen:
        spins += 1
        if spins > 20_000:
            if spins < 40_000:
                _yield()
            else:
                _sleep(_NAP if spins < 60_000 else np.uint32(20) * _NAP)


@compiled
def _barrier(sync, n):
    """Return when all `n` threads have come here; the pieces of the next phase are then there to be taken."""
    phase = atomic_load(sync, _PHASE, 0)
    if atomic_add(sync, _ARRIVED, 1) == n - 1:
        atomic_store(sync, _ARRIVED, 0)
        atomic_store(sync, _TAKEN, 0)
        atomic_store(sync, _PHASE, phase + 1)
    else:
        _wait(sync, _PHASE, phase)


@compiled
def _take(sync, most, total, unit):
    """The next rows of `total` that nobody has taken, as first and last; two zeros when there are none.

    Threads take pieces and have no fixed share, because one that is slower, or interrupted, would keep all waiting.
    There are at most `most` pieces of whole units, the last of which may be shorter.
    """
    units = (total + unit - 1) // unit
    pieces = min(units, most)
    piece = atomic_add(sync, _TAKEN, 1)
    if piece >= pieces:
        return 0, 0
    return unit * (units * piece // pieces), min(total, unit * (units * (piece + 1) // pieces))


@compiled
def _product_rows(w, scales, x, out, first, last, n):
    r = first
    while last - r >= 4 and n > 1:
        j = 0
        while n - j >= 4:
            _four_by_four(w, scales, r, x, j, out)
            j += 4
        while j < n:
            _four_by_one(w, scales, r, x, j, out)
            j += 1
        r += 4
    while r < last:
        for j in range(n):
            _one(w, scales, r, x, j, out)
        r += 1


@compiled
def _halved(i):
    """Where number i of a vector goes in groups of 32 that have the 16 even ones first, then the odd ones."""
    return i - i % 32 + i % 2 * 16 + i % 32 // 2


@compiled
def _to_bytes(x, out):
    """A vector in bytes for `_product`: the bytes, a float32 scale for each 32, and 128 times the sum of all.

    A group is rounded to 127 steps of its own largest number. What is not finite makes its scale NaN.
    """
    width = x.size
    scales, total = out[width:].view(np.float32), np.float32(0)
    for g in range(width // 32):
        group, to = x[32 * g : 32 * g + 32], out[32 * g : 32 * g + 32]
        largest, zero = np.float32(1e-30), np.float32(0)
        for i in range(32):
            largest = max(largest, abs(group[i]))
            zero += group[i] * np.float32(0)
        steps, whole = np.float32(127) / largest, np.int32(0)
        for i in range(32):
            y = np.rint(group[i] * steps)
            q = np.int32(y if abs(y) <= np.float32(127) else np.float32(0))
            to[i] = q
            whole += q
        scales[g] = largest / np.float32(127) + zero
        total += scales[g] * np.float32(whole)
    scales[width // 32] = np.float32(128) * total


@compiled
def _as_bytes(memory, n, width):
    """Room for n vectors of `_to_bytes`: a byte a number, four a scale, four for the sum."""
    stride = width + width // 8 + 4
    return memory.view(np.int8)[: n * stride].reshape((n, stride))


@compiled
def _as_shorts(memory, n, width):
    return memory.view(np.uint16)[: n * width].reshape((n, width))


@compiled
def _as_floats(memory, n, width):
    return memory[: n * width].reshape((n, width))


@compiled
def prepare_rows(w, x, memory, n):
    """n vectors in the form in which these weights are multiplied, into `memory`, the float32 of this thread.

    Where the processor has instructions for it, int8 and int4 take bytes, and bfloat16 bfloat16. Else that takes the
    even numbers of each 32 before the odd ones, as it falls apart itself, and all others take x as it is.
    """
    width = x.shape[1]
    if _byte_dots(w):
        rows = _as_bytes(memory, n, width)
        for j in range(n):
            _to_bytes(x[j], rows[j])
    elif _short_dots(w):
        rounded = _as_shorts(memory, n, width)
        for j in range(n):
            for i in range(width):
                rounded[j, i] = narrow(x[j, i], rounded)
    elif _halves(w):
        halves = _as_floats(memory, n, width)
        for j in range(n):
            for g in range(0, width, 32):
                for i in range(16):
                    halves[j, g + i] = x[j, g + 2 * i]
                    halves[j, g + 16 + i] = x[j, g + 2 * i + 1]


@compiled
def product_rows(w, scales, x, memory, out, first, last, n):
    """out[j, r] = w[r] . x[j] for rows first <= r < last and j < n, after `prepare_rows` of the same x."""
    width = x.shape[1]
    if _byte_dots(w):
        _product_rows(w, scales, _as_bytes(memory, n, width), out, first, last, n)
    elif _short_dots(w):
        _product_rows(w, scales, _as_shorts(memory, n, width), out, first, last, n)
    elif _halves(w):
        _product_rows(w, scales, _as_floats(memory, n, width), out, first, last, n)
    else:
        _product_rows(w, scales, x, out, first, last, n)


@compiled
def _normalise(x, weight, eps, out):
    total = np.float32(0)
    for i in range(weight.size):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(weight.size) + eps)
    for i in range(weight.size):
        out[i] = x[i] * scale * weight[i]


@compiled
def _attend(q, k, v, none, n_keys, scores, out):
    """One key/value head: q (group, width), k and v (room, width) -> out (group, width), over the first n_keys keys."""
    group, width = q.shape
    g = 0
    while group - g >= 4:
        for j in range(n_keys):
            _one_by_four(k, none, j, q, g, scores)
        g += 4
    while g < group:
        for j in range(n_keys):
            _one(k, none, j, q, g, scores)
        g += 1
    for g in range(group):
        s = scores[g]
        best = s[0]
        for j in range(n_keys):
            best = max(best, s[j])
        total = np.float32(0)
        for j in range(n_keys):
            e = exp(s[j] - best)
            s[j] = e
            total += e
        o = out[g]
        for d in range(width):
            o[d] = np.float32(0)
        whole = n_keys - n_keys % 8
        for j in range(0, whole, 8):
            v0, v1, v2, v3 = v[j], v[j + 1], v[j + 2], v[j + 3]
            v4, v5, v6, v7 = v[j + 4], v[j + 5], v[j + 6], v[j + 7]
            for d in range(width):
                even = s[j] * widen(v0[d]) + s[j + 1] * widen(v1[d])
                odd = s[j + 2] * widen(v2[d]) + s[j + 3] * widen(v3[d])
                even += s[j + 4] * widen(v4[d]) + s[j + 5] * widen(v5[d])
                odd += s[j + 6] * widen(v6[d]) + s[j + 7] * widen(v7[d])
                o[d] += even + odd
        for j in range(whole, n_keys):
            for d in range(width):
                o[d] += s[j] * widen(v[j, d])
        scale = np.float32(1) / total
        for d in range(width):
            o[d] *= scale


@compiled
def work(me, sync, network, state):
    """One token of each sequence, by a team. Thread 0 calls this for each step; the others call it once, and help until
    they are told to stop.

    network: (embedding, wqkv, wo, w13, w2, output, each weight with its scales, norms, cos, sin, eps, head_dim, n_kv).
    state: (numbers, tokens, slots, positions, keys, values, x, normed, qkv, q, scores, mixed, attended, gate_up,
    hidden, update, logits, best, memory). numbers: how many tokens, how many threads.
    """
    embedding, wqkv, s_qkv, wo, s_o, w13, s_13, w2, s_2, output, s_out, norms, cos, sin, eps, head_dim, n_kv = network
    numbers, tokens, slots, positions, keys, values, x, normed, qkv, q, scores, mixed, attended, gate_up, hidden = (
        state[:15]
    )
    update, logits, best, memory = state[15:]
    memory = memory[me]
    threads = numbers[1]
    dim, n_layers = norms.shape[1], wqkv.shape[0]
    n_heads = q.shape[1]
    group = n_heads // n_kv
    heads = n_heads + 2 * n_kv
    ffn = w13.shape[1] // 2
    mine = normed[me]
    most = 8 * threads if threads > 1 else 1  # pieces of a phase
    scale = np.float32(1 / np.sqrt(head_dim))
    calls = 0
    while True:
        if me == 0:
            atomic_add(sync, _CALLS, 1)
        else:
            _wait(sync, _CALLS, calls)
            calls = atomic_load(sync, _CALLS, 0)
            if atomic_load(sync, _STOP, 0):
                return
        n = numbers[0]
        for b in range(me, n, threads):
            for i in range(dim):
                x[b, i] = widen(embedding[tokens[b], i])
        _barrier(sync, threads)
        for layer in range(n_layers):
            # Queries, keys and values: whole heads at a time, rotated and stored by the thread that has made them.
            for b in range(n):
                _normalise(x[b], norms[2 * layer], eps, mine[b])
            prepare_rows(wqkv, mine, memory, n)
            first, last = _take(sync, most, heads, 1)
            while last > first:
                product_rows(wqkv[layer], s_qkv[layer], mine, memory, qkv, first * head_dim, last * head_dim, n)
                for b in range(n):
                    place = positions[b]
                    for head in range(first, last):
                        row = qkv[b, head * head_dim : (head + 1) * head_dim]
                        if head < n_heads + n_kv:
                            for i in range(head_dim // 2):
                                even, odd, c, s = row[2 * i], row[2 * i + 1], cos[place, i], sin[place, i]
                                row[2 * i], row[2 * i + 1] = even * c - odd * s, even * s + odd * c
                        if head < n_heads:
                            for i in range(head_dim):
                                q[b, head, _halved(i) if _halves(keys) else i] = row[i] * scale
                        elif head < n_heads + n_kv:
                            to = keys[layer, slots[b], head - n_heads, place]
                            for i in range(head_dim):
                                to[i] = narrow(row[i], keys)
                        else:
                            to = values[layer, slots[b], head - n_heads - n_kv, place]
                            for i in range(head_dim):
                                to[i] = narrow(row[i], values)
                first, last = _take(sync, most, heads, 1)
            _barrier(sync, threads)
            first, last = _take(sync, most, n * n_kv, 1)
            while last > first:
                for item in range(first, last):
                    b, head = item // n_kv, item % n_kv
                    here = q[b, head * group : (head + 1) * group]
                    k, v = keys[layer, slots[b], head], values[layer, slots[b], head]
                    _attend(here, k, v, s_o[0], positions[b] + 1, scores[me], mixed[me])
                    for g in range(group):
                        for i in range(head_dim):
                            attended[b, (head * group + g) * head_dim + i] = mixed[me, g, i]
                first, last = _take(sync, most, n * n_kv, 1)
            _barrier(sync, threads)
            prepare_rows(wo, attended, memory, n)
            first, last = _take(sync, most, dim, 4)
            while last > first:
                product_rows(wo[layer], s_o[layer], attended, memory, update, first, last, n)
                for b in range(n):
                    for i in range(first, last):
                        x[b, i] += update[b, i]
                first, last = _take(sync, most, dim, 4)
            _barrier(sync, threads)
            # The feed-forward half: a piece is the same rows of gate and up.
            for b in range(n):
                _normalise(x[b], norms[2 * layer + 1], eps, mine[b])
            prepare_rows(w13, mine, memory, n)
            first, last = _take(sync, most, ffn, 4)
            while last > first:
                product_rows(w13[layer], s_13[layer], mine, memory, gate_up, first, last, n)
                product_rows(w13[layer], s_13[layer], mine, memory, gate_up, ffn + first, ffn + last, n)
                for b in range(n):
                    for i in range(first, last):
                        gate, up = gate_up[b, i], gate_up[b, ffn + i]
                        hidden[b, i] = gate / (np.float32(1) + exp(min(-gate, np.float32(80.0)))) * up
                first, last = _take(sync, most, ffn, 4)
            _barrier(sync, threads)
            prepare_rows(w2, hidden, memory, n)
            first, last = _take(sync, most, dim, 4)
            while last > first:
                product_rows(w2[layer], s_2[layer], hidden, memory, update, first, last, n)
                for b in range(n):
                    for i in range(first, last):
                        x[b, i] += update[b, i]
                first, last = _take(sync, most, dim, 4)
            _barrier(sync, threads)
        for b in range(n):
            _normalise(x[b], norms[2 * n_layers], eps, mine[b])
            best[me, b, 0], best[me, b, 1], best[me, b, 2] = -np.inf, 0, 0
        # The likeliest of this thread's tokens, and 0 * the sum of their logits, NaN where one is not finite.
        prepare_rows(output, mine, memory, n)
        vocab = output.shape[0]
        first, last = _take(sync, most, vocab, 4)
        while last > first:
            product_rows(output, s_out, mine, memory, logits, first, last, n)
            for b in range(n):
                top, index, zero = best[me, b, 0], best[me, b, 1], np.float32(0)
                for i in range(first, last):
                    z = logits[b, i]
                    zero += z * np.float32(0)
                    if z > top:
                        top, index = np.float64(z), np.float64(i)
                best[me, b, 0], best[me, b, 1] = top, index
                best[me, b, 2] += zero
            first, last = _take(sync, most, vocab, 4)
        _barrier(sync, threads)
        if me == 0:
            return


@compiled
def _dismiss(sync):
    atomic_store(sync, _STOP, 1)
    atomic_add(sync, _CALLS, 1)


class Team:
    """Threads that compute steps together; the one that calls `step` is the first of them.

    Helpers start with the first step and wait in machine code between steps, for a while awake and then asleep, so that
    a step begins at once. They end with the team.
    """

    def __init__(self, threads: int, network: tuple, state: tuple) -> None:
        self.threads, self.network, self.state = threads, network, state
        state[0][1] = threads
        self.process = None

    def _start(self) -> None:
        sync = np.zeros(_N_SYNC, np.int64)
        weakref.finalize(self, _dismiss, sync)  # the helpers hold the arrays, not the team
        try:
            for me in range(1, self.threads):
                arguments = (me, sync, self.network, self.state)
                threading.Thread(target=work, args=arguments, daemon=True, name="decode").start()
        except RuntimeError:  # the system gives no more threads: those that wait would wait for ever
            _dismiss(sync)
            raise
        self.process, self.sync = os.getpid(), sync

    def step(self) -> None:
        """Compute what `state` asks for."""
        if self.process != os.getpid():  # the first step, or the first after a fork, which copies no threads
            self._start()
        work(0, self.sync, self.network, self.state)
