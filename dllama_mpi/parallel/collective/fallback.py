"""Sums through mpi4py: the library's own Allreduce, and all of it where compiled code cannot call MPI."""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from ...kernels.layout import BLOCK
from ..partition import cut
from . import table
from .payload import decode_sum, encode
from .table import PAYLOADS


class Fallback:
    """What a link's callback does: sums float32 values over ranks, in place, by direct, scatter or mpi.

    Direct and scatter give the same bits as in compiled code.
    """

    def __init__(self, comm: Any, link: np.record, payload: str) -> None:
        """Become the link's callback for sums on a communicator, sent as a payload unless they are exact."""
        self._comm, self._link, self._payload = comm, link, payload
        self._operations: dict[int, Callable[[np.ndarray, str], None]] = {
            table.MPI.number: self._library,
            table.DIRECT.number: self._direct,
            table.SCATTER.number: self._scatter,
        }
        self._function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * 4)(self._sum)  # kept as long as the link
        link.callback = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _sum(self, algorithm: int, address: int, blocks: int, exact: int) -> int:
        try:
            values = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (blocks, BLOCK))
            self._operations[algorithm](values, "f32" if exact else self._payload)
        except BaseException:  # nothing may pass through compiled code
            traceback.print_exc()
            sys.stderr.flush()
            self._comm.Abort(1)
        return 0

    def _library(self, values: np.ndarray, payload: str) -> None:
        from mpi4py import MPI

        self._comm.Allreduce(MPI.IN_PLACE, values)
        self._count(int(table.MPI.payloads.of(self._comm.size) * values.nbytes))

    def _direct(self, values: np.ndarray, payload: str) -> None:
        mine = _encoded(values, payload)
        everybodys = np.empty((self._comm.size, *mine.shape), np.uint8)
        self._comm.Allgather(mine, everybodys)
        decode_sum(everybodys, values)
        self._count((self._comm.size - 1) * mine.size)

    def _scatter(self, values: np.ndarray, payload: str) -> None:
        size, width, mine = self._comm.size, PAYLOADS[payload], _encoded(values, payload)
        bounds = cut(len(mine), [1.0] * size)
        first, last = bounds[self._comm.rank]
        counts, starts = [(b - a) * width for a, b in bounds], [a * width for a, _ in bounds]
        own = counts[self._comm.rank]
        pieces = np.empty((size, last - first, width), np.uint8)
        self._comm.Alltoallv([mine, (counts, starts)], [pieces, ([own] * size, [own * r for r in range(size)])])
        decode_sum(pieces, values[first:last])
        encode(values[first:last], mine[first:last])
        gathered = np.empty((1, *mine.shape), np.uint8)
        self._comm.Allgatherv(mine[first:last].copy(), [gathered, (counts, starts)])
        decode_sum(gathered, values)
        self._count(mine.size - own + own * (size - 1))

    def _count(self, size: int) -> None:
        self._link.sent += size
        self._link.received += size


def _encoded(values: np.ndarray, payload: str) -> np.ndarray:
    found = np.empty((len(values), PAYLOADS[payload]), np.uint8)
    encode(values, found)
    return found
