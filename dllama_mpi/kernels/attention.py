"""Causal attention over the KV cache with grouped query heads (GQA), as products with tiles.

The cache is made of pages of 256 positions, which any sequence may use: its table says which page holds its positions
from 256 i on. A page of one KV head is two matrices in the tile layout of `kernels.layout`, so that the products'
kernels serve here too, on every instruction set: keys have a row for each position, 16 positions to a tile; values have
a row for each dimension of a head, 16 dimensions to a tile, and a column for each position. As arrays of float32 or of
float16 bits:

keys    (pages, kv_heads, 256 / 16, head_dim to 32s, 16)
values  (pages, kv_heads, head_dim to 16s / 16, 256, 16)

or of int8 codes, with scales for 32 dimensions of a position, as float16 bits (empty for the other two):

scales of keys    (pages, kv_heads, 256 / 16, head_dim to 32s / 32, 16)
scales of values  (pages, kv_heads, head_dim to 32s / 32, 256)

A row of tiles of codes is widened into float32 scratch, which the first cache holds, before it is multiplied.

A work item is a KV head with the queries that read it: those of its group, of one or a few tokens of one sequence, so
that keys and values are read once for all of them. It goes over the positions page by page with a running maximum and
sum (online softmax, arXiv:1805.02867). Memory beyond the written positions takes part with weight zero, so it must hold
numbers: a cache begins as zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .activation import soft_cap
from .compiled import call, inner
from .layout import BLOCK, PAGE, ROWS
from .matmul import F32_TILES, float_rows
from .parallel import run_parallel
from .sampling import exponentials, largest
from .simd import address
from .widen import widen_keys, widen_values

QUERIES = 16  # most queries of an item, unless one token's group has more
LONG = 512  # positions from which an item may be cut between threads


class Heads(NamedTuple):
    """A rank's attention heads.

    Attributes:
        dim: of a head. first, last: of the whole model's query heads, those that the rank holds are [first, last).
        group: query heads a KV head. out_start: column where their outputs begin.
        scale: of scores. softcap: s: scores become s * tanh(score / s); 0 for none.
    """

    dim: int
    first: int
    last: int
    group: int
    out_start: int
    scale: float
    softcap: float


class KVLayer(NamedTuple):
    """One layer's KV cache on this rank, laid out as the module says.

    Attributes:
        marker: an empty array of the elements' type, f16 as uint16, or of float32 for int8 codes.
    """

    marker: np.ndarray
    keys: np.ndarray
    key_scales: np.ndarray
    values: np.ndarray
    value_scales: np.ndarray


class _Head(NamedTuple):
    """One page of one KV head."""

    keys: np.ndarray
    key_scales: np.ndarray
    values: np.ndarray
    value_scales: np.ndarray


class _Queries(NamedTuple):
    """The queries of an item (n, head_dim to 32s) float32, and which positions [start, stop) each of them sees."""

    values: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


class _Softmax(NamedTuple):
    """Of each query of an item: the sum (n,) and maximum (n,) so far, and the weighted values (n, head_dim to 16s)."""

    sums: np.ndarray
    tops: np.ndarray
    out: np.ndarray


class _Scratch(NamedTuple):
    """scores (n, PAGE) and part, like the output: of one block; widened: float32 of a row of tiles of codes."""

    scores: np.ndarray
    part: np.ndarray
    widened: np.ndarray


@inner
def _widened_row(tiles, blocks, x, x_stride, y, y_stride, n):
    """Multiply one row of float32 tiles with n rows of activations; all by their addresses."""
    float_rows(F32_TILES, tiles, np.int64(0), np.int64(0), np.int64(1), blocks, x, x_stride, y, y_stride, n)


@inner
def _scores(marker, queries, head, begin, rows, scratch):
    """Write queries (n, width) x keys of `rows` tiles from a page's position `begin` on into scratch.scores."""
    width, scores, widened = queries.shape[1], scratch.scores, scratch.widened
    if head.key_scales.size > 0:
        for row in range(rows):
            codes, scales = address(head.keys[begin // ROWS + row]), address(head.key_scales[begin // ROWS + row])
            for block in range(width // BLOCK):
                first = ROWS * BLOCK * block
                widen_keys(codes + first, scales + 2 * ROWS * block, address(widened) + 4 * first)
            at, to = address(queries), address(scores) + 4 * ROWS * row
            _widened_row(address(widened), width // BLOCK, at, 4 * width, to, 4 * PAGE, queries.shape[0])
    else:
        step = head.keys.itemsize * ROWS * width
        float_rows(
            marker,
            address(head.keys) + begin // ROWS * step,
            step,
            np.int64(0),
            rows,
            width // BLOCK,
            address(queries),
            4 * width,
            address(scores),
            4 * PAGE,
            queries.shape[0],
        )


@inner
def _weighted(marker, head, begin, padded, scratch, n):
    """Write scores (n, >= padded) x values of `padded` positions from a page's `begin` on into scratch.part."""
    values, scores, widened, out = head.values, scratch.scores, scratch.widened, scratch.part
    rows = values.shape[0]
    if head.value_scales.size > 0:
        for row in range(rows):
            codes, scales = address(values[row]) + ROWS * begin, address(head.value_scales[row // 2]) + 2 * begin
            for p in range(0, padded, ROWS):
                widen_values(codes + ROWS * p, scales + 2 * p, address(widened) + 4 * ROWS * p)
            at, to = address(scores), address(out) + 4 * ROWS * row
            _widened_row(address(widened), padded // BLOCK, at, 4 * PAGE, to, 4 * out.shape[1], n)
    else:
        step = values.itemsize * ROWS
        float_rows(
            marker,
            address(values) + begin * step,
            step * values.shape[1],
            np.int64(0),
            rows,
            padded // BLOCK,
            address(scores),
            4 * PAGE,
            address(out),
            4 * out.shape[1],
            n,
        )


@inner
def _attend(softcap, cache, table, kv, queries, first, last, scratch, softmax):
    """Attend with queries over a sequence's positions [first, last), going on from what `softmax` holds.

    table: the sequence's pages. first: a multiple of 32. The weighted sum of values is not divided by the sum yet.
    """
    n, scores, part, marker = queries.starts.size, scratch.scores, scratch.part, cache.marker
    sums, tops, out = softmax.sums, softmax.tops, softmax.out
    for index in range(first // PAGE, (last + PAGE - 1) // PAGE):
        page = table[index]
        head = _Head(
            cache.keys[page, kv], cache.key_scales[page, kv], cache.values[page, kv], cache.value_scales[page, kv]
        )
        begin, end = max(first, index * PAGE), min(last, (index + 1) * PAGE)
        inside, padded = begin - index * PAGE, (end - begin + BLOCK - 1) // BLOCK * BLOCK
        _scores(marker, queries.values, head, inside, padded // ROWS, scratch)
        for q in range(n):
            row = address(scores) + 4 * PAGE * q
            if softcap > 0:
                soft_cap(row, padded, softcap)
            low, high = max(0, queries.starts[q] - begin), min(padded, queries.stops[q] - begin)
            for p in range(min(low, padded)):
                scores[q, p] = -np.inf
            for p in range(max(0, high), padded):
                scores[q, p] = -np.inf
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
        _weighted(marker, head, inside, padded, scratch, n)
        for q in range(n):
            for i in range(out.shape[1]):
                out[q, i] += part[q, i]


@inner
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


class _Plan(NamedTuple):
    """How an attention is cut into items: `runs` of tokens, which `begins` says, times KV heads, times `cuts`."""

    begins: np.ndarray
    runs: int
    cuts: int


class _Job(NamedTuple):
    """Everything that an item needs: the arguments of `attention`, its plan, and where results go.

    Attributes:
        results: sums and tops (items, n), out (items or threads, n, head_dim to 16s).
    """

    heads: Heads
    window: int
    sinks: np.ndarray
    q: np.ndarray
    cache: KVLayer
    step: tuple
    out: np.ndarray
    plan: _Plan
    results: _Softmax


@inner
def _head_range(heads, kv):
    """Return which of the rank's query heads read its KV head `kv`."""
    head = heads.first // heads.group + kv
    low, high = max(heads.first, head * heads.group), min(heads.last, (head + 1) * heads.group)
    return low - heads.first, high - heads.first


@inner
def _fill_queries(job, run, kv, queries):
    """Write a run's queries that read a KV head; return their number."""
    heads, dim, n = job.heads, job.heads.dim, 0
    low, high = _head_range(heads, kv)
    for t in range(job.plan.begins[run], job.plan.begins[run + 1]):
        scale = np.float32(heads.scale) * job.step.query_scales[t]
        for h in range(low, high):
            for i in range(dim):
                queries.values[n, i] = job.q[t, h * dim + i] * scale
            queries.stops[n] = job.step.positions[t] + 1
            queries.starts[n] = max(0, queries.stops[n] - job.window) if job.window > 0 else 0
            n += 1
    return n


@inner
def _begin_softmax(job, run, kv, cut, softmax):
    """Write what a softmax begins with: nothing, or the sink of each head, which takes part in the sum once."""
    low, high = _head_range(job.heads, kv)
    n = 0
    for _ in range(job.plan.begins[run], job.plan.begins[run + 1]):
        for h in range(low, high):
            has_sink = job.sinks.size > 0 and cut == 0
            softmax.sums[n] = 1 if has_sink else 0
            softmax.tops[n] = job.sinks[h] if has_sink else -np.inf
            for i in range(softmax.out.shape[1]):
                softmax.out[n, i] = 0
            n += 1


@inner
def _take(job, thread, threads):
    """Do items thread, thread + threads, ...; see `attention`."""
    cache, plan, results = job.cache, job.plan, job.results
    most, kv_heads, width = results.sums.shape[1], cache.keys.shape[1], cache.keys.shape[3]
    queries = _Queries(np.zeros((most, width), np.float32), np.empty(most, np.int64), np.empty(most, np.int64))
    widened = np.empty(ROWS * max(width, PAGE) + ROWS if cache.key_scales.size > 0 else 0, np.float32)
    widened = widened[-(address(widened) // 4) % ROWS :]  # a vector then lies in one line of the cache
    part = np.empty((most, results.out.shape[2]), np.float32)
    scratch = _Scratch(np.empty((most, PAGE), np.float32), part, widened)
    for item in range(thread, plan.runs * kv_heads * plan.cuts, threads):
        piece, cut = item // plan.cuts, item % plan.cuts
        run, kv = piece // kv_heads, piece % kv_heads
        n = _fill_queries(job, run, kv, queries)
        own = _Queries(queries.values[:n], queries.starts[:n], queries.stops[:n])
        first, last = queries.starts[0] // BLOCK * BLOCK, queries.stops[n - 1]
        if plan.cuts > 1:
            page = first // PAGE
            pages = (last + PAGE - 1) // PAGE - page
            last = min(last, PAGE * (page + pages * (cut + 1) // plan.cuts))
            first = max(first, PAGE * (page + pages * cut // plan.cuts))
        table = job.step.tables[job.step.slots[plan.begins[run]]]
        softmax = _Softmax(results.sums[item], results.tops[item], results.out[item if plan.cuts > 1 else thread])
        _begin_softmax(job, run, kv, cut, softmax)
        call(_attend, (np.float32(job.heads.softcap), cache, table, kv, own, first, last, scratch, softmax))
        if plan.cuts == 1:
            _put(job, run, kv, softmax)


@inner
def _put(job, run, kv, softmax):
    """Write the outputs of an item that was not cut."""
    dim, n = job.heads.dim, 0
    low, high = _head_range(job.heads, kv)
    for t in range(job.plan.begins[run], job.plan.begins[run + 1]):
        for h in range(low, high):
            divisor = np.float32(1) / softmax.sums[n]
            for i in range(dim):
                job.out[t, job.heads.out_start + h * dim + i] = softmax.out[n, i] * divisor
            n += 1


@inner
def attention(heads, window, sinks, q, cache, step, out, threads):
    """Attend from each token to the positions of its sequence up to its own.

    heads: see `Heads`. window: positions a token sees, itself included, or 0 for all. sinks: (the rank's heads,)
    float32, a logit of each head's softmax that no value belongs to (arXiv:2309.17453), or empty. q: (>= tokens, >=
    heads * head_dim) float32, rotated. cache: this rank's, see `KVLayer`. step: slots, positions (tokens,) int32;
    tables (slots, n) int32, each slot's pages; query_scales (tokens,) float32. out: (>= tokens, >= heads * head_dim)
    float32, written from column heads.out_start on.
    """
    kv_heads = cache.keys.shape[1]
    each = max(1, QUERIES // heads.group)
    begins = np.empty(step.slots.size + 1, np.int64)
    runs = _runs(step.slots, step.positions, each, begins)
    cuts, furthest = 1, 0
    for position in step.positions:
        furthest = max(furthest, position)
    if runs * kv_heads < threads and furthest >= LONG:
        cuts = (threads + runs * kv_heads - 1) // (runs * kv_heads)
    items, most = runs * kv_heads * cuts, each * heads.group
    sums, tops = np.zeros((items, most), np.float32), np.zeros((items, most), np.float32)
    partial = np.zeros((items if cuts > 1 else threads, most, cache.values.shape[2] * ROWS), np.float32)
    results = _Softmax(sums, tops, partial)
    job = _Job(heads, window, sinks, q, cache, step, out, _Plan(begins, runs, cuts), results)
    run_parallel(_take, (job,), threads)
    if cuts > 1:
        call(_merge, (job, kv_heads))


@inner
def _merge(job, kv_heads):
    """Join the softmax of items that were cut between threads."""
    heads, plan, results, out = job.heads, job.plan, job.results, job.out
    for piece in range(plan.runs * kv_heads):
        run, kv = piece // kv_heads, piece % kv_heads
        low, high = _head_range(heads, kv)
        n = 0
        for t in range(plan.begins[run], plan.begins[run + 1]):
            for h in range(low, high):
                top, total = np.float32(-np.inf), np.float32(0)
                for item in range(piece * plan.cuts, (piece + 1) * plan.cuts):
                    top = max(top, results.tops[item, n])
                column = heads.out_start + h * heads.dim
                for i in range(heads.dim):
                    out[t, column + i] = 0
                for item in range(piece * plan.cuts, (piece + 1) * plan.cuts):
                    weight = np.exp(results.tops[item, n] - top)
                    total += weight * results.sums[item, n]
                    for i in range(heads.dim):
                        out[t, column + i] += weight * results.out[item, n, i]
                for i in range(heads.dim):
                    out[t, column + i] /= total
                n += 1
