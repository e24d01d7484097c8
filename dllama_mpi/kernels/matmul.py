"""Matrix products Y = X A^T of tiled weights A with activations X, a block of tokens at a time.

Each output value is summed in the same order whatever the number of tokens, threads or ranks over its rows, so that
a token's result does not depend on what it is batched with:

q40, q80  y = fma(dot, scale * x_scale, y), block after block, dot being the codes' exact product
tables    the same, and in the end y * row_scale
q4m       y = fma(s * dot + m * offset, x_scale, y), the first rounded once, where offset is -8 times the block's sum of
          activation codes, and in the end y * row_scale
f16, f32  y = fma(weight, x, y), column after column

A kernel is compiled once, when a matrix first needs it, and called by its address.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import inner
from .emitter import (
    BYTES,
    F16,
    F32,
    I8,
    I32,
    I64,
    NIBBLES,
    SMALL,
    Emitter,
    constant,
    vector,
)
from .layout import BLOCK, FORMATS, ROWS, TABLES, TileFormat
from .matrix import (
    ADDRESS,
    EXPERT_SCALES,
    EXPERT_STRIDE,
    FIELDS,
    KERNEL,
    ROW_SCALES,
    STRIDE,
    TABLE,
    TILE_ROWS,
    TILES,
)
from .simd import EmitterHere

UNROLLED = 4  # columns of f16 and f32 tiles in a loop's body
F32_TILES = np.empty(0, np.float32)  # the marker of `float_rows` for float32
KERNELS = {f.kernel: f for f in FORMATS.values()}  # a format of each kernel: all of them have tiles of one size


class Weights(NamedTuple):
    """Rows of tiles in memory: five int64, see the fields of `kernels.matrix`."""

    address: ir.Value
    stride: ir.Value
    tiles: ir.Value
    row_scales: ir.Value
    table: ir.Value


class Inputs(NamedTuple):
    """Activations in memory, int64: addresses of float32 values and of their Q80 form; bytes or blocks in a row."""

    values: ir.Value
    codes: ir.Value
    scales: ir.Value
    offsets: ir.Value
    stride: ir.Value
    blocks: ir.Value
    tokens: ir.Value


class Outputs(NamedTuple):
    """Float32 results in memory, int64: the address of one row of tiles' first, bytes from token to token."""

    address: ir.Value
    stride: ir.Value


class Part(NamedTuple):
    """What an inner kernel does at once: rows from `row` on of a row of tiles, with tokens from `token` on."""

    rows: int
    tokens: int
    row: ir.Value
    token: ir.Value


def emit_kernel(e: Emitter, kernel: str, args: tuple[ir.Value, ...]) -> None:
    """Emit what the function at `kernel_address` does, with its arguments."""
    m, first, last, values, codes, scales, offsets, blocks, tokens, y, y_stride = args
    fields = [e.load(e.b.add(m, I64(8 * i)), I64, 8) for i in (ADDRESS, STRIDE, TILES, ROW_SCALES, TABLE)]
    stride = e.b.mul(blocks, I64(4 * BLOCK))
    inputs = Inputs(values, codes, scales, offsets, stride, blocks, tokens)
    emit_rows(e, kernel, Weights(*fields), inputs, Outputs(y, y_stride), first, last)


