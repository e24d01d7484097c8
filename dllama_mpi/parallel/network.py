"""How long messages take: links between ranks, measured by ping-pong, and what an exchange of all ranks costs on them.

A link is a curve of seconds over bytes, because real ones are not straight: small messages cost latency alone, and MPI
libraries change their protocol with the size.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from .collective.table import DIRECT, SCATTER
from .tags import Tag

_SIZES = (64, 2048, 8192, 32768, 1 << 18)  # bytes of the messages that are timed
_SECONDS, _LEAST_TIMES = 0.03, 5  # how long each size is repeated, and how often at least


@dataclass(frozen=True)
class LinkCurve:
    """Seconds that a message takes from one rank to another.

    Attributes:
        points: (bytes, seconds), at least two, by growing bytes; between and beyond them the curve is straight.
        best: the least seconds that the smallest message took; None if it was not measured.
    """

    points: tuple[tuple[float, float], ...]
    best: float | None = None

    @staticmethod
    def of(latency: float, bytes_per_second: float) -> LinkCurve:
        """Return a straight link of so many seconds of latency."""
        return LinkCurve(((0.0, latency), (1e6, latency + 1e6 / bytes_per_second)))

    @property
    def latency(self) -> float:
        """Seconds that the smallest message takes."""
        return self.points[0][1]

    @property
    def bytes_per_second(self) -> float:
        """Rate at which larger messages take longer."""
        (small, soon), (large, late) = self.points[0], self.points[-1]
        return (large - small) / max(late - soon, 1e-9)

    def seconds(self, size: float) -> float:
        """Return how long a message of `size` bytes takes."""
        return interpolate(self.points, size)


def interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Return the value at x of straight lines through points with growing x, continued beyond the last.

    Below the first point the first value holds; a single point stands for a constant.
    """
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    after = min(max(1, bisect_left([p[0] for p in points], x)), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Network:
    """Which host each rank is on, and the links between hosts.

    Attributes:
        hosts: of each rank. links: by the sorted names of two hosts; twice the same name: between ranks of that host.
    """

    hosts: tuple[str, ...]
    links: Mapping[tuple[str, str], LinkCurve]

    def all_reduce_seconds(self, ranks: int, size: int) -> float:
        """Return the least time in which the first `ranks` ranks can sum payloads of `size` bytes.

        The costs are those of direct and scatter in `collective.table`, in whose hops every rank sends to every other.
        What ranks of one host send to other hosts shares that host's link. The summing itself is not counted.
        """
        if ranks < 2:
            return 0.0
        return min(
            algorithm.hops.of(ranks) * self._hop_seconds(ranks, size * algorithm.message(ranks))
            for algorithm in (DIRECT, SCATTER)
            if ranks >= algorithm.least_ranks
        )

    def _hop_seconds(self, ranks: int, size: float) -> float:
        """Return the time in which each rank sends every other a message of `size` bytes."""
        hosts = self.hosts[:ranks]
        slowest = 0.0
        for (first, second), link in self.links.items():
            here = hosts.count(first)
            if here == 0 or second not in hosts or (first == second and here < 2):
                continue
            bytes_out = (ranks - 1) * size if first == second else self._crossing(hosts, first, second) * size
            slowest = max(slowest, link.seconds(bytes_out))
        return slowest

    @staticmethod
    def _crossing(hosts: tuple[str, ...], first: str, second: str) -> int:
        """Return how many messages leave the busier of two hosts in a hop."""
        return max(hosts.count(name) * (len(hosts) - hosts.count(name)) for name in (first, second))


def host_pairs(hosts: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of hosts between which ranks talk, by sorted names; a host with several ranks pairs itself."""
    hosts = list(hosts)
    pairs = combinations_with_replacement(sorted(set(hosts)), 2)
    return [(a, b) for a, b in pairs if a != b or hosts.count(a) > 1]


def measure_links(
    comm: Any | None, hosts: list[str], progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> dict[tuple[str, str], LinkCurve]:
    """Return the links between hosts, each measured between one rank of either, one after the other. Collective.

    comm: None for one process. hosts: of each rank, the same list everywhere.
    """
    links: dict[tuple[str, str], LinkCurve] = {}
    if comm is None:
        return links
    for pair in progress(host_pairs(hosts)):
        first = hosts.index(pair[0])
        second = next(r for r, host in enumerate(hosts) if host == pair[1] and r != first)
        curve = _curve(comm, first, second) if comm.rank in (first, second) else None
        links[pair] = comm.bcast(curve, first)
    return links


def _curve(comm: Any, first: int, second: int) -> LinkCurve:
    """Return the link between two ranks, which both call this, in medians; only the first rank's count."""
    leads, other = comm.rank == first, second if comm.rank == first else first
    points: list[tuple[float, float]] = []
    best = None
    for size in _SIZES:
        buffer = np.zeros(size, np.uint8)
        trips = _trips(comm, buffer, leads, other)
        next(trips)  # connections are made at the first message
        once = next(trips)
        times = int(np.clip(_SECONDS / max(once, 1e-6), _LEAST_TIMES, 1000))
        if leads:
            comm.send(times, other, Tag.LINK)
        else:
            times = comm.recv(source=other, tag=Tag.LINK)
        taken = [next(trips) / 2 for _ in range(times)]
        seconds, best = statistics.median(taken), min(taken) if best is None else best
        points.append((float(size), max(seconds, points[-1][1] if points else 0.0)))  # noise has no say in the order
    return LinkCurve(tuple(points), best)


def _trips(comm: Any, buffer: np.ndarray, leads: bool, other: int) -> Iterator[float]:
    """Yield the seconds of one round trip after another."""
    while True:
        started = time.perf_counter()
        if leads:
            comm.Send(buffer, other, Tag.LINK)
            comm.Recv(buffer, other, Tag.LINK)
        else:
            comm.Recv(buffer, other, Tag.LINK)
            comm.Send(buffer, other, Tag.LINK)
        yield time.perf_counter() - started


def wait_asleep(comm: Any | None) -> None:
    """Wait for all ranks without taking a processor from those that work. Collective."""
    if comm is None:
        return
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.001)
