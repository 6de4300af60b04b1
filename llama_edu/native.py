"""What kernels in machine code are made of: functions that numba compiles, LLVM's vectors, short numbers, threads."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.polynomial import Chebyshev, Polynomial

from llama_edu import jit

LANES = 16  # numbers a vector holds: one register of AVX-512, two of AVX2, four of NEON
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def compiled(function: Callable) -> Callable:
    """Compile with numba: sums in any order."""
    fast = {"nsz", "arcp", "contract", "afn", "reassoc"}
    return jit.compiled(function, fastmath=fast, error_model="numpy")


def vector(kind: ir.Type, n: int = LANES) -> ir.VectorType:
    return ir.VectorType(kind, n)


def splat(kind: ir.Type, value: float, n: int = LANES) -> ir.Constant:
    return ir.Constant(vector(kind, n), [value] * n)


def broadcast(b: ir.IRBuilder, value: ir.Value, n: int) -> ir.Value:
    one = b.insert_element(ir.Constant(vector(value.type, n), ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, splat(I32, 0, n))


def address(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    """A pointer to `kind`, `offset` bytes behind the pointer `base`."""
    return b.bitcast(b.gep(b.bitcast(base, I8.as_pointer()), [offset]), kind.as_pointer())


def pointer(context, b: ir.IRBuilder, signature, args, array: int, at: int, kind: ir.Type) -> ir.Value:
    """A pointer to `kind` at place args[at] of args[array]."""
    data = context.make_array(signature.args[array])(context, b, args[array]).data
    return b.bitcast(b.gep(data, [args[at]]), kind.as_pointer())


def load(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    return b.load(address(b, base, offset, kind), align=1)


@cache
def has_dots(kind: str) -> bool:
    """Whether machine code is made for this processor, and it has fast dot products.

    Of "bfloat16" or bytes, "int8", by an instruction of their own; of "float32" in vectors of 512 bits.
    """
    config = numba.config
    own = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX and not config.DISABLE_JIT
    has = llvmlite.binding.get_host_cpu_features().get if own else {}.get
    if kind == "float32":
        return bool(has("avx512f"))
    if kind == "bfloat16":
        return bool(has("avx512bf16"))
    return kind == "int8" and bool(has("avxvnni") or (has("avx512vnni") and has("avx512vl")))


@cache
def tile_instructions() -> bool:
    """Whether machine code is made for this processor, and it multiplies whole tiles of bfloat16 numbers (AMX)."""
    return has_dots("bfloat16") and bool(llvmlite.binding.get_host_cpu_features().get("amx-bf16"))


@cache
def has_tiles() -> bool:
    """Whether a process may use `tile_instructions`: Linux keeps the registers of those only that ask for it."""
    if not tile_instructions() or sys.platform != "linux":
        return False
    arch_prctl, request_permission, tiles = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tiles) == 0


@intrinsic
def widen(typingctx, value):
    """float32 from float32 or from the bits of a bfloat16."""

    def codegen(context, b, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        return b.bitcast(b.shl(b.zext(args[0], I32), ir.Constant(I32, 16)), F32)

    return types.float32(value), codegen


def to_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The bits of the nearest bfloat16, ties to even, of a float32 or of each in a vector."""
    n = getattr(value.type, "count", None)
    if n == LANES and has_dots("bfloat16"):  # one instruction, to which numbers below 1.2e-38 are 0, as to products
        kind = ir.FunctionType(vector(I16), [vector(F32)])
        convert = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
        return b.call(convert, [value])
    whole, half = (I32, I16) if n is None else (vector(I32, n), vector(I16, n))
    const = lambda number: ir.Constant(whole, number if n is None else [number] * n)
    bits = b.bitcast(value, whole)
    odd = b.and_(b.lshr(bits, const(16)), const(1))
    nearest = b.add(bits, b.add(odd, const(0x7FFF)))
    # The sum would carry a NaN of many bits over to a zero. Asked of the float instead, loops would not become vectors.
    is_nan = b.icmp_unsigned(">", b.and_(bits, const(0x7FFFFFFF)), const(0x7F800000))
    nearest = b.select(is_nan, b.or_(bits, const(0x400000)), nearest)
    return b.trunc(b.lshr(nearest, const(16)), half)


@cache
def _powers_of_two(degree: int) -> list[float]:
    """Coefficients of a polynomial for 2 to the f, |f| <= 1/2, that is 1 at 0 and off by about the same everywhere."""
    slope = lambda f: np.expm1(math.log(2) * f) / f
    slope = Chebyshev.interpolate(slope, degree - 1, domain=[-0.5, 0.5 + 1e-9])  # its middle is not 0, where none is
    return [1.0, *slope.convert(kind=Polynomial).coef.tolist()]


