"""Matrix products Y = X A^T of tiled weights A with activations X, a block of tokens at a time.

Each output value is summed in the same order whatever the number of tokens, threads or ranks over its rows, so that
a token's result does not depend on what it is batched with.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from .layout import BLOCK, F16, F32, Q40, Q80, ROWS
from .simd import F16 as HALF
from .simd import F32 as FLOAT
from .simd import I8, I32, I64, EmitterHere, constant, vector

# dtype of a format's marker -> format
_BY_DTYPE = {types.uint8: Q40, types.int8: Q80, types.uint16: F16, types.float32: F32}


@intrinsic(prefer_literal=True)
def _quantised_tile_row(typingctx, marker, tokens, w, blocks, xq, xs, xc, y, y_stride):
    """Multiply one row of q40 or q80 tiles with `tokens` (a literal) Q80 activation rows.

    w, xq, xs, xc, y: addresses; blocks: tiles in the row; y_stride: bytes from one token's outputs to the next.
    """
    fmt, n_tokens = _BY_DTYPE[marker.dtype], tokens.literal_value

    def codegen(context, builder, signature, args):
        e, b = EmitterHere(builder), builder
        _, _, w0, n, xq0, xs0, xc0, y0, stride = args

        def block(i, totals):
            tile = b.add(w0, b.mul(i, I64(fmt.tile_bytes)))
            scale = b.fpext(e.load(tile, vector(HALF, ROWS), 32), vector(FLOAT, ROWS))
            codes = _codes(e, fmt, b.add(tile, I64(2 * ROWS)))
            after = []
            for t in range(n_tokens):
                at = b.add(b.mul(I64(t), n), i)
                seed = e.splat(e.load(b.add(xc0, b.mul(at, I64(4))), I32, 4), ROWS)
                # The unsigned codes' offset: -8 * sum(x) as stored; q80 is offset by 128 instead.
                dots = seed if fmt is Q40 else b.shl(seed, constant(I32, ROWS, 4))
                x = b.add(xq0, b.mul(at, I64(BLOCK)))
                for j, chunk in codes:
                    four = e.splat(e.load(b.add(x, I64(4 * j)), I32, 4), ROWS)
                    dots = e.dot4(dots, chunk, b.bitcast(four, vector(I8, 64)))
                x_scale = e.splat(e.load(b.add(xs0, b.mul(at, I64(4))), FLOAT, 4), ROWS)
                after.append(e.fma(b.sitofp(dots, vector(FLOAT, ROWS)), b.fmul(scale, x_scale), totals[t]))
            return after

        totals = e.counted_loop(n, [constant(FLOAT, ROWS, 0.0)] * n_tokens, block)
        for t, total in enumerate(totals):
            e.store(total, b.add(y0, b.mul(I64(t), stride)), 4)
        return context.get_dummy_value()

    return types.void(marker, tokens, *[types.int64] * 7), codegen


def _codes(e, fmt, address) -> list[tuple[int, ir.Value]]:
    """Emit the loads of one tile's codes: pairs of (which four columns, <64 x i8> unsigned codes)."""
    b = e.b
    codes = []
    if fmt is Q40:
        for j in range(4):
            packed = e.load(b.add(address, I64(64 * j)), vector(I8, 64), 32)
            codes.append((j, b.and_(packed, constant(I8, 64, 15))))
            codes.append((4 + j, b.lshr(packed, constant(I8, 64, 4))))
        return codes
    for j in range(8):
        signed = e.load(b.add(address, I64(64 * j)), vector(I8, 64), 32)
        codes.append((j, b.xor(signed, constant(I8, 64, -128))))
    return codes


