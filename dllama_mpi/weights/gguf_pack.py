"""Matrices as rows of blocks or numbers, as GGUF files have them: tiles keep their codes, values are rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ModelError
from ..kernels.layout import BLOCK, FORMATS, ROWS, TileFormat, ceil_to
from .gguf_types import BY_NAME, BlockType
from .source import Range, Tensor
from .tiles import TileMatrix, load_matrix, read_rows

FORMAT_OF = {"Q4_0": "q40", "Q8_0": "q80", "IQ4_NL": "iq4nl", "MXFP4": "mxfp4"}
"""The tile format whose codes a type of blocks has."""
_NAN = 255  # an exponent of MXFP4


def tile_format(kind: BlockType) -> TileFormat | None:
    """Return the tile format with the codes of a type; None for plain numbers."""
    return FORMATS[FORMAT_OF[kind.name]] if kind.name in FORMAT_OF else None


def blocks_of(matrix: TileMatrix) -> np.ndarray:
    """Return the blocks of a matrix in a format of `FORMAT_OF`, (rows, bytes) uint8, with the codes of its tiles."""
    tiles = matrix.tiles[0]
    down, across = tiles.shape[:2]
    heads = np.ascontiguousarray(tiles[:, :, : 2 * ROWS]).view(np.float16)
    heads = heads.transpose(0, 2, 1).reshape(ROWS * down, across)
    codes = tiles[:, :, 2 * ROWS :].reshape(down, across, -1, ROWS, 4).transpose(0, 3, 1, 2, 4)
    codes = codes.reshape(ROWS * down, across, -1)
    if matrix.format.has_row_scales:
        first, codes = _exponents(heads, matrix.row_scales[0], codes)
    else:
        first = np.ascontiguousarray(heads).view(np.uint8).reshape(ROWS * down, across, 2)
    return np.concatenate([first, codes], axis=2).reshape(ROWS * down, -1)[: matrix.rows]


def _exponents(heads: np.ndarray, row_scales: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return MXFP4's scales, (rows, blocks, 1) uint8 exponents of two, and codes: zeros where a scale is zero."""
    scales = heads.astype(np.float64) * row_scales.astype(np.float64)[:, None]
    # The table has doubles, so a block's own scale is twice that; frexp's mantissa is a half.
    exponents = np.frexp(scales)[1] - 1 + 1 + 127
    is_used = (scales > 0) & (exponents >= 0) & (exponents < _NAN)
    first = np.where(is_used, exponents, 0).astype(np.uint8)
    return first[:, :, None], np.where(is_used[:, :, None], codes, np.uint8(0))


@dataclass(frozen=True)
class RowReader:
    """Rows of a matrix, or of one of each expert, in a type of GGUF's.

    Attributes:
        shape: the whole's.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    kind: BlockType

    def read(self, expert: int, index: np.ndarray) -> np.ndarray:
        """Return rows by number, (rows, bytes) uint8.

        Raises:
            ModelError: the tensor is of another shape, or has a value that is not finite or too large for float16.
        """
        out: list[np.ndarray] = []
        for run in _runs(index):
            first = int(run.min()) // ROWS * ROWS
            last = min(ceil_to(int(run.max()) + 1, ROWS), self.shape[-2])
            out.append(self._span(expert, (first, last))[run - first])
        return out[0] if len(out) == 1 else np.concatenate(out)

    def _span(self, expert: int, rows: Range) -> np.ndarray:
        cols, fmt = (0, self.shape[-1]), tile_format(self.kind)
        if fmt is not None:
            experts = ((expert, expert + 1),) if len(self.shape) == 3 else ()
            return blocks_of(load_matrix(self.tensor, self.shape, (*experts, rows, cols), fmt))
        values = np.zeros((rows[1] - rows[0], cols[1]), np.float32)
        read_rows(self.tensor, expert, rows, cols, values)
        return as_bytes(values, self.kind, self.tensor.name)


def as_bytes(values: np.ndarray, kind: BlockType, name: str) -> np.ndarray:
    """Return float32 values as bytes of F32 or F16, uint8, the last axis in bytes.

    Raises:
        ModelError: a value is too large for float16.
    """
    if kind is BY_NAME["F16"]:
        with np.errstate(over="ignore"):  # it is looked for
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise ModelError(f"tensor {name} has values above 65504, which F16 cannot hold; give --type q8_0")
        return halves.view(np.uint8)
    return np.ascontiguousarray(values).view(np.uint8)


def _runs(index: np.ndarray) -> list[np.ndarray]:
    """Return rows in parts, each of which lies close together."""
    if not index.size or int(index.max()) - int(index.min()) < 4 * index.size:
        return [index] if index.size else []
    ends = np.flatnonzero(np.abs(np.diff(index)) > 2 * BLOCK) + 1
    return np.split(index, ends)