def exp2(b: ir.IRBuilder, y: ir.Value, degree: int = 5) -> ir.Value:
    """2 to each of a vector of 512 bits, y > -126, infinite from 128: to 2e-7 of its value, by degree 4 7e-6, 3 2e-4.

    Of 0 it is 1.
    """
    powers = _powers_of_two(degree)
    unary, ternary = (ir.FunctionType(y.type, [y.type] * n) for n in (1, 3))
    fma = cgutils.get_or_insert_function(b.module, ternary, "llvm.fma.v16f32")
    nearest = cgutils.get_or_insert_function(b.module, unary, "llvm.roundeven.v16f32")
    times = ir.FunctionType(y.type, [y.type, y.type, y.type, I16, I32])  # 2 to the whole
    times = cgutils.get_or_insert_function(b.module, times, "llvm.x86.avx512.mask.scalef.ps.512")
    whole = b.call(nearest, [y])
    f, e = b.fsub(y, whole), splat(F32, powers[-1])
    for factor in powers[-2::-1]:
        e = b.call(fma, [e, f, splat(F32, factor)])
    return b.call(times, [e, whole, e, ir.Constant(I16, -1), ir.Constant(I32, 4)])


@intrinsic
def narrow(typingctx, value, like):
    """`value`, a float32, as the kind of number that the array `like` holds; bfloat16 to the nearest, ties to even."""

    def codegen(context, b, signature, args):
        if signature.return_type == types.float32:
            return args[0]
        return to_bf16(b, args[0])

    return like.dtype(value, like), codegen


def entries(x: torch.Tensor) -> np.ndarray:
    """float32, or bfloat16 as neighbours in 32 bits; without a copy where a row lies so that this can be."""
    even = x.dtype == torch.float32 or not any(s % 2 for s in (*x.stride()[:-1], x.storage_offset()))
    x = (x if even and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)).detach()
    return (x if x.dtype == torch.float32 else x.view(torch.uint32)).numpy()


def numbers(x: torch.Tensor) -> np.ndarray:
    """float32, or the bits of bfloat16."""
    return (x if x.dtype == torch.float32 else x.view(torch.uint16)).numpy()


def _atomic(operation: str) -> Callable:
    @intrinsic
    def run(typingctx, array, index, value):
        def codegen(context, b, signature, args):
            data = context.make_array(signature.args[0])(context, b, args[0]).data
            place = b.gep(data, [args[1]])
            if operation == "add":
                return b.atomic_rmw("add", place, args[2], "acq_rel")
            if operation == "load":
                return b.load_atomic(place, "acquire", 8)
            b.store_atomic(args[2], place, "release", 8)
            return args[2]

        return types.int64(array, types.int64, types.int64), codegen

    return run


atomic_add, atomic_load, atomic_store = _atomic("add"), _atomic("load"), _atomic("store")


@compiled
def exp(x):
    """e to the x, x <= 88, to 2e-7 of its value, by arithmetic only: a loop over it becomes vector instructions.

    Below -87 it is e to the -87. NaN stays NaN.
    """
    y = (np.float32(-87.0) if x < np.float32(-87.0) else x) * np.float32(1.4426950408889634)
    whole = np.floor(y + np.float32(0.5))
    f = (y - whole) * np.float32(0.6931471805599453)
    p = np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def largest(row):
    """The largest of float32 or of the bits of bfloat16. NaN is larger than all; with its sign set, smaller."""
    best = np.int32(-(2**31))
    for j in range(row.size):  # the bits of floats are in order when those of negative ones are turned round
        bits = np.float32(widen(row[j])).view(np.int32)
        best = max(best, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(best ^ ((best >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@cache
def _openmp() -> Callable | None:
    """`GOMP_parallel` of the OpenMP that PyTorch has loaded, which runs a function in its threads; None without one."""
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None


def in_threads(kernel: Callable, units: int, *args: np.ndarray | np.generic | float) -> None:
    """Call the kernel in as many threads as PyTorch has; they share the `units` of work among themselves.

    A kernel takes one unit after the other, by `atomic_add(taken, 0, 1)` on its first argument, up to the last.

    They are PyTorch's own threads where it uses OpenMP. Others would have to share the cores with these, which do not
    sleep at once after an operation but spin, to be quick for the next.
    """
    taken, threads = np.zeros(1, np.int64), torch.get_num_threads()
    errors: list[BaseException] = []

    def body(_: int | None) -> None:
        try:
            kernel(taken, *args)
        except BaseException as error:  # C would drop it; an interrupt from the keyboard may come here too
            errors.append(error)

    if threads == 1:
        kernel(taken, *args)
    elif _openmp() is not None:
        _openmp()(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(body, [None] * threads))
    if errors:
        raise errors[0]
    if taken[0] < units:
        raise RuntimeError(f"a kernel did {taken[0]} of its {units} units of work: its threads did not start")
