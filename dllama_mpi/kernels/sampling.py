"""One pass over a row of logits: the best candidates, the log-sum-exp."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compiled import entry, inner
from .layout import ROWS
from .simd import (
    F32,
    I64,
    EmitterHere,
    address,
    constant,
    vector,
)

_CHUNK = 64  # logits that are compared with the worst candidate at once


def reduce_lanes(e, value, combine):
    """Emit the reduction of a vector's lanes by halves: combine(vector, vector) -> vector."""
    index, width = ir.IntType(32), value.type.count
    while width > 1:
        width //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low, high = (ir.Constant(vector(index, width), list(range(at, at + width))) for at in (0, width))
        value = combine(e.b.shuffle_vector(value, undefined, low), e.b.shuffle_vector(value, undefined, high))
    return e.b.extract_element(value, index(0))


def _larger(e):
    return lambda x, y: e.b.select(e.b.fcmp_ordered(">", x, y), x, y)


@intrinsic
def largest(typingctx, at, n, start):
    """Return the largest of `start` and n floats at an address; n is a multiple of 16."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)
        where, n, start = args

        def body(i, state):
            value = e.load(e.b.add(where, e.b.mul(i, I64(4 * ROWS))), vector(F32, ROWS), 4)
            return [_larger(e)(state[0], value)]

        (result,) = e.counted_loop(e.b.sdiv(n, I64(ROWS)), [e.splat(start, ROWS)], body)
        return reduce_lanes(e, result, _larger(e))

    return types.float32(types.int64, types.int64, types.float32), codegen


def _exponentials(keep):
    """Return an intrinsic that sums exp((value - shift) * factor) and, with `keep`, puts the terms in place."""

    @intrinsic
    def sum_exponentials(typingctx, at, n, shift, factor):
        def codegen(context, builder, signature, args):
            e = EmitterHere(builder)
            b, (where, n, shift, factor) = builder, args
            shifts, factors = e.splat(shift, ROWS), e.splat(factor, ROWS)

            def body(i, state):
                here = b.add(where, b.mul(i, I64(4 * ROWS)))
                value = e.exp(b.fmul(b.fsub(e.load(here, vector(F32, ROWS), 4), shifts), factors))
                if keep:
                    e.store(value, here, 4)
                return [b.fadd(state[0], value)]

            (result,) = e.counted_loop(b.sdiv(n, I64(ROWS)), [constant(F32, ROWS, 0.0)], body)
            return reduce_lanes(e, result, b.fadd)

        return types.float32(types.int64, types.int64, types.float32, types.float32), codegen

    return sum_exponentials


exponentials = _exponentials(keep=True)
sum_exponentials = _exponentials(keep=False)


@entry
def log_sum_exp(logits, temperature):
    """Return log(sum(exp(logits / temperature))) of a contiguous float32 row; -inf for none."""
    whole = logits.size // ROWS * ROWS
    top = largest(address(logits), whole, np.float32(-np.inf))
    for i in range(whole, logits.size):
        top = max(top, logits[i])
    if top == -np.inf:
        return -np.inf
    factor, total = np.float32(1 / temperature), 0.0
    for start in range(0, whole, 16 * _CHUNK):  # sums of a few terms in float32, of those in float64
        at = address(logits) + 4 * start
        total += sum_exponentials(at, min(16 * _CHUNK, whole - start), top, factor)
    for i in range(whole, logits.size):
        total += math.exp((logits[i] - top) * factor)
    return top / temperature + math.log(total)


@inner
def _insert(x, index, ids, values, filled):
    """Insert x into the sorted candidates if it belongs there; return how many there are."""
    k = ids.size
    if filled == k and not x > values[k - 1]:
        return filled
    j = filled if filled < k else k - 1
    while j > 0 and x > values[j - 1]:
        values[j], ids[j] = values[j - 1], ids[j - 1]
        j -= 1
    values[j], ids[j] = x, index
    return min(filled + 1, k)


@entry
def top_k(logits, ids, values):
    """Write the largest logits of a contiguous float32 row and their indices, best first, ties by lower index.

    ids: (k,) int64, values: (k,) float32; k is at most the row's length.
    """
    k, filled = ids.size, 0
    for start in range(0, logits.size, _CHUNK):
        stop = min(start + _CHUNK, logits.size)
        full = filled == k and stop - start == _CHUNK
        if full and not largest(address(logits) + 4 * start, _CHUNK, np.float32(-np.inf)) > values[k - 1]:
            continue
        for i in range(start, stop):
            filled = _insert(logits[i], i, ids, values, filled)
