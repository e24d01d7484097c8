"""Causal attention over the KV cache with grouped query heads (GQA), as products with tiles.

The cache of one slot and KV head is two matrices in the tile layout of `kernels.layout`, so that the products' kernels
serve here too, on every instruction set: keys have a row for each position, 16 positions to a tile; values have a row
for each dimension of a head, 16 dimensions to a tile, and a column for each position. As arrays of float32 or of
float16 bits:

keys    (slots, kv_heads, positions / 16, head_dim to 32s, 16)
values  (slots, kv_heads, head_dim to 16s / 16, positions, 16)

or of int8 codes, with scales for 32 dimensions of a position, as float16 bits (empty for the other two):

scales of keys    (slots, kv_heads, positions / 16, head_dim to 32s / 32, 16)
scales of values  (slots, kv_heads, head_dim to 32s / 32, positions)

A row of tiles of codes is widened into float32 scratch, which the first cache holds, before it is multiplied.

A work item is a KV head with the queries that read it: those of its group, of one or a few tokens of one sequence, so
that keys and values are read once for all of them. It goes over the positions in blocks with a running maximum and sum
(online softmax, arXiv:1805.02867). Memory beyond the written positions takes part with weight zero, so it must hold
numbers: a cache begins as zeros.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from .layout import BLOCK, F32, ROWS
from .matmul import float_rows
from .sampling import exponentials, largest
from .simd import (
    F16,
    I8,
    I32,
    I64,
    EmitterHere,
    address,
    vector,
)
from .simd import F32 as FLOAT

POSITIONS = 256  # positions in a block of the online softmax
QUERIES = 16  # most queries of an item, unless one token's group has more
LONG = 512  # positions from which an item may be cut between threads
_F32 = F32.marker


def _widen_rows(count, scale_of):
    """Return an intrinsic that widens `count` rows of 16 codes; scale_of(builder, scales, row) are a row's 16 scales.

    Its arguments are addresses: of codes, of 16 scales in float16, of 16 * count float32 to write.
    """

    @intrinsic
    def widened(typingctx, codes, scales, out):
        def codegen(context, builder, signature, args):
            e = EmitterHere(builder)
            codes, scales, out = args
            given = builder.fpext(e.load(scales, vector(F16, ROWS), 2), vector(FLOAT, ROWS))
            for row in range(count):
                wide = builder.sext(e.load(builder.add(codes, I64(ROWS * row)), vector(I8, ROWS), 1), vector(I32, ROWS))
                value = builder.fmul(builder.sitofp(wide, vector(FLOAT, ROWS)), scale_of(builder, given, row))
                e.store(value, builder.add(out, I64(4 * ROWS * row)), 4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return widened


def _one_lane(builder, scales, row):
    undefined = ir.Constant(scales.type, ir.Undefined)
    return builder.shuffle_vector(scales, undefined, ir.Constant(vector(I32, ROWS), [row] * ROWS))


_widen_keys = _widen_rows(BLOCK, lambda _builder, scales, _row: scales)  # a row: one dimension of 16 positions
_widen_values = _widen_rows(ROWS, _one_lane)  # a row: 16 dimensions of one position


@njit(cache=True, nogil=True, inline="never")
def _scores(marker, queries, keys, key_scales, begin, rows, scratch, scores):
    """Write queries (n, width) x keys of `rows` tiles from position `begin` on into scores (n, POSITIONS)."""
    width = queries.shape[1]
    if key_scales.size > 0:
        for row in range(rows):
            codes, scales = address(keys[begin // ROWS + row]), address(key_scales[begin // ROWS + row])
            for block in range(width // BLOCK):
                first = ROWS * BLOCK * block
                _widen_keys(codes + first, scales + 2 * ROWS * block, address(scratch) + 4 * first)
            float_rows(_F32, address(scratch), np.int64(0), np.int64(0), np.int64(1), width // BLOCK, address(queries),
                       4 * width, address(scores) + 4 * ROWS * row, 4 * POSITIONS, queries.shape[0])  # fmt: skip
    else:
        step = keys.itemsize * ROWS * width
        float_rows(marker, address(keys) + begin // ROWS * step, step, np.int64(0), rows, width // BLOCK,
                   address(queries), 4 * width, address(scores), 4 * POSITIONS, queries.shape[0])  # fmt: skip


@njit(cache=True, nogil=True, inline="never")
def _weighted(marker, scores, values, value_scales, begin, padded, scratch, out):
    """Write scores (n, >= padded) x values of `padded` positions from `begin` on into out (n, width)."""
    rows, n = values.shape[0], out.shape[0]
    if value_scales.size > 0:
        for row in range(rows):
            codes, scales = address(values[row]) + ROWS * begin, address(value_scales[row // 2]) + 2 * begin
            for p in range(0, padded, ROWS):
                _widen_values(codes + ROWS * p, scales + 2 * p, address(scratch) + 4 * ROWS * p)
            float_rows(_F32, address(scratch), np.int64(0), np.int64(0), np.int64(1), padded // BLOCK, address(scores),
                       4 * POSITIONS, address(out) + 4 * ROWS * row, 4 * out.shape[1], n)  # fmt: skip
    else:
        step = values.itemsize * ROWS
        float_rows(marker, address(values) + begin * step, step * values.shape[1], np.int64(0), rows, padded // BLOCK,
                   address(scores), 4 * POSITIONS, address(out), 4 * out.shape[1], n)  # fmt: skip


@njit(cache=True, nogil=True, inline="never")
def _attend(marker, queries, starts, stops, keys, key_scales, values, value_scales, first, last, scores, part, scratch,
            sums, tops, out):  # fmt: skip
    """Attend with queries (n, head_dim to 32s) over the block-aligned positions [first, last).

    starts, stops: (n,) the positions each query sees. keys, values, their scales: one slot's and head's. scores
    (n, POSITIONS), part, like out, and scratch: what their names say. Writes sums and maxima of the softmax (n,) and
    the weighted sum of values, not yet divided, into out (n, head_dim to 32s).
    """
    n = queries.shape[0]
    for q in range(n):
        sums[q], tops[q] = 0, -np.inf
        for i in range(out.shape[1]):
            out[q, i] = 0
    for begin in range(first, last, POSITIONS):
        end = min(begin + POSITIONS, last)
        padded = (end - begin + BLOCK - 1) // BLOCK * BLOCK
        _scores(marker, queries, keys, key_scales, begin, padded // ROWS, scratch, scores)
        for q in range(n):
            low, high = max(0, starts[q] - begin), min(padded, stops[q] - begin)
            for p in range(min(low, padded)):
                scores[q, p] = -np.inf
            for p in range(max(0, high), padded):
                scores[q, p] = -np.inf
            row = address(scores) + 4 * POSITIONS * q
            if high <= low:  # nothing to see here, and no maximum to subtract
                for p in range(padded):
                    scores[q, p] = 0
                part[q, 0] = 1
                continue
            top = largest(row, padded, tops[q])
            fade = np.exp(tops[q] - top)
            sums[q] = sums[q] * fade + exponentials(row, padded, top, np.float32(1))
            tops[q] = top
            part[q, 0] = fade
        for q in range(n):
            fade = part[q, 0]
            if fade != 1:
                for i in range(out.shape[1]):
                    out[q, i] *= fade
        _weighted(marker, scores, values, value_scales, begin, padded, scratch, part[:n])
        for q in range(n):
            for i in range(out.shape[1]):
                out[q, i] += part[q, i]


@njit(cache=True, nogil=True)
def _runs(slots, positions, most, begins):
    """Write where runs of up to `most` consecutive positions of one slot begin; return their number."""
    count, i = 0, 0
    while i < slots.size:
        begins[count] = i
        count += 1
        j = i + 1
        while j < slots.size and j - i < most and slots[j] == slots[i] and positions[j] == positions[j - 1] + 1:
            j += 1
        i = j
    begins[count] = slots.size
    return count


@njit(cache=True, nogil=True, inline="never")
def _take(marker, q, keys, key_scales, values, value_scales, slots, positions, window, scale, head_dim, first_head,
          last_head, group, out, out_start, begins, runs, cuts, sums, tops, partial, first_item, step):  # fmt: skip
    """Do items first_item, first_item + step, ...; see `attention`."""
    most, dims = sums.shape[1], partial.shape[2]
    kv_heads = keys.shape[1]
    queries = np.zeros((most, keys.shape[3]), np.float32)
    starts, stops = np.empty(most, np.int64), np.empty(most, np.int64)
    scores = np.empty((most, POSITIONS), np.float32)
    part = np.empty((most, dims), np.float32)
    scratch = np.empty(ROWS * max(keys.shape[3], POSITIONS) + ROWS if key_scales.size > 0 else 0, np.float32)
    scratch = scratch[-(address(scratch) // 4) % ROWS :]  # a vector then lies in one line of the cache
    for item in range(first_item, runs * kv_heads * cuts, step):
        piece, cut = item // cuts, item % cuts
        run, kv = piece // kv_heads, piece % kv_heads
        head = first_head // group + kv
        low, high = max(first_head, head * group) - first_head, min(last_head, (head + 1) * group) - first_head
        n = 0
        for t in range(begins[run], begins[run + 1]):
            for h in range(low, high):
                for i in range(head_dim):
                    queries[n, i] = q[t, h * head_dim + i] * scale
                stops[n] = positions[t] + 1
                starts[n] = max(0, stops[n] - window) if window > 0 else 0
                n += 1
        first, last = starts[0] // BLOCK * BLOCK, stops[n - 1]
        if cuts > 1:
            blocks = (last - first + POSITIONS - 1) // POSITIONS
            last = min(last, first + POSITIONS * (blocks * (cut + 1) // cuts))
            first += POSITIONS * (blocks * cut // cuts)
        slot = slots[begins[run]]
        result = partial[item if cuts > 1 else first_item]
        _attend(marker, queries[:n], starts, stops, keys[slot, kv], key_scales[slot, kv], values[slot, kv],
                value_scales[slot, kv], first, last, scores, part, scratch, sums[item], tops[item], result)  # fmt: skip
        if cuts == 1:
            n = 0
            for t in range(begins[run], begins[run + 1]):
                for h in range(low, high):
                    divisor = np.float32(1) / sums[item, n]
                    for i in range(head_dim):
                        out[t, out_start + h * head_dim + i] = result[n, i] * divisor
                    n += 1


@njit(cache=True, nogil=True, parallel=True)
def _take_all(marker, q, keys, key_scales, values, value_scales, slots, positions, window, scale, head_dim, first_head,
              last_head, group, out, out_start, begins, runs, cuts, sums, tops, partial, threads):  # fmt: skip
    # Nothing but the loop: whatever else stands in a parallel function costs seconds of compilation.
    for thread in prange(threads):
        _take(marker, q, keys, key_scales, values, value_scales, slots, positions, window, scale, head_dim, first_head,
              last_head, group, out, out_start, begins, runs, cuts, sums, tops, partial, np.int64(thread),
              threads)  # fmt: skip


@njit(cache=True, nogil=True)
def attention(marker, q, keys, key_scales, values, value_scales, slots, positions, window, scale, head_dim, first_head,
              last_head, group, out, out_start, threads):  # fmt: skip
    """Attend from each token to the positions of its slot up to its own.

    marker: the empty array of the cache's format, f16 or f32, or of f32 for int8 codes. q: (tokens, >= heads *
    head_dim) float32, rotated, for the rank's heads [first_head, last_head) of the whole model; keys, values and
    scales: this rank's cache, see the module; group: query heads a KV head; window: positions a token sees, itself
    included, or 0 for all; out: (tokens, >= heads * head_dim) float32, written from column out_start on.
    """
    kv_heads = keys.shape[1]
    each = max(1, QUERIES // group)
    begins = np.empty(slots.size + 1, np.int64)
    runs = _runs(slots, positions, each, begins)
    cuts, furthest = 1, 0
    for position in positions:
        furthest = max(furthest, position)
    if runs * kv_heads < threads and furthest >= LONG:
        cuts = (threads + runs * kv_heads - 1) // (runs * kv_heads)
    items, most = runs * kv_heads * cuts, each * group
    sums, tops = np.zeros((items, most), np.float32), np.zeros((items, most), np.float32)
    partial = np.zeros((items if cuts > 1 else threads, most, values.shape[2] * ROWS), np.float32)
    if threads == 1:
        _take(marker, q, keys, key_scales, values, value_scales, slots, positions, window, scale, head_dim, first_head,
              last_head, group, out, out_start, begins, runs, cuts, sums, tops, partial, np.int64(0),
              np.int64(1))  # fmt: skip  # not literals, for which it would be compiled again
    else:
        _take_all(marker, q, keys, key_scales, values, value_scales, slots, positions, window, scale, head_dim,
                  first_head, last_head, group, out, out_start, begins, runs, cuts, sums, tops, partial,
                  threads)  # fmt: skip
    if cuts > 1:
        _merge(partial, sums, tops, begins, runs, kv_heads, cuts, head_dim, first_head, last_head, group, out,
               out_start)  # fmt: skip


@njit(cache=True, nogil=True)
def _merge(partial, sums, tops, begins, runs, kv_heads, cuts, head_dim, first_head, last_head, group, out, out_start):
    """Join the softmax of items that were cut between threads."""
    for piece in range(runs * kv_heads):
        run, kv = piece // kv_heads, piece % kv_heads
        head = first_head // group + kv
        low, high = max(first_head, head * group) - first_head, min(last_head, (head + 1) * group) - first_head
        n = 0
        for t in range(begins[run], begins[run + 1]):
            for h in range(low, high):
                top, total = np.float32(-np.inf), np.float32(0)
                for item in range(piece * cuts, (piece + 1) * cuts):
                    top = max(top, tops[item, n])
                column = out_start + h * head_dim
                for i in range(head_dim):
                    out[t, column + i] = 0
                for item in range(piece * cuts, (piece + 1) * cuts):
                    weight = np.exp(tops[item, n] - top)
                    total += weight * sums[item, n]
                    for i in range(head_dim):
                        out[t, column + i] += weight * partial[item, n, i]
                for i in range(head_dim):
                    out[t, column + i] /= total
                n += 1
