"""What the processor and its memory can do at best: the ceilings that a kernel's speed is measured against.

The loops have the shape of the matrix kernels' inner ones, with all else taken away: they read memory and add it up,
or repeat the kernels' own dot product and multiply-add on operands that stay in registers and in the L1 cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import (
    F32,
    I8,
    I32,
    I64,
    EmitterHere,
    address,
    constant,
    vector,
)

_LANES = 16  # a register's 32-bit lanes in the kernels
_STREAM = 8  # registers read in one turn of the loop: 512 bytes
_CHAINS = 12  # independent sums: enough to hide the latency of either instruction
_OPERANDS = 2048  # bytes of L1 cache that the dot products' operands are read from
_QUADS = 8  # groups of four columns in a block
_MOST_TOKENS = 8
_TURNS = 1 << 18
_SECONDS, _LEAST_TIMES = 0.7, 10  # how long a rate is measured, and how often at least


def _accumulate(builder, count, zero, chains, turn):
    """Emit `count` turns of a loop over `chains` sums, `turn(i, sums)` returning the new ones; return their sum."""
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(chains)]
    with cgutils.for_range(builder, count, intp=I64) as loop:
        for place, value in zip(sums, turn(loop.index, [builder.load(s) for s in sums]), strict=True):
            builder.store(value, place)
    total = builder.load(sums[0])
    add = builder.fadd if zero.type.element == F32 else builder.add
    for place in sums[1:]:
        total = add(total, builder.load(place))
    return total


def _first(builder, total):
    """Return something of a vector that depends on the whole loop, as float64, so that nothing is optimised away."""
    lane = builder.extract_element(total, I32(0))
    as_double = builder.fpext if total.type.element == F32 else builder.sitofp
    return as_double(lane, ir.DoubleType())


@intrinsic
def _read(typingctx, start, turns):
    """Read turns * 512 bytes from an address that is a multiple of 64."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)

        def turn(i, sums):
            at = builder.add(args[0], builder.mul(i, I64(_STREAM * 64)))
            loaded = [e.load(builder.add(at, I64(64 * j)), vector(I32, _LANES), 64) for j in range(_STREAM)]
            return [builder.add(s, x) for s, x in zip(sums, loaded, strict=True)]

        return _first(builder, _accumulate(builder, args[1], constant(I32, _LANES, 0), _STREAM, turn))

    return types.float64(types.int64, types.int64), codegen


@intrinsic
def _fma(typingctx, turns, x, y):
    """Do turns * 12 * 16 float32 multiply-adds."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)
        x, y = (e.splat(value, _LANES) for value in args[1:])

        def turn(_, sums):
            return [e.fma(s, x, y) for s in sums]

        return _first(builder, _accumulate(builder, args[0], constant(F32, _LANES, 0.0), _CHAINS, turn))

    return types.float64(types.int64, types.float32, types.float32), codegen


@intrinsic
def _dot(typingctx, turns, operands):
    """Do turns * 12 * 64 products of bytes, one operand read from 2 KB at an address that is a multiple of 64."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)

        def turn(i, sums):
            offset = builder.and_(builder.mul(i, I64(64)), I64(_OPERANDS - 64))
            codes = e.load(builder.add(args[1], offset), vector(I8, 4 * _LANES), 64)
            fours = [e.load(builder.add(args[1], I64(64 * j)), vector(I8, 4 * _LANES), 64) for j in range(_CHAINS)]
            return [e.dot4(s, codes, four) for s, four in zip(sums, fours, strict=True)]

        return _first(builder, _accumulate(builder, args[0], constant(I32, _LANES, 0), _CHAINS, turn))

    return types.float64(types.int64, types.int64), codegen


