"""Linear layers Y = X A^T, each knowing how its weight is cut, and the activations that go through them."""

from __future__ import annotations

import numpy as np

from ..kernels import elementwise
from ..kernels.layout import BLOCK, ROWS, TileFormat, ceil_to
from ..kernels.matmul import float_matmul, quantised_matmul
from ..parallel.group import TensorParallelGroup
from ..weights.checkpoint import Checkpoint
from ..weights.tiles import TileMatrix, aligned_empty, load_matrix, load_vector

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

    def quantise(self, tokens: int) -> None:
        """Make the Q80 form of the first tokens' values, if there is one."""
        if self.codes.size:
            elementwise.quantise(self.values[:tokens], *self.quantised(tokens))


def multiply(matrix: TileMatrix, x: Activations, out: np.ndarray, tokens: int, threads: int) -> None:
    """Compute out[:tokens, :rows] = x @ matrix^T for the whole tiles of the matrix.

    out: (tokens, >= rows rounded up to 16) float32, rows contiguous.
    """
    tiles = matrix.tiles
    common = (matrix.format.marker, tiles.ctypes.data, tiles.strides[0], tiles.shape[0], tiles.shape[1])
    target = (out.ctypes.data, out.strides[0], tokens, threads)
    if matrix.format.quantised_activations:
        inputs = (x.codes.ctypes.data, x.scales.ctypes.data, x.offsets.ctypes.data)
        quantised_matmul(*common, *inputs, *target)
    else:
        float_matmul(*common, x.values.ctypes.data, x.values.strides[0], *target)


class ColumnParallelLinear:
    """Y_r = X A_r^T + b_r: the rank holds rows `rows` of A (out, in) and of b; X is whole. No communication."""

    def __init__(
        self, source: Checkpoint, name: str, shape: tuple[int, int], rows: tuple[int, int], fmt: TileFormat, bias: bool
    ) -> None:
        self.matrix = load_matrix(source, f"{name}.weight", shape, rows, (0, shape[1]), fmt)
        self.bias = load_vector(source, f"{name}.bias", shape[0], rows) if bias else EMPTY
        self.width = ceil_to(rows[1] - rows[0], ROWS)

    def __call__(self, x: Activations, out: np.ndarray, tokens: int, threads: int) -> None:
        """Write X A_r^T, without the bias, into out (tokens, width)."""
        multiply(self.matrix, x, out, tokens, threads)


class RowParallelLinear:
    """Y = sum over ranks of X_r A_r^T, + b: the rank holds columns `cols` of A (out, in). One all-reduce."""

    def __init__(
        self, source: Checkpoint, name: str, shape: tuple[int, int], cols: tuple[int, int], fmt: TileFormat, bias: bool
    ) -> None:
        self.matrix = load_matrix(source, f"{name}.weight", shape, (0, shape[0]), cols, fmt)
        self.bias = load_vector(source, f"{name}.bias", shape[0]) if bias else EMPTY

    def __call__(
        self, x: Activations, residual: np.ndarray, out: np.ndarray, group: TensorParallelGroup, threads: int
    ) -> None:
        """Add Y to the residual (tokens, n) float32, by way of out, its like."""
        tokens = len(residual)
        multiply(self.matrix, x, out, tokens, threads)
        group.all_reduce(out)
        elementwise.add(residual, out, self.bias)
