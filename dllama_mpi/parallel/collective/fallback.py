"""Sums through mpi4py: the library's own Allreduce, and all of it where compiled code cannot call MPI."""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from ...kernels.layout import BLOCK
from . import table
from .payload import decode_sum, encode, encode_keeping


class Fallback:
    """What a link's callback does: sums float32 values over ranks, in place, by direct, scatter or mpi.

    Direct and scatter give the same bits as in compiled code.
    """

    def __init__(self, comm: Any, link: np.record) -> None:
        """Become the link's callback for sums on a communicator."""
        self._comm, self._link = comm, link
        self._operations: dict[int, Callable[[np.ndarray, int, np.ndarray | None], None]] = {
            table.MPI.number: self._library,
            table.DIRECT.number: self._direct,
            table.SCATTER.number: self._scatter,
        }
        self._function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * 5)(self._sum)  # kept as long as the link
        link.callback = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _sum(self, algorithm: int, address: int, blocks: int, width: int, rest: int) -> int:
        try:
            left = _floats(rest, blocks) if rest else None
            self._operations[algorithm](_floats(address, blocks), width, left)
        except BaseException:  # nothing may pass through compiled code
            traceback.print_exc()
            sys.stderr.flush()
            self._comm.Abort(1)
        return 0

    def _library(self, values: np.ndarray, width: int, rest: np.ndarray | None) -> None:
        from mpi4py import MPI

        self._comm.Allreduce(MPI.IN_PLACE, values)
        self._count(int(table.MPI.payloads.of(self._comm.size) * values.nbytes))

    def _direct(self, values: np.ndarray, width: int, rest: np.ndarray | None) -> None:
        mine = _encoded(values, width, rest)
        everybodys = np.empty((self._comm.size, *mine.shape), np.uint8)
        self._comm.Allgather(mine, everybodys)
        decode_sum(everybodys, values)
        self._count((self._comm.size - 1) * mine.size)

    def _scatter(self, values: np.ndarray, width: int, rest: np.ndarray | None) -> None:
        size, mine = self._comm.size, _encoded(values, width, rest)
        bounds = [(len(mine) * rank // size, len(mine) * (rank + 1) // size) for rank in range(size)]
        first, last = bounds[self._comm.rank]
        counts, starts = [(b - a) * width for a, b in bounds], [a * width for a, _ in bounds]
        own = counts[self._comm.rank]
        pieces = np.empty((size, last - first, width), np.uint8)
        self._comm.Alltoallv([mine, (counts, starts)], [pieces, ([own] * size, [own * r for r in range(size)])])
        decode_sum(pieces, values[first:last])
        left = None if rest is None else np.zeros_like(rest[first:last])
        mine[first:last] = _encoded(values[first:last], width, left)
        if rest is not None:
            rest[first:last] += left
        gathered = np.empty((1, *mine.shape), np.uint8)
        self._comm.Allgatherv(mine[first:last].copy(), [gathered, (counts, starts)])
        decode_sum(gathered, values)
        self._count(mine.size - own + own * (size - 1))

    def _count(self, size: int) -> None:
        self._link.sent += size
        self._link.received += size


def _floats(address: int, blocks: int) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (blocks, BLOCK))


def _encoded(values: np.ndarray, width: int, rest: np.ndarray | None) -> np.ndarray:
    found = np.empty((len(values), width), np.uint8)
    if rest is None:
        encode(values, found)
    else:
        encode_keeping(values, found, rest)
    return found
