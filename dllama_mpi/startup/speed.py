"""How fast this rank's kernels go through its memory, measured at start-up to share the model out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..kernels.layout import BLOCK, FORMATS, ROWS, TileFormat, aligned_empty, ceil_div
from ..kernels.matrix import ADDRESS, EXPERT_STRIDE, Matrix, activations
from ..model.config import ModelConfig
from ..model.linear import multiply
from ..model.recipe import weight_bytes
from ..parallel.group import TensorParallelGroup
from ..parallel.partition import Shard
from ..weights.random import RandomTensor
from ..weights.tiles import TileMatrix
from .memory import available_bytes

WINDOW_SECONDS, WINDOWS = 0.12, 5  # longer than the 0.1 s in which a limit on processor time is commonly dealt out
_CACHES = 4  # times the last cache that is read
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 1 << 28
_MATRIX_BYTES = 16 << 20  # of the matrices that take turns


def last_cache_bytes() -> int:
    """Return the size of the processor's largest cache, as the system tells it; 0 if it does not."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
            largest = max(largest, int(text.rstrip("KM")) * unit)
        except (OSError, ValueError):  # not told on this system
            continue
    return largest


def sample_bytes(ranks_here: int) -> int:
    """Return how many bytes of weights tell a rank's speed: more than the caches, less than the memory."""
    wanted = min(max(_CACHES * last_cache_bytes(), _LEAST_BYTES), _MOST_BYTES)
    return min(wanted, available_bytes() // 8 // ranks_here)


def window_seconds(group: TensorParallelGroup, call: Callable[[int], float]) -> float:
    """Return the seconds of one turn of call(turns), which returns what so many turns took. Collective.

    All ranks measure at the same time, in windows long enough for a processor that is lent out in slices; the median
    window counts.
    """
    first = max(group.allgather(call(1)))
    turns = max(1, int(np.ceil(WINDOW_SECONDS / max(first, 1e-6))))
    samples = []
    for _ in range(WINDOWS if turns > 1 else 3):
        group.allgather(None)  # begin together
        samples.append(call(turns) / turns)
    return statistics.median(samples)


class MatrixVector:
    """Matrices of the model's width that take turns being multiplied with one token.

    Attributes:
        size: bytes of them all.
    """

    def __init__(self, hidden: int, fmt: TileFormat, size: int, threads: int) -> None:
        blocks = ceil_div(hidden, BLOCK)
        row = blocks * fmt.tile_bytes  # bytes of a row of tiles
        self._count = max(1, round(size / _MATRIX_BYTES))
        rows = max(threads, size // row // self._count)
        self.size, self._threads = self._count * rows * row, threads
        tensor = RandomTensor(
            "sample", "F32", np.broadcast_to(np.float32(0), (self._count, rows * ROWS, blocks * BLOCK))
        )
        ranges = ((0, self._count), (0, rows * ROWS), (0, blocks * BLOCK))
        tiles, scales = tensor.make_tiles(ranges, fmt)
        self._matrix = TileMatrix(tiles, scales, rows * ROWS, blocks * BLOCK, fmt)
        fields = np.repeat(self._matrix.fields()[None], self._count, 0)
        fields[:, ADDRESS] += np.arange(self._count) * fields[:, EXPERT_STRIDE]
        self._kernel = Matrix(fields)
        self._x = activations(1, hidden, fmt.quantised_activations)
        self._out = aligned_empty((1, rows * ROWS), np.float32)

    def seconds(self, turns: int) -> float:
        """Go through all matrices so many times; return how long it took."""
        started = time.perf_counter()
        for _ in range(turns):
            for i in range(self._count):
                multiply(self._kernel, i, self._x, self._out, 1, self._threads)
        return time.perf_counter() - started


def decode_rates(
    config: ModelConfig, shard: Shard, formats: Mapping[str, TileFormat], group: TensorParallelGroup, threads: int
) -> list[float]:
    """Return the bytes of weights a second that each rank multiplies with one token, all at once. Collective.

    shard: this rank's of equal shares; a model that fits into the caches is measured in them.
    """
    names = [fmt.name for fmt in formats.values()]
    most = FORMATS[max(sorted(set(names)), key=names.count)]
    size = min(sample_bytes(len(group.local_ranks)), weight_bytes(config, shard, formats))
    sample = MatrixVector(config.hidden_size, most, size, threads)
    return group.allgather(sample.size / window_seconds(group, sample.seconds))
