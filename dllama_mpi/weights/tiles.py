"""Matrices as tiles: cut from a checkpoint, quantised while they are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ModelError
from ..kernels.layout import (
    BLOCK,
    FORMATS,
    ROWS,
    TileFormat,
    ceil_div,
    ceil_to,
)
from ..kernels.quantize import BF16_BITS, PLAIN, pack_tiles, unpack_tiles, widen_rows
from .checkpoint import Checkpoint, Tensor

_CHUNK_BYTES = 16 << 20  # float32 rows held while a matrix is quantised


@dataclass(frozen=True)
class TileMatrix:
    """A (rows, cols) matrix as tiles (ceil(rows/16), ceil(cols/32), tile_bytes) uint8; may be a strided view."""

    tiles: np.ndarray
    rows: int
    cols: int
    format: TileFormat

    def __post_init__(self) -> None:
        if self.tiles.size and self.tiles.strides[1:] != (self.format.tile_bytes, 1):
            raise ValueError("tiles of one row must be contiguous")

    def to_float32(self) -> np.ndarray:
        """Return the (rows, cols) float32 values."""
        out = np.empty((self.tiles.shape[0] * ROWS, self.tiles.shape[1] * BLOCK), np.float32)
        unpack_tiles(self.tiles, out)
        return out[: self.rows, : self.cols]


def aligned_empty(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    """Return an uninitialised array on a 64-byte boundary."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def check_shape(tensor: Tensor, shape: tuple[int, ...], converted: TileFormat | None) -> None:
    """Raise if a tensor's shape is not the one that the config implies.

    Raises:
        ModelError: naming both shapes.
    """
    expected = shape
    if tensor.is_tiles:
        if converted is None or len(shape) != 2:
            raise ModelError(f"tensor {tensor.name} is U8 but the file does not say in which tile format")
        expected = converted.shape(*shape)
    if tensor.shape != expected:
        raise ModelError(
            f"tensor {tensor.name} has shape {list(tensor.shape)}, but config.json implies {list(expected)}"
        )


def load_matrix(
    source: Checkpoint,
    name: str,
    shape: tuple[int, int],
    rows: tuple[int, int],
    cols: tuple[int, int],
    fmt: TileFormat,
) -> TileMatrix:
    """Return rows and columns of a matrix in a tile format.

    Tiles of the wanted format that the slice does not cut are copied; anything else is read and quantised 16 MB of
    float32 at a time. cols must start at a multiple of 32.

    Raises:
        ModelError: the tensor is missing or its shape is not `shape`.
    """
    tensor = source[name]
    held = FORMATS.get(source.format_name or "")
    check_shape(tensor, shape, held)
    count = (rows[1] - rows[0], cols[1] - cols[0])
    blocks = slice(cols[0] // BLOCK, ceil_div(cols[1], BLOCK))
    whole_tiles = rows[0] % ROWS == 0 and (rows[1] % ROWS == 0 or rows[1] == shape[0])
    tiles = tensor.make_tiles(rows, cols, fmt)
    if tiles is not None:
        source.release(name)
        return TileMatrix(tiles, *count, fmt)
    tiles = aligned_empty(fmt.shape(*count))
    if tensor.is_tiles and held is fmt and whole_tiles:
        # Copied, not used in place: decode reads them about 6 % faster from memory of its own with its large pages.
        tiles[...] = tensor.data[rows[0] // ROWS : ceil_div(rows[1], ROWS), blocks]
    elif tiles.size:
        _fill(tensor, rows, cols, tiles)
    source.release(name)
    return TileMatrix(tiles, *count, fmt)


def _fill(tensor: Tensor, rows: tuple[int, int], cols: tuple[int, int], tiles: np.ndarray) -> None:
    width = tiles.shape[1] * BLOCK
    step = max(ROWS, _CHUNK_BYTES // (4 * width) // ROWS * ROWS)
    buffer = np.zeros((min(step, ceil_to(rows[1] - rows[0], ROWS)), width), np.float32)
    for start in range(rows[0], rows[1], step):
        stop = min(rows[1], start + step)
        part = buffer[: ceil_to(stop - start, ROWS)]
        part[stop - start :] = 0
        if tensor.is_tiles:
            part[: stop - start, : cols[1] - cols[0]] = _from_tiles(tensor.data, (start, stop), cols)
        else:
            kind = BF16_BITS if tensor.dtype == "BF16" else PLAIN
            widen_rows(tensor.data[start:stop, cols[0] : cols[1]], kind, part)
        first = (start - rows[0]) // ROWS
        pack_tiles(part, tiles[first : first + len(part) // ROWS])


def _from_tiles(data: np.ndarray, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
    first = rows[0] // ROWS
    tiles = data[first : ceil_div(rows[1], ROWS), cols[0] // BLOCK : ceil_div(cols[1], BLOCK)]
    out = np.empty((tiles.shape[0] * ROWS, tiles.shape[1] * BLOCK), np.float32)
    unpack_tiles(tiles, out)
    return out[rows[0] - first * ROWS : rows[1] - first * ROWS, : cols[1] - cols[0]]


def load_vector(source: Checkpoint, name: str, size: int, part: tuple[int, int] | None = None) -> np.ndarray:
    """Return a vector of `size` values, or a part of it, as float32.

    Raises:
        ModelError: the tensor is missing or of another size.
    """
    tensor = source[name]
    check_shape(tensor, (size,), None)
    start, stop = part if part is not None else (0, size)
    return np.ascontiguousarray(tensor.rows(start, stop))
