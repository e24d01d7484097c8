"""Slice files: all that one rank needs of a model, in one safetensors file.

A slice holds the rank's rows or columns of every matrix as tiles, as `tiles.load_matrix` gives them, its parts of the
vectors, and the whole embedding table as the source has it, since every rank looks up the same bits there. The last
tensor, `checksums` (U32), has the CRC-32 of the header, then of each tensor in turn; of the table one for every 16
rows, so that what is looked up can be checked without reading the rest.

The file is the same whether a rank received it, `convert --only` wrote it, or it lies in a cache. Its key is a digest
of what it was made from (`Checkpoint.lineage`), the format, and which parts it holds.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from ..kernels.layout import BLOCK, ROWS, TileFormat, ceil_div
from .checkpoint import (
    LAYOUT,
    LAYOUT_KEY,
    LINEAGE_KEY,
    TILES_KEY,
    Checkpoint,
    Tensor,
)
from .files import (
    HEAD,
    TABLE,
    Entry,
    File,
    Part,
    lay_out,
    read_piece,
)
from .tiles import aligned_empty

CHECKSUMS = "checksums"
KEY, PARTS = "dllama_mpi.slice", "dllama_mpi.parts"
MODEL, ABOUT = "dllama_mpi.model", "dllama_mpi.about"  # for people
TABLE_ROWS = 16  # rows of the table under one checksum
STREAM_BYTES = 4 << 20  # what is sent or written at once: bytes, of a matrix as float32


class DamagedSlice(ModelError):
    """A slice file whose bytes are not those that were written."""


@dataclass(frozen=True)
class Recipe:
    """What the root has, from which every rank can tell what its slice file is: sizes, header and key.

    Attributes:
        model: its name, for people. format: of the tiles. lineage: see `Checkpoint.lineage`.
        dtypes: of the table and the vectors in the source, and the table's shape; None if the root has no whole model.
    """

    model: str
    format: TileFormat
    lineage: str
    dtypes: Mapping[str, str] | None

    @classmethod
    def of(cls, source: Checkpoint, fmt: TileFormat, vectors: Mapping[str, int]) -> Recipe:
        """Return the recipe of slices of a whole model."""
        names = {name: origin(source, name) for name in (TABLE, *vectors)}
        dtypes = {name: source[found].dtype for name, found in names.items()}
        return cls(source.folder.resolve().name, fmt, source.lineage(fmt), dtypes)

    def key(self, parts: Mapping[str, Part]) -> str:
        """Return the key of a slice: 16 hexadecimal digits."""
        said = json.dumps([LAYOUT, self.format.name, self.lineage, _plain(parts)])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def file(self, parts: Mapping[str, Part], about: str) -> File:
        """Return what lies where in a slice file. about: which rank's it is, for people."""
        assert self.dtypes is not None
        shape = parts[HEAD].shape
        entries = [
            Entry(name, name, "U8", self.format.shape(*_pair(part.sizes)), part)
            for name, part in parts.items()
            if len(part.shape) == 2
        ]
        row = 2 if self.dtypes[TABLE] != "F32" else 4
        entries.append(Entry(TABLE, TABLE, self.dtypes[TABLE], shape, unit=TABLE_ROWS * row * shape[1]))
        entries += [
            Entry(name, name, self.dtypes[name], part.sizes, part)
            for name, part in parts.items()
            if len(part.shape) == 1
        ]
        count = _slots(entries)[CHECKSUMS].start
        entries.append(Entry(CHECKSUMS, "", "U32", (count,), unit=4 * count))
        metadata = {TILES_KEY: self.format.name, LAYOUT_KEY: LAYOUT, LINEAGE_KEY: self.lineage}
        metadata |= {
            MODEL: self.model,
            ABOUT: about,
            KEY: self.key(parts),
            PARTS: json.dumps(_plain(parts), separators=(",", ":")),
        }
        return lay_out("", entries, metadata)


def origin(source: Checkpoint, name: str) -> str:
    """Return the name under which a source has a tensor: a tied model may have the table or the lm_head alone."""
    return name if name in source else {TABLE: HEAD, HEAD: TABLE}.get(name, name)