@intrinsic(prefer_literal=True)
def _float_tile_row(typingctx, marker, tokens, w, blocks, x, x_stride, y, y_stride):
    """Multiply one row of f16 or f32 tiles with `tokens` (a literal) float32 activation rows.

    w, x, y: addresses; blocks: tiles in the row; strides: bytes from one token to the next.
    """
    fmt, n_tokens = _BY_DTYPE[marker.dtype], tokens.literal_value
    element, size = (HALF, 2) if fmt is F16 else (FLOAT, 4)

    def codegen(context, builder, signature, args):
        e, b = EmitterHere(builder), builder
        _, _, w0, n, x0, x_step, y0, y_step = args

        def block(i, totals):
            tile = b.add(w0, b.mul(i, I64(fmt.tile_bytes)))
            x_block = b.add(x0, b.mul(i, I64(4 * BLOCK)))
            totals = list(totals)
            for col in range(BLOCK):
                column = e.load(b.add(tile, I64(col * ROWS * size)), vector(element, ROWS), 32)
                if fmt is F16:
                    column = b.fpext(column, vector(FLOAT, ROWS))
                for t in range(n_tokens):
                    at = b.add(b.add(x_block, b.mul(I64(t), x_step)), I64(4 * col))
                    totals[t] = e.fma(column, e.splat(e.load(at, FLOAT, 4), ROWS), totals[t])
            return totals

        totals = e.counted_loop(n, [constant(FLOAT, ROWS, 0.0)] * n_tokens, block)
        for t, total in enumerate(totals):
            e.store(total, b.add(y0, b.mul(I64(t), y_step)), 4)
        return context.get_dummy_value()

    return types.void(marker, tokens, *[types.int64] * 6), codegen


@njit(cache=True, nogil=True, parallel=True)
def quantised_matmul(marker, w, w_stride, tile_rows, blocks, xq, xs, xc, y, y_stride, tokens, threads):
    """Compute Y = X A^T for q40 or q80 weights and Q80 activations.

    marker: the format's empty array. w: address of the first tile; w_stride: bytes from one row of tiles to the next;
    tile_rows, blocks: tiles down and across. xq (tokens, blocks*32) int8, xs (tokens, blocks) float32 and
    xc (tokens, blocks) int32, which is -8 * the sum of a block's codes: contiguous, as addresses. y: address of
    float32 outputs, 16 * tile_rows a token, y_stride bytes apart.
    """
    for thread in prange(threads):
        first, last = tile_rows * thread // threads, tile_rows * (thread + 1) // threads
        for row in range(first, last):
            a, out, t = w + row * w_stride, y + row * 4 * ROWS, 0
            q, s, c = xq, xs, xc
            while tokens - t >= 8:
                _quantised_tile_row(marker, 8, a, blocks, q, s, c, out, y_stride)
                t, q, s, c, out = t + 8, q + 8 * 32 * blocks, s + 32 * blocks, c + 32 * blocks, out + 8 * y_stride
            if tokens - t >= 4:
                _quantised_tile_row(marker, 4, a, blocks, q, s, c, out, y_stride)
                t, q, s, c, out = t + 4, q + 4 * 32 * blocks, s + 16 * blocks, c + 16 * blocks, out + 4 * y_stride
            if tokens - t >= 2:
                _quantised_tile_row(marker, 2, a, blocks, q, s, c, out, y_stride)
                t, q, s, c, out = t + 2, q + 2 * 32 * blocks, s + 8 * blocks, c + 8 * blocks, out + 2 * y_stride
            if tokens > t:
                _quantised_tile_row(marker, 1, a, blocks, q, s, c, out, y_stride)


@njit(cache=True, nogil=True, parallel=True)
def float_matmul(marker, w, w_stride, tile_rows, blocks, x, x_stride, y, y_stride, tokens, threads):
    """Compute Y = X A^T for f16 or f32 weights and float32 activations x (tokens, blocks*32), as an address.

    The other arguments are those of `quantised_matmul`; strides are in bytes.
    """
    for thread in prange(threads):
        first, last = tile_rows * thread // threads, tile_rows * (thread + 1) // threads
        for row in range(first, last):
            a, out, t, source = w + row * w_stride, y + row * 4 * ROWS, 0, x
            while tokens - t >= 8:
                _float_tile_row(marker, 8, a, blocks, source, x_stride, out, y_stride)
                t, source, out = t + 8, source + 8 * x_stride, out + 8 * y_stride
            while tokens > t:
                _float_tile_row(marker, 1, a, blocks, source, x_stride, out, y_stride)
                t, source, out = t + 1, source + x_stride, out + y_stride
