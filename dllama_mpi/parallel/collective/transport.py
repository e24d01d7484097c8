"""What one rank exchanges with: a communicator, buffers, a link and the fallback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...kernels.layout import BLOCK
from .calls import fill_calls, mpi_functions
from .exchange import layer_calls, time_exchange
from .fallback import Fallback
from .link import SIZES
from .memory import Buffers
from .table import ALGORITHMS, SHARED, Algorithm, Setting, block_bytes

_ANY = 1 << 60  # more blocks than a message has


class Transport:
    """Ready for exchanges of up to `rows` rows x `width` values, a multiple of 32. Making one is collective.

    Attributes:
        comm: a communicator of its own. buffers: memory. link: what compiled code takes. setting: who sums.
        rows: most rows of a message. row_blocks: blocks of 32 values in a row.
    """

    def __init__(self, comm: Any, hosts: list[str], rows: int, width: int, payload: str) -> None:
        from mpi4py import MPI

        self.comm = comm.Dup()
        # What compiled code calls returns no errors; a broken connection is to end the job.
        self.comm.Set_errhandler(MPI.ERRORS_ARE_FATAL)
        functions = mpi_functions()
        is_compiled = all(comm.allgather(functions is not None))  # by all ranks or by none
        self.rows, self.row_blocks = rows, width // BLOCK
        self.buffers = Buffers(self.comm, hosts, (rows, width), payload, is_compiled)
        self.link: np.record = self.buffers.links[0]
        fill_calls(self.link, self.comm, functions if is_compiled else None)
        self.link.start, self.link.finish = (function.address for function in layer_calls())
        self.setting = Setting(comm.size, self.buffers.hosts, is_compiled, payload)
        self._fallback = Fallback(self.comm, self.link)

    def use(self, by_size: Sequence[tuple[int, Algorithm]]) -> None:
        """Take for messages of up to so many rows, ascending, an algorithm; the last also for more. All ranks alike."""
        rows = [row * self.row_blocks for row, _ in by_size[:-1]]
        numbers = [self._number(algorithm) for _, algorithm in by_size]
        missing = SIZES - len(by_size)
        self.link.most_blocks[:] = rows + [_ANY] * (missing + 1)
        self.link.algorithms[:] = numbers + numbers[-1:] * missing

    def _number(self, algorithm: Algorithm) -> int:
        """Return an algorithm's number; two levels of which the upper is one host are shared memory alone."""
        return SHARED.number if algorithm.has_levels and self.setting.hosts == 1 else algorithm.number

    def message_bytes(self, rows: int, algorithm: Algorithm) -> int:
        """Return the bytes of one payload of so many rows."""
        is_float = algorithm.needs_f32 or algorithm.needs_one_host
        return rows * self.row_blocks * block_bytes("f32" if is_float else self.setting.payload, rows)

    def measure(self, name: str, rows: int, times: int) -> float:
        """Return this rank's median microseconds of an exchange of so many rows by an algorithm, of so many times.

        Collective. Leaves that algorithm in use.
        """
        self.use([(rows, ALGORITHMS[name])])
        self.buffers.values[0, :rows] = 0
        return float(np.median(self.nanoseconds(rows, times + 1)[1:])) / 1e3

    def nanoseconds(self, rows: int, times: int, payload: np.ndarray | None = None, encodings: int = 0) -> np.ndarray:
        """Return the nanoseconds (times,) of exchanges of so many rows, each with computing.

        Collective. What is computed: so many encodings to a float32 payload.
        """
        taken = np.zeros(times, np.int64)
        self.comm.Barrier()
        target = 0 if payload is None else payload.ctypes.data
        time_exchange(self.link, self.buffers.values.ctypes.data, rows * self.row_blocks, target, encodings, taken)
        return taken

    def take_counts(self) -> tuple[float, int, int]:
        """Return the seconds waited and bytes sent and received since the last call."""
        link = self.link
        counts = link.waited / 1e9, int(link.sent), int(link.received)
        link.waited = link.sent = link.received = 0
        return counts