def _plain(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {name: [part.shape, part.ranges] for name, part in parts.items()}


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    return sizes[0], sizes[1]


def _slots(entries: list[Entry]) -> dict[str, range]:
    """Return where in the checksums each entry's are; those of a last one, `checksums`, begin where they end."""
    slots, first = {}, 1
    for entry in entries:
        count = ceil_div(entry.size, entry.unit) if entry.unit else 1
        slots[entry.name] = range(first, first + count)
        first += count
    return {**slots, CHECKSUMS: range(first, first)}


class Checksums:
    """The CRC-32 of a slice file's header and tensors, taken piece by piece as they are read or received."""

    def __init__(self, file: File) -> None:
        self._slots = _slots(list(file.entries[:-1]))
        self.values = np.zeros(self._slots[CHECKSUMS].start, np.uint32)
        self.values[0] = zlib.crc32(file.header)

    def add(self, entry: Entry, start: int, data: np.ndarray) -> None:
        """Take the next bytes of an entry, (n,) uint8 from byte `start` on: whole units if it has units."""
        unit = entry.unit or max(1, entry.size)
        for first in range(0, len(data), unit):
            slot = self._slots[entry.name][(start + first) // unit]
            self.values[slot] = zlib.crc32(data[first : first + unit].data, int(self.values[slot]))


class SliceReader:
    """Reads a slice file's contents from a whole model, entry by entry."""

    def __init__(self, source: Checkpoint, fmt: TileFormat, file: File) -> None:
        self._source, self._format, self.file = source, fmt, file
        self._sums = Checksums(file)

    def read(self, index: int) -> Iterator[tuple[Entry, int, np.ndarray]]:
        """Yield the pieces of an entry: (entry, first byte in it, (n,) uint8). Entries are to be read in order.

        Raises:
            ModelError: a tensor is missing or cannot be read.
        """
        entry = self.file.entries[index]
        if entry.name == CHECKSUMS:
            yield entry, 0, self._sums.values.view(np.uint8)
            return
        found = replace(entry, origin=origin(self._source, entry.origin))
        for piece in entry.pieces(STREAM_BYTES):
            data = read_piece(self._source, self._format, found, piece)
            self._sums.add(entry, piece.start, data)
            yield entry, piece.start, data


# ---- reading


@dataclass(frozen=True)
class SliceTensor(Tensor):
    """A part of a tensor, which is checked when it is taken and serves as that part of the whole alone.

    Attributes:
        part: what it holds. checksum: of its bytes; None: they have been checked, and are in memory of their own.
        where: the file, for people.
    """

    part: Part
    checksum: int | None
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole's shape, in tiles for a matrix."""
        if not self.is_tiles:
            return self.part.shape
        return ceil_div(self.part.shape[0], ROWS), ceil_div(self.part.shape[1], BLOCK), self.data.shape[2]

    def _check(self, wanted: tuple[tuple[int, int], ...], data: np.ndarray) -> None:
        if wanted != self.part.ranges:
            raise ModelError(
                f"{self.where} holds {self.part} of {self.name}, and {Part(self.part.shape, wanted)} is needed;"
                " give a slice made for this number of ranks and this --split, or the whole model"
            )
        if self.checksum is not None and zlib.crc32(data.reshape(-1).view(np.uint8).data) != self.checksum:
            raise DamagedSlice(f"{self.where} is damaged in {self.name}")

    def rows(self, start: int, stop: int, cols: tuple[int, int] | None = None) -> np.ndarray:
        """Return a vector's values as float32; start and stop must be those of the part."""
        self._check(((start, stop),), self.data)
        return super().rows(0, stop - start)

    def make_tiles(self, rows: tuple[int, int], cols: tuple[int, int], fmt: TileFormat) -> np.ndarray:
        """Return the tiles, copied unless they are in memory of their own; rows and cols must be those of the part."""
        if self.data.shape[2] != fmt.tile_bytes:
            raise ModelError(f"{self.where} holds tiles of another format than {fmt.name}; give that as --weights")
        tiles = self.data
        if self.checksum is not None:
            tiles = aligned_empty(self.data.shape)
            tiles[...] = self.data
        self._check((rows, cols), tiles)
        return tiles


@dataclass(frozen=True)
class CheckedTable(Tensor):
    """An embedding table in a file, whose rows are checked by sixteens when one is first looked up."""

    checksums: np.ndarray
    where: str
    seen: set[int] = field(default_factory=set)

    def rows(self, start: int, stop: int, cols: tuple[int, int] | None = None) -> np.ndarray:
        """Return rows as float32, a copy."""
        for unit in range(start // TABLE_ROWS, ceil_div(stop, TABLE_ROWS)):
            if unit not in self.seen:
                data = self.data[unit * TABLE_ROWS : (unit + 1) * TABLE_ROWS]
                if zlib.crc32(data.reshape(-1).view(np.uint8).data) != self.checksums[unit]:
                    raise DamagedSlice(f"{self.where} is damaged in {self.name}; remove it and start again")
                self.seen.add(unit)
        return super().rows(start, stop, cols)


class SliceCheckpoint(Checkpoint):
    """A slice file in place of a model's files: gives the parts it holds, and nothing else.

    Attributes:
        path: the file. key: see the module. model, about: of what and which rank's it is, for people.
        keep: something to be kept as long as the slice is in use.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and check its size and header; its tensors are checked when they are taken.

        Raises:
            ModelError: not a slice, or of another layout. DamagedSlice: truncated or damaged.
        """
        self.path = path
        self.keep: object = None
        try:
            super().__init__(path.parent, [path])
        except ModelError as error:
            raise DamagedSlice(str(error)) from None
        if KEY not in self.metadata or CHECKSUMS not in self:
            raise ModelError(f"{path} is no slice of a model; write one with convert --only")
        self._sums = super().__getitem__(CHECKSUMS).data
        if not self._sums.size or zlib.crc32(self._header()) != self._sums[0]:
            raise DamagedSlice(f"{path} is damaged in its header")
        self.key, self.model, self.about = (self.metadata[name] for name in (KEY, MODEL, ABOUT))
        self.parts = parse_parts(self.metadata[PARTS])
        self._slots = _slots(self._entries())

    def _entries(self) -> list[Entry]:
        """Return the entries as their checksums need them."""
        entries = []
        for name in self.names():
            tensor = super().__getitem__(name)
            unit = TABLE_ROWS * tensor.data[:1].nbytes if name == TABLE else 0
            entries.append(Entry(name, name, tensor.dtype, tensor.data.shape, unit=unit))
        return entries[:-1]

    def _header(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read(self._tensors[CHECKSUMS][2])

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, which checks itself when it is read."""
        tensor = super().__getitem__(name)
        slots = self._slots[name]
        sums = self._sums[slots.start : slots.stop]
        if name not in self.parts:
            return CheckedTable(name, tensor.dtype, tensor.data, sums, str(self.path))
        return SliceTensor(name, tensor.dtype, tensor.data, self.parts[name], int(sums[0]), str(self.path))


def parse_parts(text: str) -> dict[str, Part]:
    """Return the parts that a slice's metadata names."""
    return {
        name: Part(tuple(shape), tuple((start, stop) for start, stop in ranges))
        for name, (shape, ranges) in json.loads(text).items()
    }


class SliceInMemory(Checkpoint):
    """A slice that was received into memory: its tiles are used where they lie."""

    def __init__(self, file: File, recipe: Recipe) -> None:
        """Take room for everything a slice file would hold.

        Raises:
            MemoryError: there is too little.
        """
        self.folder, self.format_name = Path(recipe.model), recipe.format.name
        self.metadata = {LINEAGE_KEY: recipe.lineage}
        self._held = {entry.name: (entry, aligned_empty((entry.size,))) for entry in file.entries}

    def write(self, entry: Entry, start: int, data: np.ndarray) -> None:
        """Take bytes (n,) uint8 of an entry, from byte `start` on."""
        self._held[entry.name][1][start : start + len(data)] = data

    def finish(self) -> Checkpoint:
        """Return the slice as it is loaded from, now that it is whole."""
        return self

    def discard(self) -> None:
        """Give back the room."""
        self._held.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._held)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor."""
        entry, data = self._held[name]
        kind = {"F32": np.float32, "U8": np.uint8, "U32": np.uint32}.get(entry.dtype, np.uint16)
        values = data.view(kind).reshape(entry.shape)
        if entry.part is None:
            return Tensor(name, entry.dtype, values)
        return SliceTensor(name, entry.dtype, values, entry.part, None, "the received slice")

    def release(self, name: str) -> None:
        """Keep the tensor, which lies in memory of its own."""


def slices_in(folder: Path) -> list[SliceCheckpoint]:
    """Return the slices that `convert --only` put into a folder.

    Raises:
        ModelError: one of them is damaged.
    """
    return [SliceCheckpoint(path) for path in sorted(folder.glob("slice-*-of-*.safetensors"))]
