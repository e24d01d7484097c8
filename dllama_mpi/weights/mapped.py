"""A published checkpoint under the names of `model.tensors`: other names, fused and stacked tensors, taken apart.

Nothing is copied: what a tensor of the table is made of is a view of the mapped file, read when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import ModelError
from ..kernels.layout import BLOCK, MXFP4, ROWS, TileFormat, ceil_div
from ..kernels.quantize import pack_mxfp4
from .source import Range, Tensor
from .tiles import empty_matrix


class Tensors(Protocol):
    """The tensors of a published checkpoint under its own names; folder: what it is called."""

    folder: Path

    def __contains__(self, name: str) -> bool:
        """Return whether there is such a tensor."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor."""

    def names(self) -> list[str]:
        """Return the names of all tensors."""

    def raw(self, name: str) -> tuple[np.ndarray, str]:
        """Return a tensor's elements as they lie in the file, and the name of their type."""

    def let_go(self) -> None:
        """Give back the memory of all pages that were read."""

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return what the matrices have been made from; see `Checkpoint.lineage`."""


class Place(Protocol):
    """Where a tensor of the table is found in a published checkpoint."""

    @property
    def names(self) -> Sequence[str]:
        """The checkpoint's tensors that it is made of."""

    def open(self, name: str, source: Tensors) -> Tensor:
        """Return the tensor under the table's name."""

    def renamed(self, rename: Callable[[str], str]) -> Place:
        """Return the same place where the checkpoint's names are others."""


