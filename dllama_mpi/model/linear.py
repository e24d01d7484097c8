"""Linear layers Y = X A^T, each knowing how its weight is cut, and the activations that go through them."""

from __future__ import annotations

import numpy as np

from ..kernels.layout import BLOCK, ROWS, TileFormat, ceil_to
from ..weights.checkpoint import Checkpoint
from ..weights.tiles import TileMatrix, aligned_empty, load_matrix, load_vector
from .forward import products

EMPTY = np.zeros(0, np.float32)


class Activations:
    """A buffer for the input of linear layers: float32 values and, for quantised weights, their Q80 form.

    Attributes:
        values: (tokens, cols) float32, cols a multiple of 32; padding stays zero.
        codes, scales, offsets: (tokens, cols) int8, (tokens, cols/32) float32 and int32 (-8 * the block's codes),
            empty when the weights take float32.
    """

    def __init__(self, tokens: int, cols: int, fmt: TileFormat) -> None:
        cols = ceil_to(cols, BLOCK)
        quantised = tokens if fmt.quantised_activations else 0
        self.values = aligned_empty((tokens, cols), np.float32)
        self.values[:] = 0
        self.codes = aligned_empty((quantised, cols), np.int8)
        self.scales = np.zeros((quantised, cols // BLOCK), np.float32)
        self.offsets = np.zeros((quantised, cols // BLOCK), np.int32)

    def quantised(self, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the Q80 arrays for the first tokens, as kernels that fill them take them."""
        return self.codes[:tokens], self.scales[:tokens], self.offsets[:tokens]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return all four arrays, whole, in the order kernels take them."""
        return self.values, self.codes, self.scales, self.offsets


def described(*matrices: TileMatrix) -> np.ndarray:
    """Return matrices as kernels take them, see `kernels.layers`; the matrices must outlive it."""
    tiles = [m.tiles for m in matrices]
    return np.array([[t.ctypes.data, t.strides[0], t.shape[0], t.shape[1]] for t in tiles], np.int64).ravel()


def multiply(matrix: TileMatrix, x: Activations, out: np.ndarray, tokens: int, threads: int) -> None:
    """Compute out[:tokens, :rows] = x @ matrix^T for the whole tiles of the matrix.

    out: (>= tokens, rows rounded up to 16) float32, contiguous.
    """
    products(matrix.format.marker, described(matrix), x.values, x.codes, x.scales, x.offsets, out, tokens, threads)


class ColumnParallelLinear:
    """Y_r = X A_r^T + b_r: the rank holds rows `rows` of A (out, in) and of b; X is whole. No communication."""

    def __init__(
        self, source: Checkpoint, name: str, shape: tuple[int, int], rows: tuple[int, int], fmt: TileFormat, bias: bool
    ) -> None:
        self.matrix = load_matrix(source, f"{name}.weight", shape, rows, (0, shape[1]), fmt)
        self.bias = load_vector(source, f"{name}.bias", shape[0], rows) if bias else EMPTY
        self.width = ceil_to(rows[1] - rows[0], ROWS)


class RowParallelLinear:
    """Y = sum over ranks of X_r A_r^T, + b: the rank holds columns `cols` of A (out, in). One all-reduce.

    The bias, and the residual, are added to the sum on every rank.
    """

    def __init__(
        self, source: Checkpoint, name: str, shape: tuple[int, int], cols: tuple[int, int], fmt: TileFormat, bias: bool
    ) -> None:
        self.matrix = load_matrix(source, f"{name}.weight", shape, (0, shape[0]), cols, fmt)
        self.bias = load_vector(source, f"{name}.bias", shape[0]) if bias else EMPTY
