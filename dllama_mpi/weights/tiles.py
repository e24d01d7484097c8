"""Matrices as tiles: cut from a source, quantised while they are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ModelError
from ..kernels.layout import BLOCK, ROWS, TileFormat, aligned_empty, ceil_div, ceil_to
from ..kernels.matmul import described
from ..kernels.quantize import NO_SCALES, pack_tiles, unpack_tiles, update_row_scales
from .arena import WEIGHTS
from .source import Range, Tensor, TileTensor

_CODES = ("U8", "U32", "I8", "I32", "I64", "F8_E4M3", "F8_E5M2", "F8_E8M0")  # types of elements that are no weights
_CHUNK_BYTES = 16 << 20  # float32 rows held while a matrix is quantised


@dataclass(frozen=True)
class TileMatrix:
    """A (rows, cols) matrix as tiles, or one of each expert.

    Attributes:
        tiles: (experts, tile rows, tiles in a row, tile_bytes) uint8, contiguous.
        row_scales: (experts, rows to 16s) float32, or (experts, 0) for formats without.
    """

    tiles: np.ndarray
    row_scales: np.ndarray
    rows: int
    cols: int
    format: TileFormat

    def __post_init__(self) -> None:
        # Compiled code steps from tile to tile by their size.
        if self.tiles.size and not self.tiles[0, 0].flags.c_contiguous:
            raise ValueError("the tiles of a row must be contiguous")

    def to_float32(self, expert: int = 0) -> np.ndarray:
        """Return the (rows, cols) float32 values of one expert's matrix, or of the only one."""
        tiles = self.tiles[expert]
        out = np.empty((tiles.shape[0] * ROWS, tiles.shape[1] * BLOCK), np.float32)
        unpack_tiles(self.format, tiles, self.row_scales[expert], out)
        return out[: self.rows, : self.cols]

    def fields(self) -> np.ndarray:
        """Return how compiled code sees it, (FIELDS,) int64; the matrix must outlive that. See `kernels.matrix`."""
        return described(self.format, self.tiles, self.row_scales if self.format.has_row_scales else None)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.tiles.nbytes + self.row_scales.nbytes


def matrix_bytes(fmt: TileFormat, sizes: tuple[int, ...]) -> int:
    """Return the bytes of a matrix (rows, cols), or of one of each expert (experts, rows, cols), in a format."""
    *experts, rows, cols = sizes
    tile_rows, tiles, tile_bytes = fmt.shape(rows, cols)
    scales = 4 * ROWS * tile_rows if fmt.has_row_scales else 0
    return (experts[0] if experts else 1) * (tile_rows * tiles * tile_bytes + scales)


def empty_matrix(fmt: TileFormat, sizes: tuple[int, ...]) -> TileMatrix:
    """Return a matrix (rows, cols), or one of each expert (experts, rows, cols): tiles unfilled, row scales zero."""
    *experts, rows, cols = sizes
    count = experts[0] if experts else 1
    shape = fmt.shape(rows, cols)
    scales = aligned_empty((count, ROWS * shape[0] if fmt.has_row_scales else 0), np.float32)
    scales[...] = 0  # of a matrix without columns they are multiplied with its products all the same
    return TileMatrix(WEIGHTS.empty((count, *shape)), scales, rows, cols, fmt)


