"""How weights lie in memory: tiles of 16 rows x 32 columns, the same bytes for every instruction set.

A matrix of shape (rows, cols) is an array (ceil(rows/16), ceil(cols/32), tile_bytes) of uint8, padded with zeros,
which can be sliced along rows (column-parallel) and along columns (row-parallel) at any rank count. A tile holds

q40    288 bytes: 16 fp16 scales, then four 64-byte chunks. Byte 4*r + c of chunk j holds, for row r, column 4*j + c
       in the low nibble and column 16 + 4*j + c in the high one; value = scale * (nibble - 8).
q4m    288 bytes: 16 bytes s, 16 bytes m, nibbles as in q40; value = D * (s * nibble - 8 * m), with a float32 D a row.
iq4nl  288 bytes: scales and nibbles as in q40; value = scale * table[nibble], an int8.
mxfp4  the same with another table; value = D * scale * table[nibble], D and the scales being powers of two.
q80    544 bytes: 16 fp16 scales, then eight 64-byte chunks. Byte 4*r + c of chunk j is the int8 code of row r,
       column 4*j + c; value = scale * code.
f16    1024 bytes: for each of the 32 columns, 16 fp16 values, one a row.
f32    2048 bytes: the same in fp32.

What a row has once, D, stands beside the tiles in a float32 vector: a cut by columns shares it, a cut by rows cuts it.

A 64-byte chunk of codes is one AVX-512 register, two of AVX2, four of NEON. Each 32-bit lane belongs to one row, so
that a four-way dot product accumulates 16 rows at once and nothing is summed across lanes.

q40, q80 and iq4nl are the 32-wide blocks of GGUF's Q4_0, Q8_0 and IQ4_NL (ggml-quants; the first two are Distributed
Llama's, too), mxfp4 those of the OCP Microscaling specification 1.0: E2M1 values, of which the table has the doubles,
and an E8M0 scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROWS = 16
BLOCK = 32
PAGE = 256  # positions of a page of the KV cache, which is a block of the online softmax
UNIT = 8  # of q4m's minima: what the kernels' offsets are multiples of


def ceil_div(value: int, unit: int) -> int:
    """Return value / unit rounded up."""
    return -(-value // unit)


def ceil_to(value: int, unit: int) -> int:
    """Return `value` rounded up to a multiple of `unit`."""
    return ceil_div(value, unit) * unit


def aligned_empty(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    """Return an uninitialised array on a 64-byte boundary."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def pages_over(positions: int, size: int = PAGE) -> int:
    """Return the most pages in which so many consecutive positions can lie."""
    return min(positions, (positions - 2) // size + 2)


@dataclass(frozen=True)
class TileFormat:
    """A way to store 16 x 32 weights.

    Attributes:
        name: what the command line calls it.
        tile_bytes: size of one tile.
        kernel: the kernel that multiplies it, see `kernels.matmul`; formats that differ in their table may share one.
        quantised_activations: whether the kernels multiply it with Q80 activations (else float32).
        has_row_scales: whether a float32 scale a row stands beside the tiles.
        table: the 16 int8 that nibbles stand for, if any.
    """

    name: str
    tile_bytes: int
    kernel: str
    quantised_activations: bool = True
    has_row_scales: bool = False
    table: tuple[int, ...] | None = None

    @property
    def bits(self) -> float:
        """Bits a weight, without what a row has once."""
        return self.tile_bytes * 8 / (ROWS * BLOCK)

    @property
    def pieces(self) -> tuple[int, ...]:
        """A tile is one array after another with so many bytes of each of its 16 rows."""
        if not self.quantised_activations:
            return (self.tile_bytes // (ROWS * BLOCK),) * BLOCK
        heads = (1, 1) if self.kernel == "q4m" else (2,)
        return heads + (4,) * ((self.tile_bytes - 2 * ROWS) // (4 * ROWS))

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Travel by name, so that a format is one object in every process, whoever sent it."""
        return format_named, (self.name,)

    def shape(self, rows: int, cols: int) -> tuple[int, int, int]:
        """Return the shape of the tile array that holds a (rows, cols) matrix."""
        return ceil_div(rows, ROWS), ceil_div(cols, BLOCK), self.tile_bytes


IQ4NL_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml-quants, IQ4_NL
E2M1_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # the doubles of E2M1

Q40 = TileFormat("q40", 288, "q40")
Q4M = TileFormat("q4m", 288, "q4m", has_row_scales=True)
IQ4NL = TileFormat("iq4nl", 288, "table", table=IQ4NL_TABLE)
MXFP4 = TileFormat("mxfp4", 288, "small_table", has_row_scales=True, table=E2M1_TABLE)
Q80 = TileFormat("q80", 544, "q80")
F16 = TileFormat("f16", 1024, "f16", quantised_activations=False)
F32 = TileFormat("f32", 2048, "f32", quantised_activations=False)
FORMATS: dict[str, TileFormat] = {f.name: f for f in (Q40, Q4M, IQ4NL, MXFP4, Q80, F16, F32)}


def format_named(name: str) -> TileFormat:
    """Return the format of a name."""
    return FORMATS[name]


TABLES = {f.name: np.array(f.table, np.int8) for f in FORMATS.values() if f.table}  # kernels have their addresses
