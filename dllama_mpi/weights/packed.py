"""Matrices of quantised safetensors: packed codes, steps and zeros of groups, cut by rows and columns as they lie."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..errors import ModelError
from ..kernels.layout import BLOCK, FORMATS, Q4M, Q80, ROWS, TileFormat, ceil_div
from ..kernels.packed import NIBBLE_OF, Layout, Values, heads_of, keep_codes, pack_q80, write_values
from .source import Range, Tensor, as_float32
from .tiles import empty_matrix

_PIECE = 1 << 21  # steps that are held at once as float32


def _e4m3() -> np.ndarray:
    """Return the values of float8 e4m3fn (OCP 8-bit floating point, revision 1.0); 127 and 255 are NaN."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    size[codes & 127 == 127] = np.nan
    values: np.ndarray = np.where(codes > 127, -size, size).astype(np.float32)
    return values


def _e5m2() -> np.ndarray:
    """Return the values of float8 e5m2: float16 without its lower byte."""
    with np.errstate(invalid="ignore"):  # ARM's processors tell of signalling NaNs
        return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


UNSIGNED = np.arange(256, dtype=np.float32)
SIGNED = np.arange(256).astype(np.uint8).view(np.int8).astype(np.float32)
FLOAT8 = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2()}


@dataclass(frozen=True)
class Heads:
    """Steps of a matrix, or its zeros, as they lie.

    Attributes:
        data: two axes, those of rows (or words of rows) and groups. dtype: safetensors' name.
        groups_first: whether the first axis is that of groups. rows: of the matrix that share one; 0: all of them.
        bits: of a packed zero, 0 where values are not packed. along: what is packed in a word: "rows" or "groups".
        interleaved: whether the rows of a word are. add: to a word, before it is taken apart. offset: to each number.
    """

    data: np.ndarray
    dtype: str
    groups_first: bool = False
    rows: int = 1
    bits: int = 0
    along: str = "rows"
    interleaved: bool = False
    add: int = 0
    offset: float = 0.0

    def of(self, index: np.ndarray, groups: int) -> np.ndarray:
        """Return those of some rows of the matrix, (n, groups) float32."""
        data = self.data.T if self.groups_first else self.data
        if not self.bits:
            which = np.zeros_like(index) if self.rows == 0 else index // self.rows
            found = as_any(np.ascontiguousarray(data[which]), self.dtype) + np.float32(self.offset)
            return np.ascontiguousarray(np.broadcast_to(found[:, :groups], (len(index), groups)))
        each, mask = 32 // self.bits, np.uint32((1 << self.bits) - 1)
        if self.along == "groups":
            words = np.repeat(data[index].view(np.uint32), each, axis=1)[:, :groups]
            place = np.arange(groups, dtype=np.uint32)[None] % each
        else:
            words, place = data[index // each].view(np.uint32), (index % each).astype(np.uint32)[:, None]
            place = NIBBLE_OF[place] if self.interleaved else place
        return (words + np.uint32(self.add) >> place * np.uint32(self.bits) & mask).astype(np.float32)


def as_any(data: np.ndarray, dtype: str) -> np.ndarray:
    """Return numbers of any dtype of safetensors that steps and zeros have as float32."""
    if dtype in FLOAT8:
        found: np.ndarray = FLOAT8[dtype][data]
        return found
    if dtype == "F8_E8M0":  # OCP Microscaling Formats: powers of two, 255 is NaN
        powers: np.ndarray = np.ldexp(np.float32(1), data.astype(np.int32) - 127)
        powers[data == 255] = np.nan
        return powers
    return as_float32(data, dtype)


@dataclass(frozen=True)
class Packed:
    """A matrix as it is stored; a weight is step * (table[code] - zero).

    Attributes:
        name: of the tensor that has the codes. shape: (rows, cols). layout, raw: how the codes lie, see
            `kernels.packed`. steps, zeros: of groups; zeros may be one number. group: columns of a group.
        order: each column's group, where they are not in order. kept: the format that has the same codes, if any.
    """

    name: str
    shape: tuple[int, int]
    layout: Layout
    raw: np.ndarray
    steps: Heads
    zeros: Heads | float
    table: np.ndarray
    group: int
    order: np.ndarray | None
    kept: TileFormat | None

    @property
    def groups(self) -> int:
        """How many groups of columns there are."""
        return ceil_div(self.shape[1], self.group)

    @property
    def keeps_order(self) -> bool:
        """Whether groups are blocks of 32 columns side by side."""
        whole = self.group % BLOCK == 0 or self.groups == 1
        return self.order is None and whole and self.shape[1] % BLOCK == 0

    @property
    def middle(self) -> float:
        """The zero of symmetric codes."""
        return 8.0 if self.layout.bits == 4 else float(self.layout.flip & 255)

    @property
    def format(self) -> TileFormat:
        """The tile format that keeps it best."""
        return FORMATS["q80"] if self.kept is None or not self.keeps_order else self.kept

    def heads(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and zeros of some rows, (n, groups) float32 each.

        Raises:
            ModelError: a step is no number; or zeros are not the one that the config says.
        """
        steps = self.steps.of(index, self.groups)
        if not np.isfinite(steps).all():
            count = int((~np.isfinite(steps)).sum())
            raise ModelError(f"tensor {self.name} has {count} scales that are NaN or infinite; get it again")
        if isinstance(self.zeros, Heads):
            return steps, self.zeros.of(index, self.groups)
        return steps, np.full_like(steps, self.zeros)

    def values(self, index: np.ndarray, cols: Range) -> Values:
        """Return what the codes of some rows and columns stand for.

        Raises:
            ModelError: a step is no number.
        """
        groups = np.arange(*cols) // self.group if self.order is None else self.order[slice(*cols)]
        return Values(np.ascontiguousarray(groups, np.int32), *self.heads(index), self.table)

    def keeps(self, fmt: TileFormat) -> bool:
        """Return whether a format has the same codes."""
        if self.kept is None or not self.keeps_order:
            return False
        if fmt is not Q4M:
            return fmt is self.kept
        return self.layout.bits == 4 and not (as_any(self.steps.data, self.steps.dtype) < 0).any()


@dataclass(frozen=True)
class PackedTensor(Tensor):
    """A matrix of packed codes, or one of each expert; `data` are which of its rows they are: (..., rows, 1) int64."""

    packed: Packed = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        shape = super().shape
        return (*shape[:-1], shape[-1] * self.packed.shape[1])

    def _rows(self, expert: int, rows: Range) -> np.ndarray:
        data = self.data[expert] if self.data.ndim == 3 else self.data
        index = data[slice(*rows)] if self.order is None else data[self.order[slice(*rows)]]
        return np.ascontiguousarray(index[:, 0], np.int64)

    def fill(self, expert: int, rows: Range, cols: Range, out: np.ndarray) -> int:
        """Write rows and columns of a matrix, of one expert if there are several, into the corner of float32 `out`.

        Returns how many of the values are not finite.
        """
        packed, index = self.packed, self._rows(expert, rows)
        start = cols[0] // BLOCK * BLOCK
        made = np.empty((len(index), cols[1] - start), np.float32)
        given = packed.values(index, (start, cols[1]))
        bad = write_values(packed.layout, packed.raw, index, start // BLOCK, given, made)
        out[: len(index), : cols[1] - cols[0]] = made[:, cols[0] - start :]
        return bad

    def values(self, ranges: tuple[Range, ...]) -> np.ndarray:
        """Return rows as float32."""
        rows, cols = ranges[-2:]
        out = np.empty((rows[1] - rows[0], cols[1] - cols[0]), np.float32)
        self.fill(0, rows, cols, out)
        return out

    def make_tiles(self, ranges: tuple[Range, ...], fmt: TileFormat) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a part as tiles with the codes that are there, if the format has them.

        Raises:
            ModelError: a scale is no number, or none that the format has.
        """
        inside = all(stop <= size for (_, stop), size in zip(ranges, self.shape, strict=True))
        keeps = inside and self.packed.keeps(fmt)
        if not inside or not (keeps or fmt is Q80):
            return None
        *experts, rows, cols = ranges
        matrix = empty_matrix(fmt, tuple(stop - start for start, stop in ranges))
        step = max(1, _PIECE // self.packed.groups // ROWS) * ROWS
        for i, expert in enumerate(range(*experts[0]) if experts else (0,)):
            for start in range(*rows, step):
                index = self._rows(expert, (start, min(start + step, rows[1])))
                first = (start - rows[0]) // ROWS
                piece = slice(first, first + ceil_div(len(index), ROWS))
                if keeps:
                    own = matrix.row_scales[i, ROWS * piece.start : ROWS * piece.stop]
                    self._keep(fmt, index, cols, matrix.tiles[i, piece], own)
                else:
                    self._pack(index, cols, matrix.tiles[i, piece])
        self.release()
        return matrix.tiles, matrix.row_scales

    def _keep(self, fmt: TileFormat, index: np.ndarray, cols: Range, tiles: np.ndarray, row_scales: np.ndarray) -> None:
        packed = self.packed
        heads, found = self._heads(fmt, index)
        row_scales[...] = found
        keep_codes(packed.layout, packed.raw, index, cols[0] // BLOCK, max(1, packed.group // BLOCK), heads, tiles)

    def _pack(self, index: np.ndarray, cols: Range, tiles: np.ndarray) -> None:
        packed = self.packed
        bad = pack_q80(packed.layout, packed.raw, index, cols[0] // BLOCK, packed.values(index, cols), tiles)
        if bad:
            raise ModelError(f"tensor {packed.name} has {bad} values that are NaN or infinite; get it again")

    def _heads(self, fmt: TileFormat, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps, zeros = self.packed.heads(index)
        middle = None if fmt is Q4M else self.packed.middle
        if middle is not None and (zeros != middle).any():
            raise ModelError(
                f"tensor {self.packed.name} has a zero-point of {int(zeros[zeros != middle][0])}, but the config says"
                ' that it is symmetric; set "sym" to false in its quantization_config'
            )
        if middle is not None and steps.size and np.abs(steps).max() > np.finfo(np.float16).max:
            raise ModelError(
                f"tensor {self.packed.name} has a scale of {float(np.abs(steps).max()):g}, beyond float16; load it with"
                " --weights f32"
            )
        return heads_of(fmt, steps, zeros)
