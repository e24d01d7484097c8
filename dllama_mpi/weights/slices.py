"""Slice files: all that one rank needs of a model, in one safetensors file.

A slice holds the rank's rows or columns of every matrix as tiles, as `tiles.load_matrix` gives them, its parts of the
vectors as float32, and the whole embedding table as the source has it, since every rank looks up the same bits there.
The last tensor, `checksums` (U32), has the CRC-32 of the header, then of each tensor in turn; of the table one for
every 16 rows, so that what is looked up can be checked without reading the rest.

The file is the same whether a rank received it, `convert --only` wrote it, or it lies in a cache. Its key is a digest
of what it was made from (`WeightSource.lineage`), the formats, and which parts it holds.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from ..kernels.layout import TileFormat, ceil_div
from .arena import WEIGHTS
from .checkpoint import (
    LAYOUT,
    LAYOUT_KEY,
    LINEAGE_KEY,
    SCALES,
    Checkpoint,
    block_table,
    format_metadata,
    name_of,
)
from .files import (
    Entry,
    File,
    lay_out,
    matrix_entries,
    model_name,
    read_piece,
    table_entry,
    table_metadata,
    vector_entry,
)
from .slice_tensors import TABLE_ROWS, CheckedTable, DamagedSlice, SlicePart, SliceTensor
from .source import Tensor, WeightSource

CHECKSUMS = "checksums"
KEY, PARTS = "dllama_mpi.slice", "dllama_mpi.parts"
MODEL, ABOUT = "dllama_mpi.model", "dllama_mpi.about"  # for people
SLICE_LAYOUT = "2"
STREAM_BYTES = 4 << 20  # what is sent or written at once: bytes, of a matrix as float32


Parts = Mapping[str, SlicePart]


@dataclass(frozen=True)
class Manifest:
    """What the root has, from which every rank can tell what its slice file is: sizes, header and key.

    Attributes:
        model: its name, for people. formats: of the matrices. lineage: see `WeightSource.lineage`.
        table: dtype of the embedding table in the source; "" if the root has no whole model.
    """

    model: str
    formats: Mapping[str, TileFormat]
    lineage: str
    table: str

    @classmethod
    def of(cls, source: WeightSource, formats: Mapping[str, TileFormat], parts: Parts) -> Manifest:
        """Return the manifest of slices of a whole model; parts: those of any rank."""
        table = next(name for name, part in parts.items() if part.kind == "table")
        lineage = source.lineage(formats)
        return cls(model_name(source.folder), formats, lineage, source[origin(source, table)].dtype)

    def key(self, parts: Parts) -> str:
        """Return the key of a slice: 16 hexadecimal digits."""
        said = json.dumps([SLICE_LAYOUT, name_of(self.formats), self.lineage, _plain(parts)])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def file(self, parts: Parts, about: str) -> File:
        """Return what lies where in a slice file. about: which rank's it is, for people."""
        entries = [
            entry
            for name, part in parts.items()
            if part.kind == "matrix"
            for entry in matrix_entries(name, part.shape, part.ranges, self.formats[name])
        ]
        for name, part in parts.items():
            if part.kind == "table":
                entry = table_entry(name, self.table, part.shape)
                entries.append(replace(entry, unit=TABLE_ROWS * entry.size // entry.shape[0]))
        entries += [
            vector_entry(name, part.shape, part.ranges, part.kind == "zeros")
            for name, part in parts.items()
            if part.kind in ("vector", "zeros")
        ]
        count = _slots(entries)[CHECKSUMS].start
        entries.append(Entry(CHECKSUMS, "", "U32", (count,), unit=4 * count))
        metadata = {**format_metadata(self.formats), LAYOUT_KEY: LAYOUT, LINEAGE_KEY: self.lineage}
        metadata |= table_metadata(self.table)
        metadata |= {
            MODEL: self.model,
            ABOUT: about,
            KEY: self.key(parts),
            PARTS: json.dumps(_plain(parts), separators=(",", ":")),
        }
        return lay_out("", entries, metadata)


def origin(source: WeightSource, name: str) -> str:
    """Return the name under which a source has a tensor: a tied model may have the table or the lm_head alone."""
    return name if name in source else {TABLE: HEAD, HEAD: TABLE}.get(name, name)


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _plain(parts: Parts) -> dict[str, Any]:
    return {name: [part.shape, part.ranges, part.kind] for name, part in parts.items()}


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

    def __init__(self, source: WeightSource, file: File) -> None:
        self._source, self.file = source, file
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
            data = read_piece(self._source, found, piece)
            self._sums.add(entry, piece.start, data)
            yield entry, piece.start, data


# ---- reading


class SliceCheckpoint(Checkpoint):
    """A slice file in place of a model's files: gives the parts it holds, and nothing else.

    Attributes:
        path: the file. key: see the module. model, about: of what and which rank's it is, for people.
        keep: something to be kept as long as the slice is in use.
    """

    is_whole = False

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
        self._sums = self.raw(CHECKSUMS)[0]
        if not self._sums.size or zlib.crc32(self._header()) != self._sums[0]:
            raise DamagedSlice(f"{path} is damaged in its header")
        self.key, self.model, self.about = (self.metadata[name] for name in (KEY, MODEL, ABOUT))
        self.parts = parse_parts(self.metadata[PARTS])
        self._slots = _slots(self._entries())

    def _entries(self) -> list[Entry]:
        """Return the entries as their checksums need them."""
        entries = []
        for name in self.names():
            data, dtype = self.raw(name)
            unit = TABLE_ROWS * data[:1].nbytes if self.parts.get(name, _NO_PART).kind == "table" else 0
            entries.append(Entry(name, name, dtype, data.shape, unit=unit))
        return entries[:-1]

    def _header(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read(self._tensors[CHECKSUMS][2])

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, which checks itself when it is read."""
        data, dtype = self.raw(name)
        part = self.parts.get(name, _NO_PART)
        if part.kind == "table":
            slots = self._slots[name]
            sums = self._sums[slots.start : slots.stop]
            table = super().__getitem__(name)
            return CheckedTable(name, table.dtype, data, checksums=sums, where=str(self.path), table=table)
        fmt, scales, names = self.formats.get(name), None, [name]
        if fmt is not None and fmt.has_row_scales:
            scales, names = self.raw(name + SCALES)[0], [name, name + SCALES]
        checksums = tuple(int(self._sums[self._slots[each].start]) for each in names)
        return SliceTensor(
            name, dtype, data, part=part, format=fmt, row_scales=scales, checksums=checksums, where=str(self.path)
        )


_NO_PART = SlicePart((), (), "")


def parse_parts(text: str) -> dict[str, SlicePart]:
    """Return the parts that a slice's metadata names."""
    return {
        name: SlicePart(tuple(shape), tuple((start, stop) for start, stop in ranges), kind)
        for name, (shape, ranges, kind) in json.loads(text).items()
    }


class SliceInMemory:
    """A slice that was received into memory, as a `WeightSource`: its tiles are used where they lie."""

    is_whole = False

    def __init__(self, file: File, manifest: Manifest, parts: Parts) -> None:
        """Take room for everything a slice file would hold.

        Raises:
            MemoryError: there is too little.
        """
        self.folder = Path(manifest.model)
        self.formats: Mapping[str, TileFormat] = manifest.formats
        self._lineage, self._parts, self._table = manifest.lineage, parts, manifest.table
        self._held = {entry.name: (entry, WEIGHTS.empty((entry.size,))) for entry in file.entries}

    def write(self, entry: Entry, start: int, data: np.ndarray) -> None:
        """Take bytes (n,) uint8 of an entry, from byte `start` on."""
        self._held[entry.name][1][start : start + len(data)] = data

    def finish(self) -> WeightSource:
        """Return the slice as it is loaded from, now that it is whole."""
        return self

    def discard(self) -> None:
        """Give back the room."""
        self._held.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def _array(self, name: str) -> np.ndarray:
        entry, data = self._held[name]
        kind = {"F32": np.float32, "U8": np.uint8, "U32": np.uint32}.get(entry.dtype, np.uint16)
        values: np.ndarray = data.view(kind).reshape(entry.shape)
        return values

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor."""
        entry, part = self._held[name][0], self._parts.get(name, _NO_PART)
        if not entry.ranges:
            if part.kind == "table" and table_metadata(self._table):
                return block_table(name, self._table, self._array(name))
            return Tensor(name, entry.dtype, self._array(name))
        scales = self._array(name + SCALES) if name + SCALES in self._held else None
        return SliceTensor(
            name,
            entry.dtype,
            self._array(name),
            part=part,
            format=entry.format,
            row_scales=scales,
            checksums=None,
            where="the received slice",
        )

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return nothing: it was made from the table."""
        return []

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return what the matrices have been made from."""
        return self._lineage

    def let_go(self) -> None:
        """Do nothing: nothing was read from a file."""


def slices_in(folder: Path) -> list[SliceCheckpoint]:
    """Return the slices that `convert --only` put into a folder.

    Raises:
        ModelError: one of them is damaged.
    """
    return [SliceCheckpoint(path) for path in sorted(folder.glob("slice-*-of-*.safetensors"))]
