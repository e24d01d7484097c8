"""How compiled code sees matrices and the activations that they are multiplied with.

A matrix is a row of FIELDS int64. One of them is the address of the compiled kernel that multiplies its format, so that
the same code takes matrices of any format, side by side or in turns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compiled import inner
from .layout import BLOCK, aligned_empty, ceil_to
from .simd import I64, address

ADDRESS = 0  # of the first tile
STRIDE = 1  # bytes from one row of tiles to the next
TILE_ROWS = 2  # rows of tiles of one matrix
TILES = 3  # in a row
ROW_SCALES = 4  # address of float32 scales of the rows, padded to whole tiles; 0 for none
TABLE = 5  # address of 16 int8; 0 for none
EXPERT_STRIDE = 6  # bytes from one expert's tiles to the next; 0 where there are no experts
EXPERT_SCALES = 7  # bytes from one expert's row scales to the next
KERNEL = 8  # address of the kernel that multiplies it
FIELDS = 9


class Matrix(NamedTuple):
    """Matrices of the same number of columns.

    Attributes:
        fields: (..., FIELDS) int64; the memory that they tell of must outlive them.
    """

    fields: np.ndarray


class Activations(NamedTuple):
    """Input of linear layers: float32 values and, where a matrix wants it, their Q80 form.

    Attributes:
        values: (tokens, cols) float32, cols a multiple of 32; padding stays zero.
        codes, scales, offsets: (tokens, cols) int8, (tokens, cols/32) float32 and int32 (-8 * the sum of the block's
            codes); (0, ...) where no matrix wants them.
    """

    values: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray


def aligned_zeros(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """Return zeros on a 64-byte boundary."""
    made = aligned_empty(shape, dtype)
    made[...] = 0
    return made


def activations(tokens: int, cols: int, quantised: bool) -> Activations:
    """Return zeroed activations for up to `tokens` tokens of `cols` columns, padded to whole blocks."""
    cols, rows = ceil_to(cols, BLOCK), tokens if quantised else 0
    blocks = cols // BLOCK
    codes = aligned_zeros((rows, cols), np.int8)
    offsets = aligned_zeros((rows, blocks), np.int32)
    return Activations(aligned_zeros((tokens, cols)), codes, aligned_zeros((rows, blocks)), offsets)


@intrinsic
def call_kernel(typingctx, kernel, arguments):
    """Call a kernel, by its address, with a tuple of int64."""

    def codegen(context, builder, signature, args):
        values = [builder.extract_value(args[1], i) for i in range(len(arguments))]
        ty = ir.FunctionType(ir.VoidType(), [I64] * len(values))
        builder.call(builder.inttoptr(args[0], ty.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@inner
def multiply_rows(m, first, last, x, start, tokens, y, y_stride):
    """Multiply rows [first, last) of tiles of a matrix with activation rows start..start + tokens, on this thread.

    m: (FIELDS,) int64. x: `Activations` as wide as the matrix. y: address of the matrix's first output, float32, of the
    first of these tokens; y_stride: bytes from one token's outputs to the next.
    """
    cols = x.values.shape[1]
    blocks = cols // BLOCK
    call_kernel(
        m[KERNEL],
        (
            address(m),
            np.int64(first),
            np.int64(last),
            address(x.values) + 4 * start * cols,
            address(x.codes) + start * cols,
            address(x.scales) + 4 * start * blocks,
            address(x.offsets) + 4 * start * blocks,
            blocks,
            np.int64(tokens),
            y,
            y_stride,
        ),
    )


@inner
def expert_of(m, e, out):
    """Write the fields of expert e's matrix into out (FIELDS,) int64; m: those of all experts' matrices."""
    for i in range(FIELDS):
        out[i] = m[i]
    out[ADDRESS] += e * m[EXPERT_STRIDE]
    out[ROW_SCALES] += e * m[EXPERT_SCALES]
