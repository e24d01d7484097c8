"""Random weights in place of a model's files: to measure the speed of a shape that is not on the disk.

Matrices are real memory of the right size, each rank's slice of them alone. Their tiles are copies of a few thousand
that were quantised from normally distributed values, laid out by where a tile lies in the whole matrix; so a weight
is the same at any number of ranks, whose outputs agree as they would with a model's files.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..kernels.layout import BLOCK, ROWS, TileFormat, aligned_empty
from ..kernels.quantize import NO_SCALES, pack_tiles, update_row_scales
from .source import Range, Tensor
from .tiles import empty_matrix

_POOL = 2039  # tiles that others are copies of: a prime, so that steps of any length reach all of them
_STD = 0.02  # of the weights, as models are initialised: activations stay near 1 through any number of layers
_SEED = 20
_LEVELS = {"A_log": 0.0, "dt_bias": -2.0, "sinks": 0.0}  # of vectors that are no norms; else _STD


class TilePool:
    """A few thousand random tiles of each format, made when first asked for."""

    def __init__(self) -> None:
        self._tiles: dict[str, np.ndarray] = {}
        self.row_scales: dict[str, np.float32] = {}  # of formats that have them: the same for all rows

    def __call__(self, fmt: TileFormat) -> np.ndarray:
        """Return tiles (_POOL, tile_bytes) uint8 of a format."""
        if fmt.name not in self._tiles:
            rng = np.random.default_rng(_SEED)
            values = rng.standard_normal((_POOL * ROWS, BLOCK), np.float32) * np.float32(_STD)
            scales = NO_SCALES
            if fmt.has_row_scales:
                scales = np.zeros(len(values), np.float32)
                update_row_scales(fmt, values, scales)
                self.row_scales[fmt.name] = scales.max()
                scales[:] = scales.max()
            tiles = aligned_empty(fmt.shape(*values.shape))
            pack_tiles(fmt, values, tiles, scales)
            self._tiles[fmt.name] = tiles[:, 0]
        return self._tiles[fmt.name]


@dataclass(frozen=True)
class RandomTensor(Tensor):
    """A tensor whose tiles come out of a pool; `data` has its shape, and values where they are looked up."""

    pool: TilePool = field(default_factory=TilePool, kw_only=True)

    def make_tiles(self, ranges: tuple[Range, ...], fmt: TileFormat) -> tuple[np.ndarray, np.ndarray]:
        """Return tiles of rows and columns, which should begin at whole tiles."""
        matrix = empty_matrix(fmt, tuple(stop - start for start, stop in ranges))
        down, across, _ = fmt.shape(*self.data.shape[-2:])
        experts = range(*ranges[0]) if self.data.ndim == 3 else range(1)
        along = np.arange(matrix.tiles.shape[2]) + ranges[-1][0] // BLOCK
        start, pool = zlib.crc32(self.name.encode()), self.pool(fmt)
        for expert, tiles in zip(experts, matrix.tiles, strict=True):
            rows = np.arange(tiles.shape[0]) + ranges[-2][0] // ROWS + down * expert
            for out, row in zip(tiles, rows, strict=True):
                np.take(pool, (start + row * across + along) % _POOL, axis=0, out=out, mode="wrap")
        matrix.row_scales[:] = self.pool.row_scales.get(fmt.name, np.float32(1))
        return matrix.tiles, matrix.row_scales


class RandomSource:
    """Stands in for the files of a model, as a `WeightSource`. Nothing is read."""

    is_whole = True

    def __init__(self, name: str, shapes: Mapping[str, tuple[int, ...]], table: str) -> None:
        """Take the shapes of all tensors, and which of them is the embedding table."""
        self.folder, self._shapes, self._table = Path(name), dict(shapes), table
        self.formats: Mapping[str, TileFormat] = {}
        self._pool = TilePool()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor: norms are 1, biases 0.02, rows of the table windows of one random sequence."""
        shape = self._shapes[name]
        value = 1.0 if name.endswith("norm.weight") else _LEVELS.get(name.split(".")[-1], _STD)
        data = np.broadcast_to(np.float32(value), shape)
        if name == self._table:
            rng = np.random.default_rng(_SEED)
            values = rng.standard_normal(shape[0] + shape[1] - 1, np.float32) * np.float32(_STD)
            data = np.lib.stride_tricks.sliding_window_view(values, shape[1])
        return RandomTensor(name, "F32", data, pool=self._pool)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return nothing: it was made from the table of tensors."""
        return []

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return a digest of names and shapes."""
        return hashlib.sha256(repr(self._shapes).encode()).hexdigest()

    def let_go(self) -> None:
        """Do nothing: nothing was read from a file."""
