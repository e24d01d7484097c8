"""Where weights come from: the protocol that every kind of model file serves, and the tensors it gives.

A source gives tensors under the names of `model.tensors`, whatever its files call them, as values or, where it holds
them, as tiles. A new file format is a new source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ..kernels.layout import TileFormat
from ..kernels.quantize import BF16_BITS, PLAIN, widen_rows

Range = tuple[int, int]


def as_float32(data: np.ndarray, dtype: str) -> np.ndarray:
    """Return values of safetensors dtype F32, F16 or BF16 (the latter two as uint16 bits) as float32."""
    if dtype == "BF16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return data.view(np.float16).astype(np.float32)
    return data.astype(np.float32)


@dataclass(frozen=True)
class Tensor:
    """Values of a tensor, in the table's shape.

    Attributes:
        dtype: safetensors' name of the elements: F32, F16 or BF16, the latter two as uint16 bits.
        data: mapped array, maybe a view with strides. Writing to it never reaches the file.
        order: for a matrix, which row of `data` each row is; None: as they lie.
        release: gives back memory of pages that were read.
    """

    name: str
    dtype: str
    data: np.ndarray
    order: np.ndarray | None = None
    release: Callable[[], None] = field(default=lambda: None, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        rows = self.data.shape[0] if self.order is None else len(self.order)
        return (rows, *self.data.shape[1:])

    def fill(self, expert: int, rows: Range, cols: Range, out: np.ndarray) -> int:
        """Write rows and columns of a matrix, of one expert if there are several, into the corner of float32 `out`.

        Returns how many of the values are not finite.
        """
        data = self.data[expert] if self.data.ndim == 3 else self.data
        index = slice(*rows) if self.order is None else self.order[slice(*rows)]
        kind = BF16_BITS if self.dtype == "BF16" else PLAIN
        return int(widen_rows(data[index, slice(*cols)], kind, out))

    def values(self, ranges: tuple[Range, ...]) -> np.ndarray:
        """Return a part of a vector, or of all experts' vectors, or rows of the table, as float32, a copy."""
        data = self.data if self.order is None else self.data[self.order]
        return as_float32(np.ascontiguousarray(data[tuple(slice(*r) for r in ranges)]), self.dtype)

    def make_tiles(self, ranges: tuple[Range, ...], fmt: TileFormat) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a part as tiles of a format and row scales if the tensor makes them itself; None: it is to be read."""
        return None


@dataclass(frozen=True)
class TileTensor(Tensor):
    """A matrix that lies in its file as tiles, see `kernels.layout`.

    Attributes:
        format: of the tiles. data: (tile rows, tiles in a row, tile_bytes) uint8, or with a first axis of experts.
        row_scales: (rows to 16s,) float32, or with a first axis of experts; None for formats without.
    """

    format: TileFormat = field(kw_only=True)
    row_scales: np.ndarray | None = field(default=None, kw_only=True)


class WeightSource(Protocol):
    """A model's tensors.

    Attributes:
        folder: what the model is called, and where its small files lie. formats: of the tensors that are tiles.
        is_whole: whether it holds the whole model, not one rank's slice.
    """

    folder: Path
    is_whole: bool

    @property
    def formats(self) -> Mapping[str, TileFormat]:
        """See above; read only, so that a source may have any mapping."""

    def __contains__(self, name: str) -> bool:
        """Return whether there is such a tensor."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            ModelError: no such tensor, or of a dtype that cannot be read.
        """

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the tensors of the files that none of these names stands for, as the files call them."""

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return what the matrices have been made from, and by which steps, once they are tiles of these formats."""

    def let_go(self) -> None:
        """Give back the memory of pages that were read; what is needed again is read again."""
