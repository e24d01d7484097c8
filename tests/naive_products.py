"""Naive twins of quantising activations and of matrix products."""

from __future__ import annotations

import numpy as np

from tests.naive_formats import BLOCK, QUANTISED, as_stored, meaning, padded, quantised
from tests.naive_numbers import F, Floats, Ints, fma, reciprocal


def quantise_activations(x: Floats) -> tuple[Ints, Floats, Ints]:
    """Quantise activations (tokens, cols) to Q80: codes like x, scales and -8 * sums of codes (tokens, cols/32)."""
    blocks = x.reshape(len(x), -1, BLOCK)
    largest = np.abs(blocks).max(axis=2)
    codes = np.rint(blocks * reciprocal(largest, 127)[:, :, None]).astype(np.int64)
    return codes.reshape(x.shape), largest * F(1 / 127), -8 * codes.sum(axis=2)


def quantised_matmul(matrix: Floats, fmt: str, x: Floats) -> Floats:
    """Return x @ matrix^T (tokens, rows) with the matrix in a format of codes and x (tokens, cols) in Q80.

    Block after block: the dot product of the codes, exact, times the product of the scales, added to the sum so far. Of
    q4m: s * dot - 8 * m * (sum of x), rounded once, times the scale of x. In the end times the row's scale.
    """
    blocks = quantised(matrix, fmt)
    numbers = meaning(blocks, fmt)
    x_codes, x_scales, _ = quantise_activations(padded(x, 1, BLOCK))
    x_codes = x_codes.reshape(len(x), -1, BLOCK)
    y = np.zeros((len(x), len(matrix)), np.float32)
    for block in range(numbers.shape[1]):
        dots = (x_codes[:, block] @ numbers[:, block].T).astype(np.float32)
        scale = x_scales[:, block, None]
        if fmt != "q4m":
            scale = scale * blocks.heads[0][:, block].astype(np.float32)
        y = fma(dots, scale, y)
    return y * blocks.row_scales


def float_matmul(matrix: Floats, fmt: str, x: Floats) -> Floats:
    """Return x @ matrix^T (tokens, rows) with the matrix in f16 or f32, column after column."""
    stored = as_stored(matrix, fmt)
    y = np.zeros((len(x), len(matrix)), np.float32)
    for col in range(stored.shape[1]):
        y = fma(x[:, col, None], stored[:, col], y)
    return y


def matmul(matrix: Floats, fmt: str, x: Floats) -> Floats:
    """Return x @ matrix^T (tokens, rows) as the program computes it with weights of a tile format."""
    return quantised_matmul(matrix, fmt, x) if fmt in QUANTISED else float_matmul(matrix, fmt, x)
