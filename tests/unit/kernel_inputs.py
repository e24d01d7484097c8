"""Values to try kernels on, and their calls with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dllama_mpi.kernels import elementwise
from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS, aligned_empty
from dllama_mpi.kernels.matmul import described
from dllama_mpi.kernels.matrix import Activations, Matrix
from dllama_mpi.kernels.quantize import pack_tiles, unpack_tiles, update_row_scales
from dllama_mpi.model.linear import multiply
from dllama_mpi.parallel.collective.payload import encode
from dllama_mpi.parallel.collective.table import PAYLOADS
from tests import naive_formats, naive_products
from tests.naive_numbers import Bytes, Floats

SHAPES = ((1, 1), (16, 32), (3, 64), (17, 33), (40, 100), (163, 160))
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 64)  # every remainder of the blocks of 8 that kernels work in
NO_CODES = (np.zeros((0, 0), np.int8), np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32))
Q80 = tuple[np.ndarray, np.ndarray, np.ndarray]


def random(seed: int, *shape: int) -> Floats:
    """Return normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def uneven(seed: int, rows: int, cols: int) -> Floats:
    """Return rows of values at scales from 1e-30 to 1e4, every fifth row and some blocks zero."""
    values = random(seed, rows, cols)
    values *= 10.0 ** np.random.default_rng(seed).uniform(-30, 4, (rows, 1)).astype(np.float32)
    values[0] *= 1e4 / max(np.abs(values[0]).max(), 1e-38)
    values[4::5] = 0
    values[::3, BLOCK : 2 * BLOCK] = 0
    return values


def encoded(x: Floats, payload: str) -> Bytes:
    """Return the payload of x (blocks, 32) by the kernel."""
    out = np.full((len(x), PAYLOADS[payload]), 99, np.uint8)
    encode(x, out)
    return out


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy on a 64-byte boundary: quantised kernels load tiles from multiples of 32 bytes."""
    made = aligned_empty(array.shape, array.dtype.type)
    made[...] = array
    return made


class Tiles(NamedTuple):
    """A matrix as tiles; row_scales: empty for formats without."""

    fmt: str
    tiles: Bytes
    row_scales: Floats

    def part(self, rows: slice, cols: slice) -> Tiles:
        """Return a view of rows and columns of tiles."""
        scales = self.row_scales.reshape(-1, ROWS)[rows if self.row_scales.size else slice(0)]
        return Tiles(self.fmt, self.tiles[rows, cols], scales.ravel())


def packed(values: Floats, fmt: str) -> Tiles:
    """Return a matrix (rows, cols) as tiles by the kernel."""
    tiles = aligned_empty(FORMATS[fmt].shape(*values.shape))
    scales = np.zeros(ROWS * len(tiles) if FORMATS[fmt].has_row_scales else 0, np.float32)
    update_row_scales(FORMATS[fmt], values, scales)
    pack_tiles(FORMATS[fmt], naive_formats.padded(values, ROWS, BLOCK), tiles, scales)
    return Tiles(fmt, tiles, scales)


def unpacked(tiles: Tiles) -> Floats:
    """Return the values of tiles by the kernel, padding included."""
    values = np.full((tiles.tiles.shape[0] * ROWS, tiles.tiles.shape[1] * BLOCK), np.nan, np.float32)
    unpack_tiles(FORMATS[tiles.fmt], tiles.tiles, tiles.row_scales, values)
    return values


def q80_like(x: Floats) -> Q80:
    """Return arrays for the Q80 form of x (tokens, cols), filled with what must not survive."""
    blocks = x.shape[1] // BLOCK
    return (
        np.full(x.shape, 99, np.int8),
        np.full((len(x), blocks), np.nan, np.float32),
        np.full((len(x), blocks), 99, np.int32),
    )


def assert_q80_of(x: Floats, got: Q80) -> None:
    """Check that arrays hold the Q80 form of x, bit for bit."""
    for part, ref in zip(got, naive_products.quantise_activations(x), strict=True):
        np.testing.assert_array_equal(part, ref)


def inputs(x: Floats) -> Activations:
    """Return x (tokens, cols) and its Q80 form as kernels take them."""
    x = naive_formats.padded(x, 1, BLOCK)
    made = Activations(x, *q80_like(x))
    elementwise.quantise(made, len(x), 1)
    return made


def fields(*matrices: Tiles) -> Matrix:
    """Return matrices as kernels take them."""
    each = [described(FORMATS[m.fmt], m.tiles, m.row_scales if m.row_scales.size else None) for m in matrices]
    return Matrix(np.stack(each))


def matmul(tiles: Tiles, x: Floats, threads: int = 1) -> Floats:
    """Return x @ matrix^T (tokens, 16 * rows of tiles) by the kernel; x (tokens, cols) may end inside a block."""
    # Rows are longer than needed: the kernel must keep to its own.
    y = np.full((len(x), ROWS * len(tiles.tiles) + 3), np.nan, np.float32)
    multiply(fields(tiles), 0, inputs(x), y, len(x), threads)
    assert np.isnan(y[:, -3:]).all()
    return y[:, :-3]