@intrinsic
def _block_dots(typingctx, turns, operands):
    """Multiply `turns` times the rows and tokens of `_block_shape`, blocks of 32 columns in 2 KB of operands."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)
        rows, tokens = _block_shape()

        def turn(i, sums):
            offset = builder.and_(builder.mul(i, I64(64)), I64(_OPERANDS // 2 - 64))
            at = builder.add(args[1], offset)
            codes = ((j, e.load(builder.add(at, I64(64 * j)), vector(I8, 4 * rows), 32)) for j in range(_QUADS))
            xs = [builder.add(args[1], I64(_OPERANDS // 2 + 4 * _QUADS * t)) for t in range(tokens)]
            return e.block_dots(codes, True, xs, sums)

        return _first(builder, _accumulate(builder, args[0], constant(I32, rows, 0), tokens, turn))

    return types.float64(types.int64, types.int64), codegen


def _block_shape() -> tuple[int, int]:
    """Return the rows and tokens that the kernels' inner loop takes at once."""
    return EmitterHere(None).dot_shape(_MOST_TOKENS, True)


@njit(cache=True, nogil=True, parallel=True)
def _read_all(start, turns, threads, results):
    for thread in prange(threads):
        first, last = turns * thread // threads, turns * (thread + 1) // threads
        results[thread] = _read(start + first * 512, last - first)


@njit(cache=True, nogil=True, parallel=True)
def _fma_all(turns, threads, results):
    for thread in prange(threads):
        results[thread] = _fma(turns, np.float32(0.5), np.float32(1.0))


@njit(cache=True, nogil=True, parallel=True)
def _dot_all(turns, operands, threads, results):
    for thread in prange(threads):
        results[thread] = _dot(turns, address(operands))


@njit(cache=True, nogil=True, parallel=True)
def _block_dots_all(turns, operands, threads, results):
    for thread in prange(threads):
        results[thread] = _block_dots(turns, address(operands))


def _aligned(size: int) -> np.ndarray:
    raw = np.empty(size + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:size]


class ReadProbe:
    """A large buffer, to be read by all threads at once.

    Attributes:
        size: bytes that one reading reads.
    """

    def __init__(self, size: int, threads: int) -> None:
        """Take memory of about `size` bytes, and touch all of it."""
        self.size = max(1, size // 512) * 512
        self._buffer = _aligned(self.size)
        self._buffer[:] = 1
        self._threads, self._results = threads, np.zeros(threads)
        self.seconds()

    def seconds(self) -> float:
        """Read the buffer once; return how long it took."""
        started = time.perf_counter()
        _read_all(self._buffer.ctypes.data, self.size // 512, self._threads, self._results)
        return time.perf_counter() - started


def read_bandwidth(threads: int, size: int = 1 << 29) -> float:
    """Return the bytes a second that this many threads together read from memory: the best of several times.

    size: bytes read; several times the last cache. The threads must have been set with `runtime.set_threads`.
    """
    probe = ReadProbe(size, threads)
    return probe.size / _best(probe.seconds)


def _best(call: Callable[[], float]) -> float:
    """Return the least of many times: on a busy machine all threads run together only now and then."""
    until, times = time.perf_counter() + _SECONDS, [call()]
    while len(times) < _LEAST_TIMES or time.perf_counter() < until:
        times.append(call())
    return min(times)


def _timed(call: Callable[[], None]) -> Callable[[], float]:
    def once() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    call()
    return once


def fma_rate(threads: int) -> float:
    """Return the float32 multiply-adds a second of this many threads together: the best of several times."""
    results = np.zeros(threads)
    seconds = _best(_timed(lambda: _fma_all(_TURNS, threads, results)))
    return _TURNS * _CHAINS * _LANES * threads / seconds


def dot_rate(threads: int) -> float:
    """Return the int8 multiply-adds a second of this many threads together: the best of several times.

    The better of the bare instruction and of the kernels' inner loop, which on some processors needs fewer of them.
    """
    operands = _aligned(_OPERANDS)
    operands[:] = np.arange(_OPERANDS) % 16
    results = np.zeros(threads)
    bare = _best(_timed(lambda: _dot_all(_TURNS, operands, threads, results)))
    loop = _best(_timed(lambda: _block_dots_all(_TURNS, operands, threads, results)))
    rows, tokens = _block_shape()
    return _TURNS * threads * max(_CHAINS * 4 * _LANES / bare, rows * tokens * 4 * _QUADS / loop)
