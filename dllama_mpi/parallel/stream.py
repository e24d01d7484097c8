"""Bytes from the root to one rank after another, while the next ones are being made; and waiting without haste.

MPI's own waiting keeps a core busy. Here requests are tested, with sleeps between the tests that stay well below the
time in which a socket's buffer fills.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..errors import DllamaError
from .group import TensorParallelGroup
from .tags import Tag

_SPIN_SECONDS = 2e-4
_LONGEST_SLEEP = 2e-4  # while bytes flow
_IDLE_SLEEP = 5e-3  # for ranks that wait for the others to have done


def wait(request: Any, longest: float = _LONGEST_SLEEP, status: Any = None) -> None:
    """Wait for an MPI request, with ever longer sleeps up to `longest` seconds."""
    started, pause = time.perf_counter(), 0.0
    while not request.Test(status):
        if time.perf_counter() - started < _SPIN_SECONDS:
            os.sched_yield()
        else:
            pause = min(longest, pause + 1e-5)
            time.sleep(pause)


@contextlib.contextmanager
def together_at_rest(group: TensorParallelGroup) -> Iterator[None]:
    """Do as `TensorParallelGroup.together`, for blocks that take some ranks much longer: the others wait asleep."""
    with group.together():
        try:
            yield
        except (DllamaError, MemoryError):
            _wait_for_all(group)
            raise
        _wait_for_all(group)


def _wait_for_all(group: TensorParallelGroup) -> None:
    if group.comm is not None:
        wait(group.comm.Ibarrier(), _IDLE_SLEEP)


class Outbox:
    """The root's side: sends pieces in order, a few of them on their way at a time."""

    def __init__(self, group: TensorParallelGroup, ranks: Iterable[int], ahead: int = 4) -> None:
        """Send to `ranks`, of all pieces together at most `ahead` that have not left."""
        self._group, self._ranks, self._ahead = group, list(ranks), ahead
        self._leaving: deque[tuple[Any, np.ndarray]] = deque()

    def send(self, rank: int, piece: np.ndarray) -> None:
        """Send a piece (n,) uint8, contiguous, of at least one byte. It must not change until the outbox is closed."""
        assert self._group.comm is not None
        while len(self._leaving) >= self._ahead:
            wait(self._leaving.popleft()[0])
        self._leaving.append((self._group.comm.Isend(piece, rank, Tag.PIECE), piece))

    def stopped(self) -> int | None:
        """Return a rank that has asked for no more, if there is one."""
        assert self._group.comm is not None
        for rank in self._ranks:
            if self._group.comm.Iprobe(rank, Tag.STOP):
                self._group.comm.Recv(np.empty(0, np.uint8), rank, Tag.STOP)
                return rank
        return None

    def close(self, failed: bool) -> None:
        """Wait until everything has left; after a failure tell every rank that nothing more will come."""
        assert self._group.comm is not None
        if failed:
            for rank in self._ranks:
                end = np.empty(0, np.uint8)
                self._leaving.append((self._group.comm.Isend(end, rank, Tag.PIECE), end))
        for request, _ in self._leaving:
            wait(request)
        self._leaving.clear()


class Inbox:
    """A worker's side: the root's pieces in order, the next one on its way while one is dealt with."""

    def __init__(self, group: TensorParallelGroup) -> None:
        self._group = group
        self._stopping: Any = None

    def pieces(self, sizes: Iterable[int]) -> Iterator[np.ndarray]:
        """Yield pieces (n,) uint8 of these sizes, each valid until the next is taken.

        Ends early when the root tells that it failed.
        """
        from mpi4py import MPI

        assert self._group.comm is not None
        todo = list(sizes)
        buffers = [np.empty(max(todo, default=0), np.uint8) for _ in range(2)]

        def post(i: int) -> Any:
            assert self._group.comm is not None
            return self._group.comm.Irecv(buffers[i % 2][: todo[i]], 0, Tag.PIECE) if i < len(todo) else None

        request, status = post(0), MPI.Status()
        for i, size in enumerate(todo):
            wait(request, status=status)
            if status.Get_count(MPI.BYTE) != size:
                return
            request = post(i + 1)
            yield buffers[i % 2][:size]

    def stop(self) -> None:
        """Tell the root that this rank can take no more; what is on its way is still to be taken."""
        assert self._group.comm is not None
        self._stopping = self._group.comm.Isend(np.empty(0, np.uint8), 0, Tag.STOP)
