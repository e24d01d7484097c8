"""What lies where in a safetensors file that this program writes, and the bytes of it, piece by piece.

Whole matrices or a rank's rows and columns of them: both are entries that say which part of which tensor they hold.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..kernels.layout import BLOCK, ROWS, TileFormat, ceil_div
from .checkpoint import PADDING, SCALES, TABLE_KEY
from .gguf_types import BY_NAME
from .source import Range, Tensor, WeightSource
from .tiles import load_matrix, load_vector

PIECE_BYTES = 16 << 20  # float32 rows, or bytes of another tensor, that are handled at once
ALIGNMENT = 64  # of tiles in a file: one AVX-512 register, one cache line
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
Ranges = tuple[Range, ...]


@dataclass(frozen=True)
class Piece:
    """What is read and written at once of an entry: `rows` of one expert's matrix of tiles, or bytes of anything else.

    Attributes:
        start: the first of its bytes in the entry. size: bytes.
    """

    expert: int
    rows: Range
    start: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A tensor of a new file.

    Attributes:
        origin: its name in the source; "" for zeros.
        dtype, shape: as in the file.
        whole, ranges: of a matrix that becomes tiles, of its row scales, or of a vector: the whole's shape and the part
            of it; empty: the bytes of the whole tensor, as the source has them.
        format: of a matrix's tiles, or of the matrix whose row scales these are. zeros: a vector of zeros.
        unit: pieces are of whole units of so many bytes, if not 0.
    """

    name: str
    origin: str
    dtype: str
    shape: tuple[int, ...]
    whole: tuple[int, ...] = ()
    ranges: Ranges = ()
    format: TileFormat | None = None
    zeros: bool = False
    unit: int = 0

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def required_format(self) -> TileFormat:
        """The format of a matrix's tiles or row scales."""
        assert self.format is not None
        return self.format

    @property
    def is_tiles(self) -> bool:
        """Whether it is a matrix of tiles."""
        return self.format is not None and self.dtype == "U8"

    def pieces(self, limit: int) -> list[Piece]:
        """Return the pieces of about `limit` bytes, as float32 for a matrix, in order."""
        if not self.is_tiles:
            step = limit
            if self.unit:
                step = max(1, limit // self.unit) * self.unit
            if self.ranges:  # made as one
                step = max(1, self.size)
            ends = [(start, min(start + step, self.size)) for start in range(0, self.size, step)]
            return [Piece(0, each, each[0], each[1] - each[0]) for each in ends]
        if not self.size:
            return []
        experts = range(*self.ranges[0]) if len(self.whole) == 3 else range(1)
        (first, last), each = self.ranges[-2], self.size // len(experts)
        width = each // self.shape[-3]
        cols = self.ranges[-1][1] - self.ranges[-1][0]
        step = max(1, limit // (4 * cols) // ROWS) * ROWS
        rows = [(start, min(start + step, last)) for start in range(first, last, step)]
        return [
            Piece(e, (a, b), i * each + (a - first) // ROWS * width, ceil_div(b - a, ROWS) * width)
            for i, e in enumerate(experts)
            for a, b in rows
        ]


@dataclass(frozen=True)
class File:
    """A safetensors file to write: its entries in the order of their bytes, and the header that says so."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(entry.size for entry in self.entries)


def lay_out(name: str, entries: Iterable[Entry], metadata: Mapping[str, str]) -> File:
    """Return a file of these entries, in this order and without gaps."""
    laid = tuple(entries)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in laid:
        offsets = [end, end + entry.size]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return File(name, struct.pack("<Q", len(text)) + text, laid)


def aligned(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield entries in an order in which each tensor of tiles begins at a multiple of 64 bytes, with padding.

    Tiles come first, and of them those of an even number, as a tile is a multiple of 32 bytes. A file may have no
    holes, so an odd number of tiles is followed by a tensor of padding. Wider numbers come before narrower ones,
    which aligns those too.
    """

    def order(entry: Entry) -> tuple[bool, int]:
        return not entry.is_tiles, entry.size % ALIGNMENT if entry.is_tiles else -_ITEM_BYTES[entry.dtype]

    end = count = 0
    for entry in sorted(entries, key=order):
        if entry.is_tiles and end % ALIGNMENT:
            yield Entry(f"{PADDING}{count}", "", "U8", (-end % ALIGNMENT,))
            end += -end % ALIGNMENT
            count += 1
        yield entry
        end += entry.size
        count += 1


def matrix_entries(name: str, whole: tuple[int, ...], ranges: Ranges, fmt: TileFormat) -> Iterator[Entry]:
    """Yield the tiles of a part of a matrix, or of all experts' matrices, and its row scales if it has them."""
    *experts, rows, cols = (stop - start for start, stop in ranges)
    shape = fmt.shape(rows, cols)
    yield Entry(name, name, "U8", (*experts, *shape), whole, ranges, fmt)
    if fmt.has_row_scales:
        yield Entry(name + SCALES, name, "F32", (*experts, ROWS * shape[0]), whole, ranges, fmt)


def table_entry(name: str, dtype: str, shape: tuple[int, ...]) -> Entry:
    """Return the whole embedding table as its source has it; dtype: safetensors' name, or that of blocks of GGUF."""
    block = BY_NAME.get(dtype)
    if block is not None and not block.is_plain:
        dtype, shape = "U8", (shape[0], shape[1] // block.columns * block.size)
    return Entry(name, name, dtype, shape)


def table_metadata(dtype: str) -> dict[str, str]:
    """Return the metadata that say of which type the blocks of a table are; none where it is not in blocks."""
    block = BY_NAME.get(dtype)
    return {} if block is None or block.is_plain else {TABLE_KEY: dtype}


def vector_entry(name: str, whole: tuple[int, ...], ranges: Ranges, zeros: bool = False) -> Entry:
    """Return a part of a vector, or of all experts' vectors, as float32."""
    return Entry(name, name, "F32", tuple(stop - start for start, stop in ranges), whole, ranges, zeros=zeros)


def read_piece(source: WeightSource, entry: Entry, piece: Piece) -> np.ndarray:
    """Return the bytes of one of an entry's pieces, (size,) uint8, read from the source."""
    if not entry.origin:
        return np.zeros(piece.size, np.uint8)
    tensor = source[entry.origin]
    if entry.is_tiles:
        return load_matrix(tensor, entry.whole, _of_piece(entry, piece), entry.required_format).tiles.reshape(-1)
    if entry.format is not None:
        return _row_scales(tensor, entry).view(np.uint8).reshape(-1)
    if entry.ranges:
        values = load_vector(tensor, entry.whole, entry.ranges)
        return (np.zeros_like(values) if entry.zeros else values).view(np.uint8).reshape(-1)
    data = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)
    return data[piece.start : piece.start + piece.size]


def _of_piece(entry: Entry, piece: Piece) -> Ranges:
    experts = ((piece.expert, piece.expert + 1),) if len(entry.whole) == 3 else ()
    return (*experts, piece.rows, entry.ranges[-1])


def _row_scales(tensor: Tensor, entry: Entry) -> np.ndarray:
    """Return the row scales of a part of a matrix, (rows to 16s,) float32; a few columns tell them."""
    ranges = (*entry.ranges[:-1], (0, min(BLOCK, entry.whole[-1])))
    return load_matrix(tensor, entry.whole, ranges, entry.required_format).row_scales


def model_name(folder: Path) -> str:
    """Return the name of a model directory, for people: ORG/NAME of one in the folders of the hub's tools."""
    path = folder.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return path.name