def check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise if a tensor's elements are no weights, or its shape is not the one that the config implies.

    Raises:
        ModelError: naming their type, or both shapes.
    """
    if tensor.dtype in _CODES and not isinstance(tensor, TileTensor):
        raise ModelError(
            f"tensor {tensor.name} is {tensor.dtype}, but nothing says in which format; get the BF16, F16 or F32 model"
        )
    expected = shape
    if isinstance(tensor, TileTensor):
        expected = (*shape[:-2], *tensor.format.shape(shape[-2], shape[-1]))
    if tensor.shape != expected:
        raise _of_another_shape(tensor, expected)


def _of_another_shape(tensor: Tensor, expected: tuple[int, ...]) -> ModelError:
    return ModelError(f"tensor {tensor.name} has shape {list(tensor.shape)}, but config.json implies {list(expected)}")


def load_matrix(tensor: Tensor, shape: tuple[int, ...], ranges: tuple[Range, ...], fmt: TileFormat) -> TileMatrix:
    """Return a part of a matrix, or of all experts' matrices, in a tile format.

    What has the wanted format already is copied, code for code; anything else is read and quantised 16 MB of float32
    at a time. shape: the whole's. ranges: of each axis; columns must begin at a multiple of 32.

    Raises:
        ModelError: the tensor's shape is not `shape`, or a value is not finite.
    """
    made = tensor.make_tiles(ranges, fmt)
    rows, cols = ranges[-2:]
    sizes = tuple(stop - start for start, stop in ranges)
    if made is not None:
        if tensor.shape != shape:  # the same part of another whole
            raise _of_another_shape(tensor, shape)
        tiles, scales = made
        tiles = tiles if tiles.ndim == 4 else tiles[None]
        return TileMatrix(tiles, scales.reshape(len(tiles), -1), sizes[-2], sizes[-1], fmt)
    check_shape(tensor, shape)
    matrix = empty_matrix(fmt, sizes)
    experts = range(*ranges[0]) if len(shape) == 3 else range(1)
    whole_tiles = rows[0] % ROWS == 0 and (rows[1] % ROWS == 0 or rows[1] == shape[-2])
    for i, expert in enumerate(experts):
        if not matrix.tiles.size:
            continue
        if isinstance(tensor, TileTensor) and tensor.format is fmt:
            (_copy if whole_tiles else _copy_rows)(tensor, expert, rows, cols, matrix, i)
        else:
            _fill(tensor, expert, (rows, cols, shape[-1]), matrix.tiles[i], matrix.row_scales[i], fmt)
    tensor.release()
    return matrix


def _of_expert(array: np.ndarray, expert: int, dims: int) -> np.ndarray:
    one: np.ndarray = array[expert] if array.ndim == dims + 1 else array
    return one


def _copy(tensor: TileTensor, expert: int, rows: Range, cols: Range, to: TileMatrix, i: int) -> None:
    """Copy tiles: decode reads them about 6 % faster from memory of their own, with its large pages."""
    first, last = rows[0] // ROWS, ceil_div(rows[1], ROWS)
    tiles = _of_expert(tensor.data, expert, 3)
    to.tiles[i] = tiles[first:last, cols[0] // BLOCK : ceil_div(cols[1], BLOCK)]
    if tensor.row_scales is not None:
        to.row_scales[i] = _of_expert(tensor.row_scales, expert, 1)[ROWS * first : ROWS * last]


def _copy_rows(tensor: TileTensor, expert: int, rows: Range, cols: Range, to: TileMatrix, i: int) -> None:
    """Copy rows of tiles that the part cuts, code for code: quantising them again would not give the same."""
    first, last, count = rows[0] // ROWS, ceil_div(rows[1], ROWS), rows[1] - rows[0]
    tiles = _of_expert(tensor.data, expert, 3)[first:last, cols[0] // BLOCK : ceil_div(cols[1], BLOCK)]
    wanted, across = slice(rows[0] - ROWS * first, rows[1] - ROWS * first), tiles.shape[1]
    scales = to.row_scales[i, :ROWS]
    if tensor.row_scales is not None:
        to.row_scales[i, :count] = _of_expert(tensor.row_scales, expert, 1)[ROWS * first :][wanted]
    zeros = np.zeros((1, 1, tensor.format.tile_bytes), np.uint8)
    pack_tiles(tensor.format, np.zeros((ROWS, BLOCK), np.float32), zeros, np.zeros_like(scales))
    at = 0
    for width in tensor.format.pieces:
        piece = slice(at, at + ROWS * width)
        by_row = tiles[:, :, piece].reshape(-1, across, ROWS, width).transpose(0, 2, 1, 3)
        moved = np.empty((ROWS * to.tiles.shape[1], across, width), np.uint8)
        moved[:count] = by_row.reshape(-1, across, width)[wanted]
        moved[count:] = zeros[0, 0, at : at + width]  # what rows of padding are
        back = moved.reshape(-1, ROWS, across, width).transpose(0, 2, 1, 3)
        to.tiles[i, :, :, piece] = back.reshape(-1, across, ROWS * width)
        at += ROWS * width


def _fill(
    tensor: Tensor, expert: int, place: tuple[Range, Range, int], tiles: np.ndarray, scales: np.ndarray, fmt: TileFormat
) -> None:
    """Read and quantise rows and columns; place: those, and the columns of the whole."""
    rows, cols, width = place
    padded = ceil_to(width if fmt.has_row_scales else cols[1] - cols[0], BLOCK)
    step = max(ROWS, _CHUNK_BYTES // (4 * padded) // ROWS * ROWS)
    buffer = np.zeros((min(step, ceil_to(rows[1] - rows[0], ROWS)), padded), np.float32)
    for start in range(rows[0], rows[1], step):
        stop = min(rows[1], start + step)
        chunk = buffer[: ceil_to(stop - start, ROWS)]
        chunk[stop - start :] = 0
        first = (start - rows[0]) // ROWS
        own_scales = scales[ROWS * first : ROWS * first + len(chunk)] if fmt.has_row_scales else NO_SCALES
        if fmt.has_row_scales:  # of whole rows, whatever columns this rank holds
            read_rows(tensor, expert, (start, stop), (0, width), chunk)
            own_scales[:] = 0
            update_row_scales(fmt, chunk, own_scales)
            part = np.zeros((len(chunk), ceil_to(cols[1] - cols[0], BLOCK)), np.float32)
            part[:, : cols[1] - cols[0]] = chunk[:, cols[0] : cols[1]]
        else:
            read_rows(tensor, expert, (start, stop), cols, chunk)
            part = chunk
        pack_tiles(fmt, part, tiles[first : first + len(chunk) // ROWS], own_scales)


def read_rows(tensor: Tensor, expert: int, rows: Range, cols: Range, out: np.ndarray) -> None:
    """Write rows and columns of one expert's matrix, or of the only one, as values into the corner of float32 `out`.

    The columns beyond are zero already.

    Raises:
        ModelError: a value is not finite.
    """
    if isinstance(tensor, TileTensor):
        out[: rows[1] - rows[0], : cols[1] - cols[0]] = _from_tiles(tensor, expert, rows, cols)
        bad = 0
    else:
        bad = tensor.fill(expert, rows, cols, out)
    if bad:
        where = f"rows {rows[0]} to {rows[1] - 1}" + (f" of expert {expert}" if len(tensor.shape) == 3 else "")
        raise ModelError(f"tensor {tensor.name} has {bad} values that are NaN or infinite in {where}; get it again")


def _from_tiles(tensor: TileTensor, expert: int, rows: Range, cols: Range) -> np.ndarray:
    first, last = rows[0] // ROWS, ceil_div(rows[1], ROWS)
    tiles = _of_expert(tensor.data, expert, 3)[first:last, cols[0] // BLOCK : ceil_div(cols[1], BLOCK)]
    scales = NO_SCALES
    if tensor.row_scales is not None:
        scales = _of_expert(tensor.row_scales, expert, 1)[ROWS * first : ROWS * last]
    out = np.empty((tiles.shape[0] * ROWS, tiles.shape[1] * BLOCK), np.float32)
    unpack_tiles(tensor.format, tiles, scales, out)
    return out[rows[0] - first * ROWS : rows[1] - first * ROWS, : cols[1] - cols[0]]


def load_vector(tensor: Tensor, shape: tuple[int, ...], ranges: tuple[Range, ...]) -> np.ndarray:
    """Return a part of a vector, or of all experts' vectors, as float32.

    Raises:
        ModelError: the tensor is of another shape, or a value is not finite.
    """
    check_shape(tensor, shape)
    values = tensor.values(ranges)
    if not np.isfinite(values).all():
        raise ModelError(f"tensor {tensor.name} has values that are NaN or infinite; get it again")
    return values