PLAIN_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Ref:
    """A tensor, or a part of one, of a checkpoint.

    Attributes:
        name: the checkpoint's. index: which of a stack of tensors. rows: a slice of its rows, or which they are (after
            transposing; of a stack of matrices, of each of them). all_rows: whether it has no others.
        stacked: whether the first axis is that of experts also in two dimensions: vectors.
        transposed: whether rows and columns are swapped there. flat: whether it is a vector in several dimensions.
        columns: for a matrix, which column there each column is; whole blocks of 32 stay together.
        single: whether it is a vector there, and a matrix of one row here.
        add: what is added to every value of a vector. exponents: whether a vector's values are -exp of those wanted.
    """

    name: str
    index: int | None = None
    rows: slice | Sequence[int] | None = None
    all_rows: bool = False
    columns: Sequence[int] | None = None
    stacked: bool = False
    transposed: bool = False
    flat: bool = False
    single: bool = False
    add: float = 0.0
    exponents: bool = False

    @property
    def names(self) -> Sequence[str]:
        """The checkpoint's tensors that it is made of."""
        return (self.name,)

    def renamed(self, rename: Callable[[str], str]) -> Ref:
        """Return the same place where the checkpoint's names are others."""
        return replace(self, name=rename(self.name))

    def open(self, name: str, source: Tensors) -> Tensor:
        """Return the tensor under the table's name."""
        tensor = source[self.name]
        changes = self.flat or self.single or self.add or self.exponents or self.transposed
        if tensor.dtype not in PLAIN_DTYPES and changes:
            raise ModelError(f"tensor {self.name} is {tensor.dtype}; only {', '.join(PLAIN_DTYPES)} can be read here")
        data = tensor.data if self.index is None else tensor.data[self.index]
        if self.transposed:
            data = data.swapaxes(-1, -2)
        order = None
        if isinstance(self.rows, slice):
            of_each = (data.ndim == 3 and not self.flat) or self.stacked
            data = data[:, self.rows] if of_each else data[self.rows]
        elif self.rows is not None:
            order = self._order(self.rows, data.shape[0])
            if self.flat:
                data, order = data[order], None
        if self.flat or self.single:
            data = data.reshape(-1 if self.flat else (1, -1))
        # What is fused is read by several tensors in turn: its pages stay.
        release = tensor.release if self.rows is None and self.index is None else (lambda: None)
        if self.add or self.exponents:
            return Changed(name, tensor.dtype, data, order, release, add=self.add, exponents=self.exponents)
        made = replace(tensor, name=name, data=data, order=order, release=release)
        if self.columns is None:
            return made
        columns = self._order(self.columns, tensor.shape[-1])
        blocks = columns[: len(columns) // BLOCK * BLOCK].reshape(-1, BLOCK)
        if (
            blocks.size < columns.size
            or (blocks - blocks[:, :1] != np.arange(BLOCK)).any()
            or (blocks[:, 0] % BLOCK).any()
        ):
            raise ModelError(f"tensor {self.name}: columns are in an order that takes blocks of {BLOCK} apart")
        return Reordered(name, made.dtype, made.data, whole=made, first=blocks[:, 0].copy())

    def _order(self, wanted: Sequence[int], count: int) -> np.ndarray:
        """Return which of so many rows, or columns, are wanted.

        Raises:
            ModelError: there are too few; or more, where all are wanted.
        """
        order = np.asarray(wanted, np.int64)
        last = int(order.max(initial=-1)) + 1
        if last > count or (self.all_rows and last < count):
            raise ModelError(f"tensor {self.name} has {count} rows or columns, but the config implies {last}")
        return order


@dataclass(frozen=True)
class Changed(Tensor):
    """A vector to whose values something is added, or of which the logarithms of what is below 0 are wanted."""

    add: float = 0.0
    exponents: bool = False

    def values(self, ranges: tuple[Range, ...]) -> np.ndarray:
        """Return a part as float32, a copy."""
        found = super().values(ranges)
        if self.exponents:
            with np.errstate(all="ignore"):  # what is no number is refused by its name
                found = np.log(-found)
        return found + np.float32(self.add)


@dataclass(frozen=True)
class Reordered(Tensor):
    """A matrix whose blocks of 32 columns are another one's in another order.

    Attributes:
        whole: that one. first: the first of its columns of each block.
    """

    whole: Tensor = field(kw_only=True)
    first: np.ndarray = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.whole.shape

    def _runs(self, cols: Range) -> Iterator[tuple[int, Range]]:
        """Yield where columns that lie side by side belong, and which those are."""
        blocks = self.first[cols[0] // BLOCK : ceil_div(cols[1], BLOCK)]
        ends = [*(np.flatnonzero(np.diff(blocks) != BLOCK) + 1).tolist(), len(blocks)]
        for start, stop in zip([0, *ends], ends, strict=False):
            yield BLOCK * start, (int(blocks[start]), int(blocks[stop - 1]) + BLOCK)

    def fill(self, expert: int, rows: Range, cols: Range, out: np.ndarray) -> int:
        """Write rows and columns of the matrix into the corner of float32 `out`."""
        return sum(self.whole.fill(expert, rows, theirs, out[:, at:]) for at, theirs in self._runs(cols))

    def make_tiles(self, ranges: tuple[Range, ...], fmt: TileFormat) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a part as tiles and row scales if the other one makes them itself."""
        if not ranges[1][1] - ranges[1][0]:
            return self.whole.make_tiles(ranges, fmt)
        made = [self.whole.make_tiles((ranges[0], theirs), fmt) for _, theirs in self._runs(ranges[1])]
        found = [each for each in made if each is not None]
        if len(found) < len(made):
            return None
        matrix = empty_matrix(fmt, tuple(stop - start for start, stop in ranges))
        np.concatenate([tiles for tiles, _ in found], axis=2, out=matrix.tiles)
        return matrix.tiles, found[0][1]


@dataclass(frozen=True)
class Stack:
    """The tensors of all experts, each of its own in the checkpoint."""

    refs: tuple[Ref, ...]

    @property
    def names(self) -> Sequence[str]:
        """The checkpoint's tensors that it is made of."""
        return [ref.name for ref in self.refs]

    def renamed(self, rename: Callable[[str], str]) -> Stack:
        """Return the same place where the checkpoint's names are others."""
        return Stack(tuple(ref.renamed(rename) for ref in self.refs))

    def open(self, name: str, source: Tensors) -> Tensor:
        """Return the tensor under the table's name."""
        opened = [ref.open(ref.name, source) for ref in self.refs]
        shapes = {tensor.shape for tensor in opened}
        if len(shapes) > 1:
            raise ModelError(f"{name}: the experts' tensors have different shapes, {', '.join(map(str, shapes))}")
        return StackedTensor(name, opened[0].dtype, opened[0].data, parts=tuple(opened))


@dataclass(frozen=True)
class StackedTensor(Tensor):
    """Tensors of experts as one with a first axis of experts."""

    parts: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return (len(self.parts), *self.parts[0].shape)

    def fill(self, expert: int, rows: Range, cols: Range, out: np.ndarray) -> int:
        """Write rows and columns of one expert's matrix into the corner of float32 `out`."""
        bad = self.parts[expert].fill(0, rows, cols, out)
        if rows[1] == self.parts[expert].shape[0]:
            self.parts[expert].release()
        return bad

    def make_tiles(self, ranges: tuple[Range, ...], fmt: TileFormat) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a part as tiles and row scales if the experts' tensors make them themselves."""
        matrix = empty_matrix(fmt, tuple(stop - start for start, stop in ranges))
        for i, expert in enumerate(range(*ranges[0])):
            made = self.parts[expert].make_tiles(ranges[1:], fmt)
            if made is None:
                return None
            matrix.tiles[i], matrix.row_scales[i] = made[0][0], made[1][0]
        return (matrix.tiles, matrix.row_scales) if len(matrix.tiles) else None

    def values(self, ranges: tuple[Range, ...]) -> np.ndarray:
        """Return a part of all experts' vectors as float32."""
        return np.stack([self.parts[expert].values(ranges[1:]) for expert in range(*ranges[0])])


@dataclass(frozen=True)
class Mxfp4:
    """Matrices of experts in MXFP4 (OCP Microscaling Formats, version 1.0), as gpt-oss has them.

    Attributes:
        blocks: name of (experts, rows, cols / 32, 16) uint8, two codes a byte, the even column's low.
        scales: name of (experts, rows, cols / 32) uint8, exponents of two with a bias of 127. rows: which of them.
    """

    blocks: str
    scales: str
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def names(self) -> Sequence[str]:
        """The checkpoint's tensors that it is made of."""
        return self.blocks, self.scales

    def renamed(self, rename: Callable[[str], str]) -> Mxfp4:
        """Return the same place where the checkpoint's names are others."""
        return replace(self, blocks=rename(self.blocks), scales=rename(self.scales))

    def open(self, name: str, source: Tensors) -> Tensor:
        """Return the tensor under the table's name."""
        blocks, scales = source.raw(self.blocks)[0], source.raw(self.scales)[0]
        if blocks.ndim != 4 or blocks.shape[:3] != scales.shape or 2 * blocks.shape[3] != BLOCK:
            raise ModelError(f"tensors {self.blocks} {blocks.shape} and {self.scales} {scales.shape} do not fit")
        return Mxfp4Tensor(name, "F4", blocks[:, self.rows], scales=scales[:, self.rows])


def _count_nan(exponents: np.ndarray) -> int:
    """Return how many values have a scale that is NaN: an E8M0 of 255, its bias taken off here."""
    return int((exponents == 128).sum()) * BLOCK


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class Mxfp4Tensor(Tensor):
    """Matrices of experts in MXFP4; `data` are the codes."""

    scales: np.ndarray = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape: (experts, rows, cols)."""
        experts, rows, blocks, _ = self.data.shape
        return experts, rows, BLOCK * blocks

    def _codes(self, expert: int, rows: Range) -> tuple[np.ndarray, np.ndarray]:
        """Return codes (rows, cols) and exponents (rows, cols / 32), without the bias."""
        packed, exponents = self.data[expert, slice(*rows)], self.scales[expert, slice(*rows)].astype(np.int32) - 127
        codes = np.stack([packed & 15, packed >> 4], axis=-1)
        return codes.reshape(len(packed), -1), exponents

    def fill(self, expert: int, rows: Range, cols: Range, out: np.ndarray) -> int:
        """Write rows and columns of one expert's matrix into the corner of float32 `out`.

        Returns how many of the values are not finite.
        """
        codes, exponents = self._codes(expert, rows)
        with np.errstate(over="ignore"):  # it is counted
            values = np.ldexp(E2M1[codes].reshape(*exponents.shape, BLOCK), exponents[..., None])
        values[exponents == 128] = np.nan  # says the standard
        part = values.reshape(codes.shape)[:, slice(*cols)]
        out[: len(part), : part.shape[1]] = part
        return int((~np.isfinite(part)).sum())

    def make_tiles(self, ranges: tuple[Range, ...], fmt: TileFormat) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a part as tiles of MXFP4 with the codes as they are.

        Raises:
            ModelError: a scale is NaN.
        """
        experts, rows, cols = ranges
        if fmt is not MXFP4 or rows[0] % ROWS:
            return None
        matrix = empty_matrix(fmt, tuple(stop - start for start, stop in ranges))
        for i, expert in enumerate(range(*experts) if matrix.tiles.size else ()):
            packed = np.ascontiguousarray(self.data[expert, slice(*rows)])
            exponents = self.scales[expert, slice(*rows)].astype(np.int32) - 127
            if bad := _count_nan(exponents):
                raise ModelError(f"tensor {self.name} has {bad} values that are NaN in expert {expert}; get it again")
            pack_mxfp4(packed, exponents, cols, matrix.tiles[i], matrix.row_scales[i])
        return matrix.tiles, matrix.row_scales


class MappedSource:
    """A checkpoint as published, its tensors under the table's names; see `WeightSource`."""

    is_whole = True

    def __init__(
        self,
        checkpoint: Tensors,
        places: Mapping[str, Place],
        skipped: Sequence[str],
        formats: Mapping[str, TileFormat] | None = None,
    ) -> None:
        """Take where each tensor is, and patterns of the names of those that this program does not use.

        formats: of the matrices that the files hold quantised, by the table's names; else those that are in MXFP4.
        """
        self._checkpoint, self._places = checkpoint, places
        self._skipped = [re.compile(pattern) for pattern in skipped]
        self.folder: Path = checkpoint.folder
        published = {name: MXFP4 for name, place in places.items() if isinstance(place, Mxfp4)}
        self.formats: Mapping[str, TileFormat] = published if formats is None else formats

    def __contains__(self, name: str) -> bool:
        place = self._places.get(name)
        return place is not None and all(part in self._checkpoint for part in place.names)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            ModelError: no such tensor, or of a dtype that cannot be read.
        """
        return self._places[name].open(name, self._checkpoint)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the files' tensors that none of these names stands for, and that are not known to be of no use."""
        used = {part for name in names if name in self._places for part in self._places[name].names}
        return [
            name
            for name in self._checkpoint.names()
            if name not in used and not any(pattern.search(name) for pattern in self._skipped)
        ]

    def let_go(self) -> None:
        """Give back the memory of all pages that were read."""
        self._checkpoint.let_go()

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return what the matrices have been made from; see `Checkpoint.lineage`."""
        return self._checkpoint.lineage(formats)
