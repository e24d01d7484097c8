"""What lies where in a safetensors file that this program writes, and the bytes of it, piece by piece.

Whole matrices or a rank's rows and columns of them: both are entries that say which part of which tensor they hold.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..kernels.layout import ROWS, TileFormat, ceil_div
from .checkpoint import Checkpoint
from .tiles import load_matrix

Range = tuple[int, int]
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PIECE_BYTES = 16 << 20  # float32 rows, or bytes of another tensor, that are handled at once
ALIGNMENT = 64  # of tiles in a file: one AVX-512 register, one cache line
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}


@dataclass(frozen=True)
class Part:
    """A part of a tensor: the whole's shape, and along each axis where the part begins and ends."""

    shape: tuple[int, ...]
    ranges: tuple[Range, ...]

    @classmethod
    def whole(cls, *shape: int) -> Part:
        """Return all of a tensor."""
        return cls(shape, tuple((0, size) for size in shape))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The part's own shape."""
        return tuple(stop - start for start, stop in self.ranges)

    def __str__(self) -> str:
        return " x ".join(f"{start}..{stop}" for start, stop in self.ranges)


@dataclass(frozen=True)
class Piece:
    """What is read and written at once of an entry: `rows` of a matrix of tiles, or bytes of anything else.

    Attributes:
        start: the first of its bytes in the entry. size: bytes.
    """

    rows: Range
    start: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A tensor of a new file.

    Attributes:
        origin: its name in the source; "" for zeros.
        dtype, shape: as in the file.
        part: of a matrix that becomes tiles, or of a vector; None: the bytes of the whole tensor.
        unit: pieces are of whole units of so many bytes, if not 0.
    """

    name: str
    origin: str
    dtype: str
    shape: tuple[int, ...]
    part: Part | None = None
    unit: int = 0

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def is_tiles(self) -> bool:
        """Whether it is a matrix of tiles."""
        return self.part is not None and len(self.part.shape) == 2

    def pieces(self, limit: int) -> list[Piece]:
        """Return the pieces of about `limit` bytes, as float32 for a matrix, in order."""
        if self.part is None or not self.is_tiles:
            step = max(1, limit // self.unit) * self.unit if self.unit else limit
            ends = [(start, min(start + step, self.size)) for start in range(0, self.size, step)]
            return [Piece(each, each[0], each[1] - each[0]) for each in ends]
        if not self.size:
            return []
        (first, last), width = self.part.ranges[0], self.size // self.shape[0]
        step = max(1, limit // (4 * self.part.sizes[1]) // ROWS) * ROWS
        rows = [(start, min(start + step, last)) for start in range(first, last, step)]
        return [Piece((a, b), (a - first) // ROWS * width, ceil_div(b - a, ROWS) * width) for a, b in rows]


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
            yield Entry(f"padding.{count}", "", "U8", (-end % ALIGNMENT,))
            end += -end % ALIGNMENT
            count += 1
        yield entry
        end += entry.size
        count += 1


def read_piece(source: Checkpoint, fmt: TileFormat, entry: Entry, piece: Piece) -> np.ndarray:
    """Return the bytes of one of an entry's pieces, (size,) uint8, read from the source."""
    if not entry.origin:
        return np.zeros(piece.size, np.uint8)
    if entry.part is not None and entry.is_tiles:
        shape, cols = (entry.part.shape[0], entry.part.shape[1]), entry.part.ranges[1]
        return load_matrix(source, entry.origin, shape, piece.rows, cols, fmt).tiles.reshape(-1)
    data = source[entry.origin].data
    if entry.part is not None:
        data = data[slice(*entry.part.ranges[0])]
    return data.reshape(-1).view(np.uint8)[piece.start : piece.start + piece.size]
