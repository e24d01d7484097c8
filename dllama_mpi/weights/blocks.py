"""Matrices and tables in the blocks of GGUF files: cut by rows and columns, turned into tiles by compiled code."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ModelError
from ..kernels.ggml import dequantise_rows
from ..kernels.layout import BLOCK, MXFP4, TileFormat, ceil_div
from ..kernels.quantize import pack_mxfp4
from ..kernels.repack import repack
from .gguf_types import BlockType
from .source import Range, Tensor
from .tiles import TileMatrix, empty_matrix


@dataclass(frozen=True)
class BlockTensor(Tensor):
    """A matrix, or one of each expert, or a table of embeddings, in blocks.

    Attributes:
        type: of the blocks. data: (rows, bytes) uint8, or with a first axis of experts.
    """

    type: BlockType = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, in columns."""
        *others, size = super().shape
        return (*others, size // self.type.size * self.type.columns)

    def _rows(self, expert: int, rows: Range) -> tuple[np.ndarray, np.ndarray]:
        """Return an expert's matrix, or the only one, and which of its rows are wanted."""
        data = self.data[expert] if self.data.ndim == 3 else self.data
        index = np.arange(*rows) if self.order is None else self.order[slice(*rows)]
        return data, np.ascontiguousarray(index, np.int64)

    def _blocks(self, expert: int, rows: Range, cols: Range, out: np.ndarray) -> int:
        """Write rows and columns as float32; return how many values of their blocks are not finite."""
        data, index = self._rows(expert, rows)
        columns, size = self.type.columns, self.type.size
        first, last = cols[0] // columns, ceil_div(cols[1], columns)
        part = data[:, first * size : last * size]
        whole = np.empty((len(index), (last - first) * columns), np.float32)
        if self.type.is_compiled:
            bad = dequantise_rows(self.type.number, part, index, (columns, size), whole)
        else:
            whole[...] = _rare(self.type)(part[index])
            bad = int((~np.isfinite(whole)).sum())
        start = cols[0] - first * columns
        out[: len(index), : cols[1] - cols[0]] = whole[:, start : start + cols[1] - cols[0]]
        return bad

    def fill(self, expert: int, rows: Range, cols: Range, out: np.ndarray) -> int:
        """Write rows and columns of a matrix, of one expert if there are several, into the corner of float32 `out`.

        Returns how many of the values are not finite.
        """
        return self._blocks(expert, rows, cols, out)

    def values(self, ranges: tuple[Range, ...]) -> np.ndarray:
        """Return rows of the table as float32, a copy."""
        rows, cols = ranges[-2:]
        out = np.empty((rows[1] - rows[0], cols[1] - cols[0]), np.float32)
        self._blocks(0, rows, cols, out)
        return out

    def make_tiles(self, ranges: tuple[Range, ...], fmt: TileFormat) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a part as tiles, with the codes that are there if the format has them.

        Raises:
            ModelError: a scale is no number.
        """
        is_mxfp4 = self.type.name == "MXFP4"
        inside = all(stop <= size for (_, stop), size in zip(ranges, self.shape, strict=True))
        if not self.type.is_compiled or (fmt is MXFP4 and not is_mxfp4) or not inside:
            return None  # what is beyond the tensor is refused where its shape is checked
        *experts, rows, cols = ranges
        matrix = empty_matrix(fmt, tuple(stop - start for start, stop in ranges))
        if not matrix.tiles.size:
            return matrix.tiles, matrix.row_scales
        for i, expert in enumerate(range(*experts[0]) if experts else (0,)):
            data, index = self._rows(expert, rows)
            if fmt is MXFP4:
                bad = self._keep_mxfp4(data[index], cols, matrix, i)
            else:
                block = self.type.columns, self.type.size
                bad = repack(self.type.number, data, index, block, cols[0], fmt, matrix.tiles[i], matrix.row_scales[i])
            if bad:
                which = f" in expert {expert}" if experts else ""
                raise ModelError(
                    f"tensor {self.name} has {bad} scales or values that are NaN or infinite{which}; get it again"
                )
        self.release()
        return matrix.tiles, matrix.row_scales

    def _keep_mxfp4(self, rows: np.ndarray, cols: Range, matrix: TileMatrix, i: int) -> int:
        blocks = rows.reshape(len(rows), -1, self.type.size)
        exponents = blocks[:, :, 0].astype(np.int32) - 127
        codes = np.ascontiguousarray(blocks[:, :, 1:])
        pack_mxfp4(codes, exponents, cols, matrix.tiles[i], matrix.row_scales[i], apart=16)
        return int((exponents == 128).sum()) * BLOCK


def _rare(kind: BlockType) -> Any:
    """Return what makes float32 of rows of blocks, from the package `gguf`.

    Raises:
        ModelError: it is not installed.
    """
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise ModelError(
            f"blocks of {kind.name} are read by the package gguf: pip install 'dllama-mpi[gguf]'"
        ) from None
    return functools.partial(quants.dequantize, qtype=GGMLQuantizationType(kind.number))
