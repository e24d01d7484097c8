"""Random weights in place of a model's files: to measure the speed of a shape that is not on the disk.

Matrices are real memory of the right size, each rank's slice of them alone. Their tiles are copies of a few thousand
that were quantised from normally distributed values, laid out by where a tile lies in the whole matrix; so a weight
is the same at any number of ranks, whose outputs agree as they would with a model's files.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..kernels.layout import BLOCK, ROWS, TileFormat
from ..kernels.quantize import pack_tiles
from .checkpoint import Checkpoint, Tensor
from .tiles import aligned_empty

_POOL = 2039  # tiles that others are copies of: a prime, so that steps of any length reach all of them
_STD = 0.02  # of the weights, as models are initialised: activations stay near 1 through any number of layers
_SEED = 20
_TABLE = "model.embed_tokens.weight"


class TilePool:
    """A few thousand random tiles of each format, made when first asked for."""

    def __init__(self) -> None:
        self._tiles: dict[str, np.ndarray] = {}

    def __call__(self, fmt: TileFormat) -> np.ndarray:
        """Return tiles (_POOL, tile_bytes) uint8 of a format."""
        if fmt.name not in self._tiles:
            rng = np.random.default_rng(_SEED)
            values = rng.standard_normal((_POOL * ROWS, BLOCK), np.float32) * np.float32(_STD)
            tiles = aligned_empty(fmt.shape(*values.shape))
            pack_tiles(values, tiles)
            self._tiles[fmt.name] = tiles[:, 0]
        return self._tiles[fmt.name]


@dataclass(frozen=True)
class RandomTensor(Tensor):
    """A tensor whose tiles come out of a pool; `data` has its shape, and values where they are looked up."""

    pool: TilePool = field(default_factory=TilePool)

    def make_tiles(self, rows: tuple[int, int], cols: tuple[int, int], fmt: TileFormat) -> np.ndarray:
        """Return tiles of rows and columns, which should begin at whole tiles."""
        tiles = aligned_empty(fmt.shape(rows[1] - rows[0], cols[1] - cols[0]))
        across = fmt.shape(*self.data.shape)[1]
        down = np.arange(tiles.shape[0]) + rows[0] // ROWS
        along = np.arange(tiles.shape[1]) + cols[0] // BLOCK
        start = zlib.crc32(self.name.encode())
        for out, row in zip(tiles, down, strict=True):
            np.take(self.pool(fmt), (start + row * across + along) % _POOL, axis=0, out=out, mode="wrap")
        return tiles


class RandomCheckpoint(Checkpoint):
    """Stands in for the files of a model. Nothing is read; no converted format is held."""

    def __init__(
        self, name: str, matrices: Mapping[str, tuple[int, int]], vectors: Mapping[str, int], table: tuple[int, int]
    ) -> None:
        """Take the (rows, cols) of matrices, the sizes of vectors, and the embedding table's shape."""
        self.folder = Path(name)
        self.format_name = None
        self.metadata = {}
        self._pool = TilePool()
        self._shapes: dict[str, tuple[int, ...]] = {**matrices, **{n: (size,) for n, size in vectors.items()}}
        self._shapes[_TABLE] = table

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor: norms are 1, biases 0.02, rows of the table windows of one random sequence."""
        shape = self._shapes[name]
        value = 1.0 if name.endswith("norm.weight") else _STD
        data = np.broadcast_to(np.float32(value), shape)
        if name == _TABLE:
            rng = np.random.default_rng(_SEED)
            values = rng.standard_normal(shape[0] + shape[1] - 1, np.float32) * np.float32(_STD)
            data = np.lib.stride_tricks.sliding_window_view(values, shape[1])
        return RandomTensor(name, "F32", data, self._pool)

    def release(self, name: str) -> None:
        """Do nothing: nothing was read from a file."""

    def fingerprint(self) -> str:
        """Return a digest of names and shapes."""
        return hashlib.sha256(repr(self._shapes).encode()).hexdigest()
