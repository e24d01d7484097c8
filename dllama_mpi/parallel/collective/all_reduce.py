"""All-reduce of activations: buffers, the algorithms to choose from, and the choice by measurement.

The algorithms stand in `kernels.exchange` and call MPI from compiled code. With P bytes of one payload and N ranks, or
hosts, a rank sends and receives:

shared      nothing: the ranks of one host read each other's values in shared memory, as float32;
direct      (N - 1) * P, one hop;
scatter     2 * (N - 1) / N * P, two hops: reduce-scatter, then all-gather;
doubling    log2(N) * P, as many hops: recursive doubling (N not a power of two: some ranks 3 * P in all, or P more);
two-level   shared memory within hosts, and direct or scatter between them, by one rank of each;
mpi         the library's own Allreduce, through mpi4py, in float32.

All are bit-identical on every rank. Where compiled code cannot call MPI, direct and scatter go through mpi4py, one or
the other by size ("mpi4py").
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UsageError
from ...kernels.layout import BLOCK, ceil_div, ceil_to
from ..partition import cut
from . import algorithms as x
from . import link as at
from .calls import c_functions, can_use_threads, handle, mpi_functions, sizes
from .memory import share
from .overlap import Overlap
from .payload import PAYLOADS, decode_sum, encode

__all__ = ["PAYLOADS", "SYNCS", "AllReduce", "Choice"]

_WAYS = {
    "shared": x.SHARED,
    "direct": x.DIRECT,
    "scatter": x.SCATTER,
    "doubling": x.DOUBLING,
    "two-level": x.TWO_LEVEL,
    "mpi": x.CALL,
}
SYNCS = ("auto", *_WAYS)
_MEASURED_ROWS = {1: 9, 8: 5, 64: 3}  # tokens of a message: how often each algorithm is timed
_OVERLAP_ROWS = 64  # a step of fewer tokens is not cut into parts
_OVERLAP_MICROSECONDS = 200  # nor one whose exchanges take less
_OVERLAP_SHARE = 0.9  # of the time one after the other that an overlap may take; 0.5 would be perfect
_DIRECT_BYTES = 8192  # through mpi4py: below about this a second hop costs more than the bytes it saves


@dataclass(frozen=True)
class Choice:
    """The algorithm for messages of up to so many tokens.

    Attributes:
        tokens: most tokens; the last choice is for any number. bytes: of their payload. way: the algorithm.
        microseconds: what each algorithm that was tried took, the slowest rank's median; empty if none was.
    """

    tokens: int
    bytes: int
    way: str
    microseconds: dict[str, float]

    def describe(self) -> str:
        """Return the choice as a line for people."""
        took = {name: f"{value:.0f}" if value >= 10 else f"{value:.1f}" for name, value in self.microseconds.items()}
        best = took.pop(self.way)
        tried = f" ({', '.join(f'{name} {value}' for name, value in took.items())})" if took else ""
        what = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"all-reduce of {what} ({self.bytes / 1e3:.1f} kB): {self.way}, {best} us{tried}"

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as JSON-ready values."""
        return dataclasses.asdict(self)


