"""The links between the root and every other rank, measured by a few messages."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import numpy as np

from .tags import Tag

_SIZES = (1, 65536)  # bytes
_TRIPS = 5


class StarLink(NamedTuple):
    """Seconds of latency, and bytes a second, between the root and a rank on another host."""

    latency: float
    bytes_per_second: float


def measure_star(comm: Any | None, hosts: list[str]) -> list[StarLink | None]:
    """Return, on the root, each rank's link with it; None for ranks on the root's host.

    Collective, and one rank after the other: some 10 ms for each at 1 Gbit/s.
    """
    links: list[StarLink | None] = [None]
    for other in range(1, comm.size) if comm is not None else ():
        assert comm is not None
        link = None
        if comm.rank in (0, other) and hosts[other] != hosts[0]:
            small, large = (_one_way(comm, size, other) for size in _SIZES)
            link = StarLink(small, (_SIZES[1] - _SIZES[0]) / max(large - small, 1e-9))
        links.append(link)
    return links


def _one_way(comm: Any, size: int, other: int) -> float:
    """Return half the median seconds of a round trip between the root and another rank, the first one left out."""
    buffer, seconds = np.zeros(size, np.uint8), []
    for _ in range(_TRIPS + 1):
        started = time.perf_counter()
        if comm.rank == 0:
            comm.Send(buffer, other, Tag.STAR)
            comm.Recv(buffer, other, Tag.STAR)
        else:
            comm.Recv(buffer, 0, Tag.STAR)
            comm.Send(buffer, 0, Tag.STAR)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) / 2
