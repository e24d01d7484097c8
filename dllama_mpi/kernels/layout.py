"""How weights lie in memory: tiles of 16 rows x 32 columns, the same bytes for every instruction set.

A matrix of shape (rows, cols) is an array (ceil(rows/16), ceil(cols/32), tile_bytes) of uint8, padded with zeros,
which can be sliced along rows (column-parallel) and along columns (row-parallel) at any rank count. A tile holds

q40  288 bytes: 16 fp16 scales, then four 64-byte chunks. Byte 4*r + c of chunk j holds, for row r, column 4*j + c
     in the low nibble and column 16 + 4*j + c in the high one; value = scale * (nibble - 8).
q80  544 bytes: 16 fp16 scales, then eight 64-byte chunks. Byte 4*r + c of chunk j is the int8 code of row r,
     column 4*j + c; value = scale * code.
f16  1024 bytes: for each of the 32 columns, 16 fp16 values, one a row.
f32  2048 bytes: the same in fp32.

A 64-byte chunk of codes is one AVX-512 register, two of AVX2, four of NEON. Each 32-bit lane belongs to one row, so
that a four-way dot product accumulates 16 rows at once and nothing is summed across lanes.

Q40 and Q80 are the 32-wide blocks of GGUF's Q4_0 and Q8_0 (ggml-quants) and of Distributed Llama.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROWS = 16
BLOCK = 32


def ceil_div(value: int, unit: int) -> int:
    """Return value / unit rounded up."""
    return -(-value // unit)


def ceil_to(value: int, unit: int) -> int:
    """Return `value` rounded up to a multiple of `unit`."""
    return ceil_div(value, unit) * unit


@dataclass(frozen=True)
class TileFormat:
    """A way to store 16 x 32 weights.

    Attributes:
        name: what the command line calls it.
        tile_bytes: size of one tile.
        quantised_activations: whether the kernels multiply it with Q80 activations (else float32).
        marker: an empty array whose dtype tells kernels the format at compile time.
    """

    name: str
    tile_bytes: int
    quantised_activations: bool
    marker: np.ndarray

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return self.tile_bytes * 8 / (ROWS * BLOCK)

    def shape(self, rows: int, cols: int) -> tuple[int, int, int]:
        """Return the shape of the tile array that holds a (rows, cols) matrix."""
        return ceil_div(rows, ROWS), ceil_div(cols, BLOCK), self.tile_bytes


Q40 = TileFormat("q40", 288, True, np.empty(0, np.uint8))
Q80 = TileFormat("q80", 544, True, np.empty(0, np.int8))
F16 = TileFormat("f16", 1024, False, np.empty(0, np.uint16))
F32 = TileFormat("f32", 2048, False, np.empty(0, np.float32))
FORMATS = {f.name: f for f in (Q40, Q80, F16, F32)}
