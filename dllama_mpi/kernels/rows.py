"""Several rows of tiles times any number of tokens, on the calling thread."""

from __future__ import annotations

from numba import njit

from .layout import BLOCK, ROWS
from .matmul import _float_tile_row, _quantised_tile_row


@njit(cache=True, nogil=True, inline="never")
def quantised_rows(marker, w, w_stride, first, last, blocks, xq, xs, xc, y, y_stride, tokens):
    """Multiply rows [first, last) of q40 or q80 tiles with Q80 activations.

    marker: the format's empty array. w: address of the matrix; w_stride: bytes from one row of tiles to the next;
    blocks: tiles in a row. xq, xs, xc: addresses of contiguous codes (tokens, 32 * blocks) int8, scales and offsets
    (tokens, blocks) float32 and int32, an offset being -8 times the sum of its block's codes. y: address of the
    matrix's first output, float32; y_stride: bytes from one token's outputs to the next.
    """
    for row in range(first, last):
        a, out, n = w + row * w_stride, y + row * 4 * ROWS, tokens
        q, s, c = xq, xs, xc
        while n >= 8:
            _quantised_tile_row(marker, 8, a, blocks, q, s, c, out, y_stride)
            n, q, s, c, out = n - 8, q + 8 * BLOCK * blocks, s + 32 * blocks, c + 32 * blocks, out + 8 * y_stride
        if n >= 4:
            _quantised_tile_row(marker, 4, a, blocks, q, s, c, out, y_stride)
            n, q, s, c, out = n - 4, q + 4 * BLOCK * blocks, s + 16 * blocks, c + 16 * blocks, out + 4 * y_stride
        if n >= 2:
            _quantised_tile_row(marker, 2, a, blocks, q, s, c, out, y_stride)
            n, q, s, c, out = n - 2, q + 2 * BLOCK * blocks, s + 8 * blocks, c + 8 * blocks, out + 2 * y_stride
        if n > 0:
            _quantised_tile_row(marker, 1, a, blocks, q, s, c, out, y_stride)


@njit(cache=True, nogil=True, inline="never")
def float_rows(marker, w, w_stride, first, last, blocks, x, x_stride, y, y_stride, tokens):
    """Multiply rows [first, last) of f16 or f32 tiles with float32 activations.

    x: address of (tokens, 32 * blocks) float32, x_stride bytes apart; the rest as in `quantised_rows`.
    """
    for row in range(first, last):
        a, out, n, source = w + row * w_stride, y + row * 4 * ROWS, tokens, x
        while n >= 8:
            _float_tile_row(marker, 8, a, blocks, source, x_stride, out, y_stride)
            n, source, out = n - 8, source + 8 * x_stride, out + 8 * y_stride
        if n >= 4:
            _float_tile_row(marker, 4, a, blocks, source, x_stride, out, y_stride)
            n, source, out = n - 4, source + 4 * x_stride, out + 4 * y_stride
        if n >= 2:
            _float_tile_row(marker, 2, a, blocks, source, x_stride, out, y_stride)
            n, source, out = n - 2, source + 2 * x_stride, out + 2 * y_stride
        if n > 0:
            _float_tile_row(marker, 1, a, blocks, source, x_stride, out, y_stride)
