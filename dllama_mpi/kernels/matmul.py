"""Matrix products Y = X A^T of tiled weights A with activations X, a block of tokens at a time.

Each output value is summed in the same order whatever the number of tokens, threads or ranks over its rows, so that
a token's result does not depend on what it is batched with.
"""

from __future__ import annotations

from numba import njit, types
from numba.extending import intrinsic

from .layout import (
    BLOCK,
    F16,
    F32,
    Q40,
    Q80,
    ROWS,
)
from .simd import F16 as HALF
from .simd import F32 as FLOAT
from .simd import (
    I8,
    I32,
    I64,
    EmitterHere,
    constant,
    vector,
)

UNROLLED = 4  # columns of f16 and f32 tiles in a loop's body

# dtype of a format's marker -> format
_BY_DTYPE = {types.uint8: Q40, types.int8: Q80, types.uint16: F16, types.float32: F32}


@intrinsic(prefer_literal=True)
def _quantised_tile_row(typingctx, marker, tokens, w, blocks, xq, xs, xc, y, y_stride):
    """Multiply one row of q40 or q80 tiles with `tokens` (a literal) Q80 activation rows.

    w, xq, xs, xc, y: addresses; blocks: tiles in the row; y_stride: bytes from one token's outputs to the next.
    """
    fmt, n_tokens = _BY_DTYPE[marker.dtype], tokens.literal_value

    def codegen(context, builder, signature, args):
        emit_quantised_tile_row(EmitterHere(builder), fmt, n_tokens, *args[2:])
        return context.get_dummy_value()

    return types.void(marker, tokens, *[types.int64] * 7), codegen


@intrinsic(prefer_literal=True)
def _float_tile_row(typingctx, marker, tokens, w, blocks, x, x_stride, y, y_stride):
    """Multiply one row of f16 or f32 tiles with `tokens` (a literal) float32 activation rows.

    w, x, y: addresses; blocks: tiles in the row; strides: bytes from one token to the next.
    """
    fmt, n_tokens = _BY_DTYPE[marker.dtype], tokens.literal_value

    def codegen(context, builder, signature, args):
        emit_float_tile_row(EmitterHere(builder), fmt, n_tokens, *args[2:])
        return context.get_dummy_value()

    return types.void(marker, tokens, *[types.int64] * 6), codegen