def emit_rows(e: Emitter, kernel: str, w: Weights, x: Inputs, y: Outputs, first: ir.Value, last: ir.Value) -> None:
    """Emit the products of rows [first, last) of tiles; y: of row 0."""
    b = e.b
    quantised = KERNELS[kernel].quantised_activations
    inner = _quantised_part(e, kernel, w, x) if quantised else _float_part(e, kernel, w, x)
    shapes = e.shapes(functools.partial(e.dot_shape, most=_MOST[kernel]) if quantised else e.fma_shape)

    def one_row(i, state):
        row = b.add(first, i)
        tiles, scales = b.add(w.address, b.mul(row, w.stride)), b.add(w.row_scales, b.mul(row, I64(4 * ROWS)))
        out = Outputs(b.add(y.address, b.mul(row, I64(4 * ROWS))), y.stride)

        def group(rows, tokens, token):
            def rows_from(k, state):
                part = Part(rows, tokens, b.mul(k, I64(rows)), token)
                _store_rows(e, inner(tiles, scales, part), out, part)
                return state

            e.counted_loop(I64(ROWS // rows), [], rows_from) if rows < ROWS else rows_from(I64(0), [])

        _each_group(e, shapes, x.tokens, not quantised, group)
        return state

    e.counted_loop(b.sub(last, first), [], one_row)


def _each_group(e, shapes, tokens, overlapping, group):
    """Emit group(rows, tokens, first token) in loops that together do all tokens.

    overlapping: where a float kernel takes as long for one token as for several, because sums wait for each other, more
    than half a group is done as a whole one, with tokens that are done already and get the same values again.
    """
    b, done = e.b, I64(0)
    for rows, size in shapes:
        spare = size // 2 - 1 if overlapping and size > 2 else 0
        count = b.sdiv(b.add(b.sub(tokens, done), I64(spare)), I64(size))
        if spare:
            count = b.select(b.icmp_signed(">=", tokens, I64(size)), count, I64(0))

        def one(i, state, rows=rows, size=size, spare=spare, done=done):
            token = b.add(done, b.mul(i, I64(size)))
            group(rows, size, _lesser(b, token, b.sub(tokens, I64(size))) if spare else token)
            return state

        e.counted_loop(count, [], one)
        done = _lesser(b, b.add(done, b.mul(count, I64(size))), tokens)


def _lesser(b, x, y):
    return b.select(b.icmp_signed("<", x, y), x, y)


def _store_rows(e, totals, y, part):
    b = e.b
    for t, total in enumerate(totals):
        token = b.mul(b.add(part.token, I64(t)), y.stride)
        e.store(total, b.add(b.add(y.address, b.mul(part.row, I64(4))), token), 4)


# --------------------------------------------------------------------------------------------------------------------
# Codes
# --------------------------------------------------------------------------------------------------------------------


_MOST = {"q40": NIBBLES, "q4m": NIBBLES, "table": BYTES, "small_table": SMALL, "q80": BYTES}
_TABLES = ("table", "small_table")


def _quantised_part(e, kernel, w, x):
    """Return what emits the sums of a part of a row of tiles, from the address of the row and of its row scales."""
    b, tile_bytes = e.b, KERNELS[kernel].tile_bytes
    table = _table(e, kernel, w.table) if kernel in _TABLES else None
    add_block = _add_with_minima if kernel == "q4m" else _add_scaled

    def inner(tiles, row_scales, part):
        rows = part.rows
        heads = b.add(tiles, b.mul(part.row, I64(1 if kernel == "q4m" else 2)))
        codes = b.add(tiles, b.add(b.mul(part.row, I64(4)), I64(2 * ROWS)))

        def block(i, totals):
            tile = b.mul(i, I64(tile_bytes))
            e.prefetch(b.add(tiles, tile), tile_bytes)  # one thread alone decodes a tenth faster for it
            at = [b.add(b.mul(b.add(part.token, I64(t)), x.blocks), i) for t in range(part.tokens)]
            drawn = _codes(e, kernel, table, b.add(codes, tile), rows)
            return add_block(e, kernel, b.add(heads, tile), drawn, x, at, totals)

        totals = e.counted_loop(w.tiles, [constant(F32, rows, 0.0)] * part.tokens, block)
        if kernel not in ("q4m", *_TABLES):
            return totals
        ones = cgutils.global_constant(b.module, "ones", constant(F32, ROWS, 1.0))
        own = b.add(row_scales, b.mul(part.row, I64(4)))
        own = b.select(b.icmp_signed("==", w.row_scales, I64(0)), b.ptrtoint(ones, I64), own)
        scale = e.load(own, vector(F32, rows), 4)
        return [b.fmul(total, scale) for total in totals]

    return inner


def _of_tokens(e, address, at, element, count):
    """Return one value for each token, in every lane, from an array with one a block; at: the blocks' numbers."""
    return [e.splat(e.load(e.b.add(address, e.b.mul(k, I64(4))), element, 4), count) for k in at]


def _inputs(e, x, at):
    return [e.b.add(x.codes, e.b.mul(k, I64(BLOCK))) for k in at]


def _add_scaled(e, kernel, heads, codes, x, at, totals):
    """Add to each token's total its block's dot product times the two scales."""
    b, rows = e.b, totals[0].type.count
    scale = b.fpext(e.load(heads, vector(F16, rows), 2 * rows), vector(F32, rows))
    # An offset is -8 times the sum of a block's activations: what codes that are 8 more than they should be want added.
    eights = (8 if kernel == "q40" else e.offsets.get(_MOST[kernel], 0)) // 8
    dots = [constant(I32, rows, 0)] * len(at)
    if eights:
        dots = _of_tokens(e, x.offsets, at, I32, rows)
        dots = [b.mul(d, constant(I32, rows, eights)) for d in dots] if eights > 1 else dots
    dots = e.block_dots(codes, _MOST[kernel], _inputs(e, x, at), dots)
    scales = [b.fmul(scale, x_scale) for x_scale in _of_tokens(e, x.scales, at, F32, rows)]
    dots = [b.sitofp(d, vector(F32, rows)) for d in dots]
    return [e.fma(*three) for three in zip(dots, scales, totals, strict=True)]


def _add_with_minima(e, _kernel, heads, codes, x, at, totals):
    """Add to each token's total s times its block's dot product, plus m times its offset, times its scale."""
    rows = totals[0].type.count
    s, m = (e.load(e.b.add(heads, I64(start)), vector(I8, rows), rows) for start in (0, ROWS))
    blocks = e.scaled_dots(codes, _inputs(e, x, at), s, m, _of_tokens(e, x.offsets, at, I32, rows))
    scales = _of_tokens(e, x.scales, at, F32, rows)
    return [e.fma(*three) for three in zip(blocks, scales, totals, strict=True)]


def _table(e, kernel, address):
    """Return a table as `block_dots` wants what it stands for."""
    table = e.load(address, vector(I8, ROWS), 1)
    return e.b.add(table, constant(I8, ROWS, e.offsets.get(_MOST[kernel], 0)))


def _codes(e, kernel, table, address, rows) -> Iterator[tuple[int, ir.Value]]:
    """Emit the loads of one tile's codes: pairs of (which four columns, <4*rows x i8>), as they are drawn."""
    b, count = e.b, 4 * rows
    for j in range(8 if kernel == "q80" else 4):
        codes = e.load(b.add(address, I64(64 * j)), vector(I8, count), min(32, count))
        if kernel == "q80":
            yield j, b.add(codes, constant(I8, count, e.offsets.get(BYTES, 0)))
            continue
        for quad, nibbles in (
            (j, b.and_(codes, constant(I8, count, 15))),
            (4 + j, b.lshr(codes, constant(I8, count, 4))),
        ):
            yield quad, nibbles if table is None else e.lookup(table, nibbles)


# --------------------------------------------------------------------------------------------------------------------
# Floats
# --------------------------------------------------------------------------------------------------------------------


def _float_part(e, kernel, w, x):
    """Return what emits the sums of a part of a row of tiles, from the address of the row."""
    b = e.b
    element, size = (F16, 2) if kernel == "f16" else (F32, 4)

    def inner(tiles, _row_scales, part):
        rows = part.rows
        first = b.add(tiles, b.mul(part.row, I64(size)))
        xs = [b.add(x.values, b.mul(b.add(part.token, I64(t)), x.stride)) for t in range(part.tokens)]

        def columns(i, totals):
            at = [b.add(start, b.mul(i, I64(4 * UNROLLED))) for start in xs]
            step = b.add(first, b.mul(i, I64(UNROLLED * ROWS * size)))
            e.prefetch(step, UNROLLED * ROWS * size)
            for col in range(UNROLLED):
                column = e.load(b.add(step, I64(col * ROWS * size)), vector(element, rows), size)
                column = b.fpext(column, vector(F32, rows)) if kernel == "f16" else column
                totals = [
                    e.fma(column, e.broadcast(start, col, F32, rows), total)
                    for start, total in zip(at, totals, strict=True)
                ]
            return totals

        steps = b.mul(w.tiles, I64(BLOCK // UNROLLED))
        return e.counted_loop(steps, [constant(F32, rows, 0.0)] * part.tokens, columns)

    return inner


# --------------------------------------------------------------------------------------------------------------------
# Compiled
# --------------------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def _multiply(typingctx, kernel, arguments):
    def codegen(context, builder, signature, args):
        values = [builder.extract_value(args[1], i) for i in range(len(arguments))]
        emit_kernel(EmitterHere(builder), kernel.literal_value, values)
        return context.get_dummy_value()

    return types.void(kernel, arguments), codegen


@functools.cache
def _compiled(kernel: str):
    def multiply(m, first, last, values, codes, scales, offsets, blocks, tokens, y, y_stride):
        _multiply(kernel, (m, first, last, values, codes, scales, offsets, blocks, tokens, y, y_stride))

    return cfunc(types.void(*[types.int64] * 11), cache=True, nopython=True)(multiply)


def kernel_address(kernel: str) -> int:
    """Return the address of a format's kernel, a C function without result that takes 11 int64.

    These are: address of the matrix's fields (see `kernels.matrix`), first and last row of tiles; addresses of the
    first token's activations, float32 (tokens, 32 * blocks), or of their codes, scales and offsets; blocks in a row of
    them, tokens; address of the matrix's first output of the first token, bytes from one token's outputs to the next.
    """
    return _compiled(kernel).address


def described(fmt: TileFormat, tiles: np.ndarray, row_scales: np.ndarray | None = None) -> np.ndarray:
    """Return the fields (FIELDS,) int64 of one matrix, or of all experts' matrices; tiles and scales must outlive them.

    tiles: (tile rows, tiles, tile_bytes) uint8, those of a row contiguous, or the same for each expert, (experts, ...).
    row_scales: float32 (16 * tile rows,) or (experts, 16 * tile rows), contiguous, where the format has them.

    Raises:
        ValueError: the row scales do not go with the format or the tiles, or tiles do not begin at multiples of 32.
    """
    *experts, rows, across, _ = tiles.shape
    if tiles.size and tiles.ctypes.data % 32:
        raise ValueError("tiles must begin at an address that is a multiple of 32")
    if (row_scales is not None) != fmt.has_row_scales:
        raise ValueError(f"{fmt.name} has {'' if fmt.has_row_scales else 'no '}row scales")
    if row_scales is not None and row_scales.shape != (*experts, rows * ROWS):
        raise ValueError(f"row scales {row_scales.shape} do not go with tiles {tiles.shape}")
    fields = np.zeros(FIELDS, np.int64)
    fields[[ADDRESS, STRIDE, TILE_ROWS, TILES]] = tiles.ctypes.data, tiles.strides[-3], rows, across
    fields[KERNEL] = kernel_address(fmt.kernel)
    if row_scales is not None:
        fields[ROW_SCALES] = row_scales.ctypes.data
    if fmt.table is not None:
        fields[TABLE] = TABLES[fmt.name].ctypes.data
    if experts:
        fields[EXPERT_STRIDE] = tiles.strides[0]
        fields[EXPERT_SCALES] = row_scales.strides[0] if row_scales is not None else 0
    return fields


_BY_DTYPE = {types.float32: "f32", types.uint16: "f16"}


@intrinsic
def _float_rows(typingctx, marker, w, w_stride, first, last, blocks, x, x_stride, y, y_stride, tokens):
    def codegen(context, builder, signature, args):
        _, w, w_stride, first, last, blocks, x, x_stride, y, y_stride, tokens = args
        nothing = I64(0)
        weights = Weights(w, w_stride, blocks, nothing, nothing)
        inputs = Inputs(x, nothing, nothing, nothing, x_stride, blocks, tokens)
        emit_rows(EmitterHere(builder), _BY_DTYPE[marker.dtype], weights, inputs, Outputs(y, y_stride), first, last)
        return context.get_dummy_value()

    return types.void(marker, *[types.int64] * 10), codegen


@inner
def float_rows(marker, w, w_stride, first, last, blocks, x, x_stride, y, y_stride, tokens):
    """Multiply rows [first, last) of float16 or float32 tiles with float32 activations, on the calling thread.

    marker: an array of uint16, for float16 bits, or of float32. w: address of the matrix; w_stride: bytes from one row
    of tiles to the next; blocks: tiles in a row. x: address of (tokens, 32 * blocks) float32, x_stride bytes apart. y:
    address of the matrix's first output, float32; y_stride: bytes from one token's outputs to the next.
    """
    _float_rows(marker, w, w_stride, first, last, blocks, x, x_stride, y, y_stride, tokens)
