"""All-reduce of activations, sent as float32, float16 or Q80 blocks and summed in rank order on every rank.

Two algorithms, both bit-identical on every rank and exact in the bytes they move (P: bytes of one payload, N: ranks):

direct            every rank sends its payload to every other: one hop, (N - 1) * P bytes each way;
reduce-scatter    every rank sums one part of the vector and sends the sum to all: two hops,
+ all-gather      2 * (N - 1) / N * P bytes each way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.layout import BLOCK, ceil_div
from ..kernels.quantize import decode_sum, encode
from .partition import cut

# Bytes that 32 values take on the wire: a Q80 block is an fp16 scale and 32 int8 codes.
PAYLOADS = {"f32": 128, "f16": 64, "q80": 34}
_DIRECT_BYTES = 8192  # below about this a second hop costs more than the bytes it saves


class AllReduce:
    """Sums float32 vectors over the ranks of `comm`, with buffers for `largest` values."""

    def __init__(self, comm: Any, largest: int, payload: str) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.width = PAYLOADS[payload]
        blocks = ceil_div(largest, BLOCK)
        self._values = np.zeros((blocks, BLOCK), np.float32)
        self._mine = np.zeros((blocks, self.width), np.uint8)
        self._theirs = np.zeros(0, np.uint8)

    def __call__(self, x: np.ndarray) -> int:
        """Replace x, contiguous float32, by its sum over ranks; return the bytes sent (as many were received)."""
        count = x.size
        blocks = ceil_div(count, BLOCK)
        whole = count % BLOCK == 0
        values = x.reshape(blocks, BLOCK) if whole else self._values[:blocks]
        if not whole:
            values.reshape(-1)[:count] = x.reshape(-1)
            values.reshape(-1)[count:] = 0
        mine = self._mine[:blocks]
        encode(values, mine)
        if self.size == 2 or mine.size * (self.size - 1) <= _DIRECT_BYTES or blocks < self.size:
            moved = self._direct(mine, values)
        else:
            moved = self._reduce_scatter(mine, values)
        if not whole:
            x.reshape(-1)[:] = values.reshape(-1)[:count]
        return moved

    def _room(self, size: int) -> np.ndarray:
        if self._theirs.size < size:
            self._theirs = np.zeros(size, np.uint8)
        return self._theirs[:size]

    def _direct(self, mine: np.ndarray, values: np.ndarray) -> int:
        theirs = self._room(self.size * mine.size)
        self.comm.Allgather(mine, theirs)
        decode_sum(theirs.reshape(self.size, *mine.shape), values)
        return int((self.size - 1) * mine.size)

    def _reduce_scatter(self, mine: np.ndarray, values: np.ndarray) -> int:
        parts = cut(len(mine), [1.0] * self.size)
        first, last = parts[self.rank]
        counts = [(stop - start) * self.width for start, stop in parts]
        starts = [start * self.width for start, _ in parts]
        own = counts[self.rank]
        theirs = self._room(max(self.size * own, mine.size))
        pieces = theirs[: self.size * own]
        self.comm.Alltoallv(
            [mine, (counts, starts)], [pieces, ([own] * self.size, [own * r for r in range(self.size)])]
        )
        decode_sum(pieces.reshape(self.size, last - first, self.width), values[first:last])
        encode(values[first:last], mine[first:last])
        gathered = theirs[: mine.size]
        self.comm.Allgatherv(mine[first:last], [gathered, (counts, starts)])
        decode_sum(gathered.reshape(1, *mine.shape), values)
        return int(mine.size - own + own * (self.size - 1))
