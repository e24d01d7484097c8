"""All-reduce of activations: what a model's layers and the group use.

The algorithms and their costs stand in `table`, their compiled code in `algorithms`; what layers call in `exchange`.
All are bit-identical on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...kernels.layout import BLOCK, ceil_div
from .choose import choose
from .exchange import all_reduce
from .link import EXACT, TERMS
from .overlap import LEAST_ROWS, make_overlap
from .table import ALGORITHMS, MPI
from .transport import Transport


class AllReduce:
    """Sums activations of up to `rows` tokens x `width` float32 values over all ranks. Making one is collective.

    Attributes:
        values: (2, rows, width) float32, where the terms of a sum are written; width a multiple of 32. The exchanges
            of a part alternate between the two halves, from one step to the next as well, each among its part's rows.
            That is enough: in shared memory others read a half where it was written, and a rank begins an exchange
            only after it has read the result of the one before. So when an exchange has ended, which takes every rank
            to have begun it, nobody reads what the one before brought, and the one after may write there. A layer may
            have any number of exchanges, of any sizes.
        payload: what messages carry. choices: algorithms by size, in ascending order. transport: what it works with.
    """

    def __init__(self, comm: Any, hosts: list[str], rows: int, width: int, payload: str | None, sync: str) -> None:
        """Make buffers and choose algorithms; payload None: the one that suits the algorithm.

        Raises:
            UsageError: the algorithm does not suit these hosts or this payload; the same on every rank.
        """
        self.payload = payload or ("f32" if sync == MPI.name else "q80")
        self.transport = Transport(comm, hosts, rows, width, self.payload)
        self.values = self.transport.buffers.values
        if sync != "auto":
            ALGORITHMS[sync].check(self.transport.setting)
        self.choices = choose(self.transport, sync)
        self._overlap = make_overlap(self.transport, self.choices)
        self.take_counts()  # what measuring cost

    @property
    def link(self) -> np.record:
        """What compiled code takes, see `link`."""
        return self.transport.link

    def parts(self, tokens: int) -> np.ndarray:
        """Return the bounds (parts + 1,) int64 of the parts that a step of so many tokens is computed in."""
        if self._overlap is None or tokens < LEAST_ROWS:
            return np.array([0, tokens], np.int64)
        return np.array([0, tokens // 2, tokens], np.int64)

    @contextlib.contextmanager
    def exchanging(self, parts: np.ndarray) -> Iterator[None]:
        """Have the other thread carry out the exchanges within a block if there is more than one part."""
        self.transport.buffers.rests[: parts[-1]] = 0
        if self._overlap is None or len(parts) == 2:
            yield
            return
        with self._overlap.working():
            yield

    def __call__(self, array: np.ndarray, exact: bool = False) -> None:
        """Replace a contiguous float32 array of up to rows * width values by its sum over ranks.

        exact: send float32 whatever the payload is; then up to rows * 32 values.
        """
        count, blocks = array.size, ceil_div(array.size, BLOCK)
        flat, total = self.values[0].reshape(-1)[: blocks * BLOCK], np.empty(blocks * BLOCK, np.float32)
        self.transport.buffers.rests[:] = 0
        self.transport.comm.Barrier()  # others may still be reading what stands in shared memory
        flat[:count], flat[count:] = array.reshape(-1), 0
        all_reduce(self.link, flat.ctypes.data, blocks, EXACT if exact else TERMS, total.ctypes.data)
        array.reshape(-1)[:] = total[:count]

    def take_counts(self) -> tuple[float, int, int]:
        """Return the seconds waited and bytes sent and received since the last call."""
        return self.transport.take_counts()
