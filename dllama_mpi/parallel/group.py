"""The ranks of one job as a tensor-parallel group: commands from the root, agreement on errors, all-reduce."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ClusterError, DllamaError, UsageError
from .connection import Phase
from .handshake import shake_hands
from .launch import host_name, watch_exceptions, world
from .roll_call import roll_call
from .watchdog import is_timeout, watchdog

if TYPE_CHECKING:  # what imports Numba is imported once the watchdog watches
    from .collective.all_reduce import AllReduce
    from .collective.choose import Choice

_HEAD = 512  # bytes of a command's first message; a decode step fits
_HEADER = struct.Struct("<ii")  # kind, payload bytes
_SPIN_SECONDS = 0.005  # a worker polls this long before it begins to sleep
_LONGEST_SLEEP = 0.01
_SLEEP_SHARE = 0.1  # of the time waited so far: a short wait is never lengthened by much


@dataclass
class Traffic:
    """What a rank has spent on synchronisation since the last reset: seconds and bytes."""

    seconds: float = 0.0
    sent: int = 0
    received: int = 0


class TensorParallelGroup:
    """All ranks of the job.

    With one rank every method returns at once. Methods are collective (every rank calls them in the same order)
    unless they say otherwise.

    Attributes:
        rank, size: this rank and their number. hosts: host name of each rank.
        local_ranks: the ranks on this host, in order. watchdog: what notices ranks that are gone.
    """

    def __init__(self, comm: Any | None) -> None:
        """Join the others.

        Raises:
            ClusterError: they run another program, see `handshake`; the same on every rank.
        """
        self.comm = comm if comm is not None and comm.size > 1 else None
        self.rank: int = comm.rank if comm is not None else 0
        self.size: int = comm.size if comm is not None else 1
        self.host = host_name()
        ranks = [] if self.comm is None else shake_hands(self.comm, self.host)
        # By name, not by MPI's shared-memory split: that one is wrong under some launchers.
        self.hosts = [rank.host for rank in ranks] or [self.host]
        self.local_ranks = [r for r, host in enumerate(self.hosts) if host == self.host]
        self.traffic = Traffic()
        self._reduce: AllReduce | None = None
        self._link: np.record | None = None
        self._head = np.zeros(_HEAD, np.uint8)
        self.watchdog = watchdog()
        if self.comm is not None:
            self.watchdog.start(self.comm, self.hosts)

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def allgather(self, value: Any) -> list[Any]:
        """Return every rank's small picklable value, in rank order."""
        return [value] if self.comm is None else list(self.comm.allgather(value))

    def broadcast(self, value: Any) -> Any:
        """Return the root's small picklable value on every rank."""
        return value if self.comm is None else self.comm.bcast(value)

    def agree(self, error: DllamaError | None) -> None:
        """Raise the same error on every rank if any rank has one.

        Raises:
            DllamaError: the first rank's error, of that rank's class, marked as agreed; it names rank and host when
                not all ranks say the same.
        """
        said = self.allgather(None if error is None else (type(error), str(error)))
        wrong = [(rank, *what) for rank, what in enumerate(said) if what is not None]
        if not wrong:
            return
        rank, kind, text = wrong[0]
        everybody = len(wrong) == self.size and len({what[2] for what in wrong}) == 1
        raised = kind(text if everybody or self.size == 1 else f"rank {rank} on {self.hosts[rank]}: {text}")
        raised.agreed = True
        raise raised

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without collectives; raise on every rank if it failed on any for a reason a user can mend."""
        error: DllamaError | None = None
        try:
            yield
        except DllamaError as caught:
            error = caught
        except MemoryError:
            error = ClusterError("out of memory; use more ranks, smaller --weights or a smaller --max-seq-len")
        self.agree(error)

    def send_command(self, kind: int, payload: bytes = b"") -> None:
        """Send a command to the workers. Root only; each worker takes it with `next_command`."""
        if self.comm is None:
            return
        head = self._head
        head[: _HEADER.size] = np.frombuffer(_HEADER.pack(kind, len(payload)), np.uint8)
        rest = np.frombuffer(payload, np.uint8)
        inline = len(payload) <= _HEAD - _HEADER.size
        if inline:
            head[_HEADER.size : _HEADER.size + len(payload)] = rest
        self.comm.Ibcast(head, 0).Wait()
        self.traffic.sent += _HEAD
        if not inline:
            self.comm.Bcast(rest.copy(), 0)
            self.traffic.sent += len(payload)

    def next_command(self) -> tuple[int, bytes]:
        """Wait for the root's next command and return (kind, payload). Workers only.

        Polls, then sleeps ever longer (to 10 ms): an MPI library's own waiting would burn a core.
        """
        assert self.comm is not None
        request = self.comm.Ibcast(self._head, 0)
        started, is_idle = time.perf_counter(), False
        while not request.Test():
            waited = time.perf_counter() - started
            if waited < _SPIN_SECONDS:
                os.sched_yield()
                continue
            if not is_idle:
                is_idle = True
                self.watchdog.tell(Phase.IDLE)
            time.sleep(min(_LONGEST_SLEEP, waited * _SLEEP_SHARE))
        kind, length = _HEADER.unpack(self._head[: _HEADER.size].tobytes())
        self.traffic.received += _HEAD
        if length <= _HEAD - _HEADER.size:
            return kind, self._head[_HEADER.size : _HEADER.size + length].tobytes()
        rest = np.empty(length, np.uint8)
        self.comm.Bcast(rest, 0)
        self.traffic.received += length
        return kind, rest.tobytes()

    def prepare_all_reduce(self, rows: int, width: int, payload: str | None, sync: str) -> np.ndarray:
        """Make ready for all-reduces of up to `rows` tokens x `width` values, and choose how they are done.

        width: a multiple of 32. payload: "f32", "f16", "q80", "q40" or None, see `AllReduce`; sync: one of `SYNCS`.
        Returns where compiled layers write the terms: (2, rows, width) float32 zeros.

        Raises:
            UsageError: sync does not suit these hosts; the same on every rank.
        """
        if self.comm is None:
            self._reduce = None
            return np.zeros((2, rows, width), np.float32)
        from .collective.all_reduce import AllReduce

        try:
            self._reduce = AllReduce(self.comm, self.hosts, rows, width, payload, sync)
        except UsageError as error:  # every rank has it
            self.agree(error)
            raise
        return self._reduce.values

    @property
    def link(self) -> np.record:
        """What compiled layers take for their all-reduces, see `collective.link`."""
        if self._reduce is not None:
            return self._reduce.link
        if self._link is None:
            from .collective.link import link_of_one_rank

            self._link = link_of_one_rank()
        return self._link

    @property
    def choices(self) -> list[Choice]:
        """How all-reduces are done, by size; empty with one rank."""
        return self._reduce.choices if self._reduce is not None else []

    @property
    def payload(self) -> str:
        """What all-reduces send between hosts."""
        return self._reduce.payload if self._reduce is not None else "f32"

    def parts(self, tokens: int) -> np.ndarray:
        """Return the bounds (parts + 1,) int64 of the parts a step is computed in, so that exchanges overlap."""
        return np.array([0, tokens], np.int64) if self._reduce is None else self._reduce.parts(tokens)

    @contextlib.contextmanager
    def exchanging(self, parts: np.ndarray) -> Iterator[None]:
        """Have all-reduces carried out while a block computes layers in these parts, and count them at its end."""
        if self._reduce is None:
            yield
            return
        with self._reduce.exchanging(parts):
            yield
        self._count()

    def all_reduce(self, x: np.ndarray) -> None:
        """Replace x, contiguous float32 of any shape, by its sum over ranks; bit-identical on every rank."""
        if self._reduce is None:
            return
        self._reduce(x)
        self._count()

    def _count(self) -> None:
        assert self._reduce is not None
        seconds, sent, received = self._reduce.take_counts()
        self.traffic.seconds += seconds
        self.traffic.sent += sent
        self.traffic.received += received

    def gather(self, x: np.ndarray) -> list[np.ndarray] | None:
        """Return every rank's array on the root (None elsewhere); shapes may differ in the last axis only.

        x: contiguous, at least one dimension, the same dtype everywhere.
        """
        if self.comm is None:
            return [x]
        widths = self.comm.gather(x.shape[-1])
        flat = np.ascontiguousarray(x).view(np.uint8).ravel()
        if not self.is_root:
            self.comm.Gatherv(flat, None)
            self.traffic.sent += flat.size
            return None
        shapes = [(*x.shape[:-1], width) for width in widths]
        sizes = [int(np.prod(shape)) * x.dtype.itemsize for shape in shapes]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        buffer = np.empty(int(starts[-1]), np.uint8)
        self.comm.Gatherv(flat, [buffer, (sizes, starts[:-1].tolist())])
        self.traffic.received += buffer.size - flat.size
        return [
            buffer[start : start + size].view(x.dtype).reshape(shape)
            for start, size, shape in zip(starts, sizes, shapes, strict=False)
        ]

    def reset_traffic(self) -> None:
        """Begin to count synchronisation anew. Not collective."""
        self.traffic = Traffic()


def connect(timeout: float | None = None) -> TensorParallelGroup:
    """Join the job (MPI starts here) and return its group.

    timeout: seconds after which the start is given up, and of silence that end the job later (default: 30; 0: none).
        What cannot be one is for others to refuse.

    Raises:
        ClusterError: see `launch.world` and `handshake`.
    """
    if is_timeout(timeout):
        watchdog().timeout = float(timeout or 0)
    with roll_call(watchdog().timeout):
        comm = world()
        watch_exceptions(comm)
        return TensorParallelGroup(comm)
