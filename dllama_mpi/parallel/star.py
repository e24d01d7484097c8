"""The links between the root and every other rank, measured by a few messages."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

_SIZES = (1, 65536)  # bytes
_TRIPS = 5
_TAG = 78


def measure_star(comm: Any | None, hosts: list[str]) -> list[tuple[float, float] | None]:
    """Return, on the root, each rank's (seconds of latency, bytes a second) to and from it; None on the root's host.

    Collective, and one rank after the other: some 10 ms for each at 1 Gbit/s.
    """
    links: list[tuple[float, float] | None] = [None]
    for other in range(1, comm.size) if comm is not None else ():
        assert comm is not None
        link = None
        if comm.rank in (0, other) and hosts[other] != hosts[0]:
            small, large = (_one_way(comm, size, other) for size in _SIZES)
            link = small, (_SIZES[1] - _SIZES[0]) / max(large - small, 1e-9)
        links.append(link)
    return links


def _one_way(comm: Any, size: int, other: int) -> float:
    """Return half the median seconds of a round trip between the root and another rank, the first one left out."""
    buffer, seconds = np.zeros(size, np.uint8), []
    for _ in range(_TRIPS + 1):
        started = time.perf_counter()
        if comm.rank == 0:
            comm.Send(buffer, other, _TAG)
            comm.Recv(buffer, other, _TAG)
        else:
            comm.Recv(buffer, 0, _TAG)
            comm.Send(buffer, 0, _TAG)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) / 2