class AllReduce:
    """Sums activations of up to `rows` tokens x `width` float32 values over all ranks. Making one is collective.

    Attributes:
        values: (2, rows, width) float32, where the terms of a sum are to be written; width a multiple of 32.
        link: what compiled code takes, see `kernels.exchange`. choices: algorithms by size, in ascending order.
    """

    def __init__(self, comm: Any, hosts: list[str], rows: int, width: int, payload: str | None, sync: str) -> None:
        """Make buffers and choose algorithms; payload None: the one that suits the algorithm.

        Raises:
            UsageError: the algorithm does not suit these hosts or this payload; the same on every rank.
        """
        from mpi4py import MPI

        self.comm = comm.Dup()
        # What compiled code calls returns no errors; a broken connection is to end the job.
        self.comm.Set_errhandler(MPI.ERRORS_ARE_FATAL)
        self.rank, self.size, self.rows, self.width = comm.rank, comm.size, rows, width
        self.payload = payload or ("f32" if sync == "mpi" else "q80")
        self.row_blocks = width // BLOCK
        self.link = np.zeros(at.FIELDS, np.int64)
        self._keep: list[Any] = []  # memory that the link points to
        functions = mpi_functions()
        self.compiled = all(comm.allgather(functions is not None))  # by all ranks or by none
        if functions is not None and self.compiled:
            self._fill_calls(functions)
        self._fill_memory(hosts)
        self.link[at.START], self.link[at.FINISH] = (function.address for function in x.layer_calls())
        self._check(sync)
        self.choices = self._choose(sync)
        self._fill_ways()
        self._overlap = self._make_overlap()
        self.take_counts()  # what measuring cost

    # ---- setting up

    def _array(self, size: int, dtype: type = np.uint8) -> np.ndarray:
        """Return zeros that live as long as this object, on a cache line."""
        raw = np.zeros(size * np.dtype(dtype).itemsize + 64, np.uint8)
        start = -raw.ctypes.data % 64
        array: np.ndarray = raw[start : start + size * np.dtype(dtype).itemsize].view(dtype)
        self._keep.append(array)
        return array

    def _fill_calls(self, functions: dict[str, int]) -> None:
        from mpi4py import MPI

        link = self.link
        link[at.ISEND], link[at.IRECV], link[at.TESTALL] = functions.values()
        link[at.COMMUNICATOR], link[at.BYTE] = handle(self.comm), handle(MPI.BYTE)
        link[at.REQUEST_BYTES], status_bytes = sizes()
        link[at.REQUESTS] = self._array(2 * self.size * int(link[at.REQUEST_BYTES])).ctypes.data
        link[at.STATUSES] = self._array(2 * self.size * status_bytes).ctypes.data

    def _fill_memory(self, hosts: list[str]) -> None:
        link, size = self.link, self.size
        link[at.RANK], link[at.SIZE], link[at.WIDTH] = self.rank, size, PAYLOADS[self.payload]
        c = c_functions()
        link[at.YIELD], link[at.SLEEP], link[at.CLOCK] = c["sched_yield"], c["usleep"], c["clock_gettime"]
        link[at.CLOCK_KIND], link[at.SCRATCH] = c["clock"], self._array(8, np.int64).ctypes.data
        blocks, message = self.rows * self.row_blocks, self.rows * self.row_blocks * PAYLOADS[self.payload]
        link[at.VALUES], link[at.MINE] = (
            self._array(blocks * BLOCK, np.float32).ctypes.data,
            self._array(message).ctypes.data,
        )
        link[at.THEIRS_STRIDE] = ceil_to((max(size, 2) + 1) * message, 64)
        # Ranks that share memory count as one host, all others as a host each.
        slot, local = 8 * blocks * BLOCK, hosts.count(hosts[self.rank])
        several = len(set(hosts)) > 1
        flags = at.PARTS * (local + 1) * 64
        theirs = at.PARTS * int(link[at.THEIRS_STRIDE]) if several else 0
        memory = share(self.comm, hosts, flags + local * slot + theirs) if self.compiled else None
        alone = self.comm.allgather(memory is None)
        homes = [f"{host}#{rank}" if alone[rank] else host for rank, host in enumerate(hosts)]
        leaders = sorted({homes.index(home) for home in homes})
        mates = [rank for rank, home in enumerate(homes) if home == homes[self.rank]]
        self.hosts, self.is_shared = len(leaders), len(mates) > 1
        ranks = self._array(self.hosts + size, np.int64)
        ranks[:] = [*leaders, *range(size)]
        link[at.LEADERS], link[at.HOSTS] = ranks.ctypes.data, self.hosts
        link[at.LEADER], link[at.LOCAL], link[at.LOCALS] = leaders.index(mates[0]), mates.index(self.rank), len(mates)
        link[at.SLOT_BYTES] = slot
        if memory is None:
            own = self._array(slot)
            theirs_memory = self._array(at.PARTS * int(link[at.THEIRS_STRIDE]))
            link[at.FLAGS] = self._array(at.PARTS * 2 * 64).ctypes.data
            link[at.SLOTS] = own.ctypes.data
            link[at.THEIRS] = link[at.SHARED_THEIRS] = theirs_memory.ctypes.data
        else:
            self._keep.append(memory)
            link[at.FLAGS] = memory.ctypes.data
            link[at.SLOTS] = memory.ctypes.data + flags
            own = memory[flags + int(link[at.LOCAL]) * slot :][:slot]
            link[at.SHARED_THEIRS] = memory.ctypes.data + flags + local * slot
            link[at.THEIRS] = self._array(at.PARTS * int(link[at.THEIRS_STRIDE])).ctypes.data
        self.values = own.view(np.float32).reshape(2, self.rows, self.width)

    def suits(self, name: str) -> bool:
        """Return whether an algorithm can be used with these hosts and this payload."""
        try:
            self._check(name)
        except UsageError:
            return False
        return True

    def _check(self, sync: str) -> None:
        """Raise if the named algorithm cannot be used here."""
        if sync == "mpi" and self.payload != "f32":
            raise UsageError(f"--sync mpi sends f32; --buffer-float-type is {self.payload}; leave it out or give f32")
        if sync in ("shared", "doubling", "two-level") and not self.compiled:
            raise UsageError(f"--sync {sync} needs MPI from compiled code, which cannot call this library; use direct")
        if sync == "shared" and self.hosts > 1:
            raise UsageError(
                f"--sync shared: the ranks do not share memory, they are in {self.hosts} places; use two-level or auto"
            )

    def candidates(self) -> list[str]:
        """Return the algorithms that could be the fastest here."""
        if not self.compiled:
            return ["mpi4py"]
        if self.hosts == 1:
            return ["shared"]
        found = ["direct"]
        if self.size > 2:
            found += ["scatter", "doubling"]
        if self.hosts < self.size:
            found.append("two-level")
        return found + (["mpi"] if self.payload == "f32" else [])

    def _choose(self, sync: str) -> list[Choice]:
        """Return the algorithm for each size: the named one, or the fastest of all that suit, by measurement."""
        names, choices = ([sync] if sync != "auto" else self.candidates()), []
        for rows, turns in _MEASURED_ROWS.items():
            rows = min(rows, self.rows)
            took = {name: self.measure(name, rows, turns) for name in names}
            medians = np.array([took[name] for name in names])
            slowest = np.max(self.comm.allgather(medians), axis=0)  # the same on every rank
            times = {name: float(t) for name, t in zip(names, slowest, strict=True)}
            best = min(times, key=lambda name: times[name])
            size = rows * self.row_blocks * PAYLOADS["f32" if best in ("mpi", "shared") else self.payload]
            choices.append(Choice(rows, size, best, times))
            if rows == self.rows:
                break
        return choices

    def measure(self, name: str, rows: int, turns: int) -> float:
        """Return this rank's median microseconds of an exchange of so many tokens by an algorithm, of so many turns.

        Collective. Leaves that algorithm in use.
        """
        self.use(name)
        times, blocks = np.zeros(turns + 1, np.int64), rows * self.row_blocks
        self.values[0, :rows] = 0
        self.comm.Barrier()
        x.time_exchange(self.link, self.values.ctypes.data, blocks, 0, 0, np.zeros(4, np.int64), times)
        return float(np.median(times[1:])) / 1e3

    def _fill_ways(self) -> None:
        pairs = [(c.tokens * self.row_blocks, self._way(c.way)) for c in self.choices]
        pairs[-1] = (1 << 60, pairs[-1][1])
        pairs += [pairs[-1]] * (at.WAY_PAIRS - len(pairs))
        self.link[at.WAYS : at.WAYS + 2 * at.WAY_PAIRS] = np.array(pairs, np.int64).ravel()

    def _way(self, name: str) -> int:
        if self.compiled and name != "mpi":
            return _WAYS["shared" if name == "two-level" and self.hosts == 1 else name]
        self._set_callback(name)
        return x.CALL

    def _make_overlap(self) -> Overlap | None:
        """Return the other thread, where exchanging a prompt takes long and computing can go on meanwhile."""
        last = self.choices[-1]
        slow = last.microseconds[last.way] >= _OVERLAP_MICROSECONDS
        compiled = all(choice.way not in ("mpi", "shared") for choice in self.choices) and self.compiled
        possible = last.tokens >= _OVERLAP_ROWS and compiled and slow and can_use_threads()
        if not all(self.comm.allgather(possible)):  # ranks may differ in what they can, not in what they do
            return None
        # Looking costs the computing thread some time, being late costs little as long as there is much to compute.
        patience = int(min(500, max(20, last.microseconds[last.way] / 10)))
        overlap = Overlap(self.link, self._array(2 + at.QUEUE * at.JOB_FIELDS, np.int64), patience)
        return overlap if self._overlap_share(overlap) <= _OVERLAP_SHARE else None

    def _overlap_share(self, overlap: Overlap) -> float:
        """Return how long computing and an exchange of equal length take at once, of what they take one by one.

        The slowest rank's. Where the network is driven by the same cores it may be as long.
        """
        last, times = self.choices[-1], np.zeros(5, np.int64)
        blocks, source = last.tokens * self.row_blocks, np.zeros(4, np.int64)
        values, payload = (
            self.values[0, : last.tokens].reshape(-1, BLOCK),
            np.empty((blocks, PAYLOADS["f32"]), np.uint8),
        )

        def seconds(turns: int) -> float:
            self.comm.Barrier()
            addresses = values.ctypes.data, blocks, payload.ctypes.data
            x.time_exchange(self.link, *addresses, turns, source, times)
            return float(np.median(times)) / 1e9

        encode(values, payload)
        begun = time.perf_counter()
        for _ in range(100):
            encode(values, payload)
        each = (time.perf_counter() - begun) / 100
        turns = max(1, round(seconds(0) / each))
        apart = seconds(turns)
        with overlap.working():
            together = seconds(turns)
        return float(max(self.comm.allgather(together / apart)))

    # ---- use

    def use(self, name: str) -> None:
        """Take one algorithm for every size. Every rank must do the same."""
        self.link[at.WAYS : at.WAYS + 2 * at.WAY_PAIRS : 2] = 1 << 60
        self.link[at.WAYS + 1 : at.WAYS + 2 * at.WAY_PAIRS : 2] = self._way(name)

    def parts(self, tokens: int) -> np.ndarray:
        """Return the bounds (parts + 1,) int64 of the parts that a step of so many tokens is computed in."""
        if self._overlap is None or tokens < _OVERLAP_ROWS:
            return np.array([0, tokens], np.int64)
        return np.array([0, tokens // 2, tokens], np.int64)

    @contextlib.contextmanager
    def exchanging(self, parts: np.ndarray) -> Iterator[None]:
        """Have the other thread carry out the exchanges within a block if there is more than one part."""
        if self._overlap is None or len(parts) == 2:
            yield
            return
        with self._overlap.working():
            yield

    def __call__(self, array: np.ndarray) -> None:
        """Replace a contiguous float32 array of up to rows * width values by its sum over ranks."""
        count, blocks = array.size, ceil_div(array.size, BLOCK)
        flat, total = self.values[0].reshape(-1)[: blocks * BLOCK], np.empty(blocks * BLOCK, np.float32)
        self.comm.Barrier()  # others may still be reading what stands in shared memory
        flat[:count], flat[count:] = array.reshape(-1), 0
        x.all_reduce(self.link, flat.ctypes.data, blocks, total.ctypes.data)
        array.reshape(-1)[:] = total[:count]

    def take_counts(self) -> tuple[float, int, int]:
        """Return the seconds waited and bytes sent and received since the last call."""
        link = self.link
        counts = link[at.WAITED] / 1e9, int(link[at.SENT]), int(link[at.RECEIVED])
        link[at.WAITED] = link[at.SENT] = link[at.RECEIVED] = 0
        return counts

    # ---- through mpi4py

    def _set_callback(self, name: str) -> None:
        operations = {"mpi": self._library, "direct": self._direct, "scatter": self._scatter, "mpi4py": self._either}
        operation = operations[name]

        def summed(address: int, blocks: int) -> int:
            try:
                values = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (blocks, BLOCK))
                operation(values)
            except BaseException:  # nothing may pass through compiled code
                traceback.print_exc()
                sys.stderr.flush()
                self.comm.Abort(1)
            return 0

        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64)(summed)
        self._keep.append(function)
        self.link[at.CALLBACK] = ctypes.cast(function, ctypes.c_void_p).value or 0

    def _library(self, values: np.ndarray) -> None:
        from mpi4py import MPI

        self.comm.Allreduce(MPI.IN_PLACE, values)
        self._count(2 * (self.size - 1) * values.nbytes // self.size)

    def _either(self, values: np.ndarray) -> None:
        size = len(values) * PAYLOADS[self.payload]
        few = self.size == 2 or size * (self.size - 1) <= _DIRECT_BYTES or len(values) < self.size
        (self._direct if few else self._scatter)(values)

    def _direct(self, values: np.ndarray) -> None:
        mine = self._encoded(values)
        theirs = np.empty((self.size, *mine.shape), np.uint8)
        self.comm.Allgather(mine, theirs)
        decode_sum(theirs, values)
        self._count((self.size - 1) * mine.size)

    def _scatter(self, values: np.ndarray) -> None:
        mine, width = self._encoded(values), PAYLOADS[self.payload]
        parts = cut(len(mine), [1.0] * self.size)
        first, last = parts[self.rank]
        counts, starts = [(b - a) * width for a, b in parts], [a * width for a, _ in parts]
        own = counts[self.rank]
        pieces = np.empty((self.size, last - first, width), np.uint8)
        places = ([own] * self.size, [own * r for r in range(self.size)])
        self.comm.Alltoallv([mine, (counts, starts)], [pieces, places])
        decode_sum(pieces, values[first:last])
        encode(values[first:last], mine[first:last])
        gathered = np.empty((1, *mine.shape), np.uint8)
        self.comm.Allgatherv(mine[first:last].copy(), [gathered, (counts, starts)])
        decode_sum(gathered, values)
        self._count(mine.size - own + own * (self.size - 1))

    def _encoded(self, values: np.ndarray) -> np.ndarray:
        mine = np.empty((len(values), PAYLOADS[self.payload]), np.uint8)
        encode(values, mine)
        return mine

    def _count(self, size: int) -> None:
        self.link[at.SENT] += size
        self.link[at.RECEIVED] += size