def emit_quantised_tile_row(e, fmt, tokens, w, blocks, xq, xs, xc, y, y_stride):
    """Emit what `_quantised_tile_row` does."""
    b, narrow = e.b, fmt is Q40
    rows, group = e.dot_shape(tokens, narrow)

    def part(row, token):
        """Multiply `rows` rows from `row` on with `group` tokens from `token` on."""
        scales, codes = b.add(w, b.mul(row, I64(2))), b.add(w, b.add(b.mul(row, I64(4)), I64(2 * ROWS)))

        def block(i, totals):
            tile = b.mul(i, I64(fmt.tile_bytes))
            e.prefetch(b.add(w, tile), fmt.tile_bytes)  # one thread alone decodes a tenth faster for it
            scale = b.fpext(e.load(b.add(scales, tile), vector(HALF, rows), 2 * rows), vector(FLOAT, rows))
            at = [b.add(b.mul(b.add(token, I64(t)), blocks), i) for t in range(group)]
            dots = [constant(I32, rows, 0)] * group
            if narrow or e.offset:  # xc is -8 * the sum of a block's codes
                dots = [e.splat(e.load(b.add(xc, b.mul(k, I64(4))), I32, 4), rows) for k in at]
                dots = dots if narrow else [b.mul(d, constant(I32, rows, e.offset // 8)) for d in dots]
            x = [b.add(xq, b.mul(k, I64(BLOCK))) for k in at]
            dots = e.block_dots(_codes(e, fmt, b.add(codes, tile), rows), narrow, x, dots)
            after = []
            for k, dot, total in zip(at, dots, totals, strict=True):
                x_scale = e.splat(e.load(b.add(xs, b.mul(k, I64(4))), FLOAT, 4), rows)
                after.append(e.fma(b.sitofp(dot, vector(FLOAT, rows)), b.fmul(scale, x_scale), total))
            return after

        _store_rows(e, e.counted_loop(blocks, [constant(FLOAT, rows, 0.0)] * group, block), row, token, y, y_stride)

    _for_each_part(e, ROWS // rows, rows, tokens // group, group, part)


def _codes(e, fmt, address, rows):
    """Emit the loads of one tile's codes: pairs of (which four columns, <4*rows x i8>), as they are drawn."""
    b, chunk = e.b, vector(I8, 4 * rows)
    for j in range(4 if fmt is Q40 else 8):
        codes = e.load(b.add(address, I64(64 * j)), chunk, min(32, 4 * rows))
        if fmt is Q40:
            yield j, b.and_(codes, constant(I8, 4 * rows, 15))
            yield 4 + j, b.lshr(codes, constant(I8, 4 * rows, 4))
        else:  # adding 128 to a byte is to turn its highest bit
            yield j, b.xor(codes, constant(I8, 4 * rows, e.offset)) if e.offset else codes


def emit_float_tile_row(e, fmt, tokens, w, blocks, x, x_stride, y, y_stride):
    """Emit what `_float_tile_row` does."""
    b = e.b
    rows, group = e.fma_shape(tokens)
    element, size = (HALF, 2) if fmt is F16 else (FLOAT, 4)

    def part(row, token):
        """Multiply `rows` rows from `row` on with `group` tokens from `token` on."""
        first = b.add(w, b.mul(row, I64(size)))
        xs = [b.add(x, b.mul(b.add(token, I64(t)), x_stride)) for t in range(group)]

        def columns(i, totals):
            at = [b.add(start, b.mul(i, I64(4 * UNROLLED))) for start in xs]
            step = b.add(first, b.mul(i, I64(UNROLLED * ROWS * size)))
            e.prefetch(step, UNROLLED * ROWS * size)
            for col in range(UNROLLED):
                column = e.load(b.add(step, I64(col * ROWS * size)), vector(element, rows), min(32, rows * size))
                if fmt is F16:
                    column = b.fpext(column, vector(FLOAT, rows))
                totals = [
                    e.fma(column, e.broadcast(start, col, FLOAT, rows), total)
                    for start, total in zip(at, totals, strict=True)
                ]
            return totals

        steps = b.mul(blocks, I64(BLOCK // UNROLLED))
        _store_rows(e, e.counted_loop(steps, [constant(FLOAT, rows, 0.0)] * group, columns), row, token, y, y_stride)

    _for_each_part(e, ROWS // rows, rows, tokens // group, group, part)


def _store_rows(e, totals, row, token, y, y_stride):
    """Store outputs from `row` on of tokens from `token` on."""
    b = e.b
    for t, total in enumerate(totals):
        e.store(total, b.add(b.add(y, b.mul(row, I64(4))), b.mul(b.add(token, I64(t)), y_stride)), 4)


def _for_each_part(e, row_parts, rows, token_parts, group, part):
    """Emit part(row, token) once, in a loop where there are several."""
    b = e.b
    if row_parts * token_parts == 1:
        part(I64(0), I64(0))
        return

    def body(i, state):
        part(b.mul(b.sdiv(i, I64(token_parts)), I64(rows)), b.mul(b.srem(i, I64(token_parts)), I64(group)))
        return state

    e.counted_loop(I64(row_parts * token_parts), [], body)


@njit(cache=True, nogil=True, inline="never")
def quantised_rows(marker, w, w_stride, first, last, blocks, xq, xs, xc, y, y_stride, tokens):
    """Multiply rows [first, last) of q40 or q80 tiles with Q80 activations, on the calling thread.

    marker: the format's empty array. w: address of the matrix; w_stride: bytes from one row of tiles to the next;
    blocks: tiles in a row. xq, xs, xc: addresses of contiguous codes (tokens, 32 * blocks) int8, scales and offsets
    (tokens, blocks) float32 and int32, an offset being -8 times the sum of its block's codes. y: address of the
    matrix's first output, float32; y_stride: bytes from one token's outputs to the next.
    """
    for row in range(first, last):
        a, t = w + row * w_stride, 0
        while t < tokens:
            left, out = tokens - t, y + row * 4 * ROWS + t * y_stride
            q, s, c = xq + t * BLOCK * blocks, xs + t * 4 * blocks, xc + t * 4 * blocks
            if left >= 8:
                _quantised_tile_row(marker, 8, a, blocks, q, s, c, out, y_stride)
                t += 8
            elif left >= 4:
                _quantised_tile_row(marker, 4, a, blocks, q, s, c, out, y_stride)
                t += 4
            elif left >= 2:
                _quantised_tile_row(marker, 2, a, blocks, q, s, c, out, y_stride)
                t += 2
            else:
                _quantised_tile_row(marker, 1, a, blocks, q, s, c, out, y_stride)
                t += 1


@njit(cache=True, nogil=True, inline="never")
def float_rows(marker, w, w_stride, first, last, blocks, x, x_stride, y, y_stride, tokens):
    """Multiply rows [first, last) of f16 or f32 tiles with float32 activations, on the calling thread.

    x: address of (tokens, 32 * blocks) float32, x_stride bytes apart; the rest as in `quantised_rows`.
    """
    for row in range(first, last):
        a, out, t = w + row * w_stride, y + row * 4 * ROWS, 0
        while t < tokens:
            # One token takes nearly as long as four: its sums wait for each other. So a few tokens are done with
            # some that are done already, which get the same values again.
            left = tokens - t
            if left >= 8 or (left > 4 and tokens >= 8):
                t = min(t, tokens - 8)
                _float_tile_row(marker, 8, a, blocks, x + t * x_stride, x_stride, out + t * y_stride, y_stride)
                t += 8
            elif left >= 4 or (left == 3 and tokens >= 4):
                t = min(t, tokens - 4)
                _float_tile_row(marker, 4, a, blocks, x + t * x_stride, x_stride, out + t * y_stride, y_stride)
                t += 4
            elif left >= 2:
                _float_tile_row(marker, 2, a, blocks, x + t * x_stride, x_stride, out + t * y_stride, y_stride)
                t += 2
            else:
                _float_tile_row(marker, 1, a, blocks, x + t * x_stride, x_stride, out + t * y_stride, y_stride)
                t += 1
