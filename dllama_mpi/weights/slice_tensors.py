"""The tensors of a slice file: parts that are checked when they are taken."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from ..errors import ModelError
from ..kernels.layout import TileFormat, aligned_empty, ceil_div
from .arena import WEIGHTS
from .files import Ranges
from .source import Tensor

TABLE_ROWS = 16  # rows of the table under one checksum


class DamagedSlice(ModelError):
    """A slice file whose bytes are not those that were written."""


@dataclass(frozen=True)
class SlicePart:
    """What a slice holds of a tensor.

    Attributes:
        shape: the whole's. ranges: of the part. kind: "matrix", "vector", "zeros" (of a vector) or "table" (whole).
    """

    shape: tuple[int, ...]
    ranges: Ranges
    kind: str

    def __str__(self) -> str:
        return " x ".join(f"{start}..{stop}" for start, stop in self.ranges)


@dataclass(frozen=True)
class SliceTensor(Tensor):
    """A part of a tensor, which is checked when it is taken and serves as that part of the whole alone.

    Attributes:
        part: what it holds. format, row_scales: of a matrix; see `TileTensor`.
        checksums: of its bytes and of its row scales'; None: they are in memory of their own, checked already.
        where: the file, for people.
    """

    part: SlicePart = field(kw_only=True)
    format: TileFormat | None = field(default=None, kw_only=True)
    row_scales: np.ndarray | None = field(default=None, kw_only=True)
    checksums: tuple[int, ...] | None = field(kw_only=True)
    where: str = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole's shape."""
        return self.part.shape

    def _check(self, wanted: Ranges, *arrays: np.ndarray) -> None:
        if wanted != self.part.ranges:
            needed = SlicePart(self.part.shape, wanted, self.part.kind)
            raise ModelError(
                f"{self.where} holds {self.part} of {self.name}, and {needed} is needed;"
                " give a slice made for this number of ranks and this --split, or the whole model"
            )
        for array, checksum in zip(arrays, self.checksums or (), strict=False):
            if zlib.crc32(array.reshape(-1).view(np.uint8).data) != checksum:
                raise DamagedSlice(f"{self.where} is damaged in {self.name}")

    def values(self, ranges: Ranges) -> np.ndarray:
        """Return a vector's values as float32; ranges must be those of the part."""
        self._check(ranges, self.data)
        return super().values(tuple((0, stop - start) for start, stop in ranges))

    def make_tiles(self, ranges: Ranges, fmt: TileFormat) -> tuple[np.ndarray, np.ndarray]:
        """Return the tiles, copied unless they are in memory of their own; ranges must be those of the part."""
        if self.format is not fmt:
            raise ModelError(
                f"{self.where} holds {self.name} in another format than {fmt.name}; leave out --weights, or give the"
                " whole model"
            )
        scales = np.zeros(0, np.float32) if self.row_scales is None else self.row_scales
        arrays = [self.data, *([] if self.row_scales is None else [self.row_scales])]
        if self.checksums is not None:
            copies = [WEIGHTS.empty(arrays[0].shape), *(aligned_empty(a.shape, a.dtype.type) for a in arrays[1:])]
            for copy, array in zip(copies, arrays, strict=True):
                copy[...] = array
            arrays = copies
        self._check(ranges, *arrays)
        return arrays[0], arrays[1] if len(arrays) > 1 else scales


@dataclass(frozen=True)
class CheckedTable(Tensor):
    """An embedding table in a file, whose rows are checked by sixteens when one is first looked up.

    Attributes:
        table: it, without the checks.
    """

    checksums: np.ndarray = field(kw_only=True)
    where: str = field(kw_only=True)
    table: Tensor = field(kw_only=True)
    seen: set[int] = field(default_factory=set, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The table's shape."""
        return self.table.shape

    def values(self, ranges: Ranges) -> np.ndarray:
        """Return rows as float32, a copy."""
        start, stop = ranges[0]
        for unit in range(start // TABLE_ROWS, ceil_div(stop, TABLE_ROWS)):
            if unit not in self.seen:
                data = self.data[unit * TABLE_ROWS : (unit + 1) * TABLE_ROWS]
                if zlib.crc32(data.reshape(-1).view(np.uint8).data) != self.checksums[unit]:
                    raise DamagedSlice(f"{self.where} is damaged in {self.name}; remove it and start again")
                self.seen.add(unit)
        return self.table.values(ranges)
