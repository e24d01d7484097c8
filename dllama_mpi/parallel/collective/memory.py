"""The buffers of an all-reduce: how many bytes each takes, who shares them, and the link that knows where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...kernels.layout import BLOCK, ceil_div, ceil_to
from .calls import REQUEST_BYTES, STATUS_BYTES
from .link import FLAG_BYTES, JOB, LINK, PARTS, QUEUED, SCRATCH_WORDS
from .shared import share
from .table import COARSE_ROWS, PAYLOADS, block_bytes

_LINE = 64  # bytes of a cache line, on which every buffer begins
_LINKS = 2  # of the main thread and of the one that exchanges meanwhile


class Sizes(NamedTuple):
    """Bytes of the buffers, without what shifts them to a cache line.

    Attributes:
        values: (2, rows, width) float32, what this rank's terms are written to. flags: of both parts.
        total: one part's sum, float32. outgoing: one part's payload. incoming: one part's payloads: of every rank, or
        the result and every rank's piece. numbers: of ranks. requests, statuses: MPI's. links, queue, words, rests:
        see `link`.
    """

    values: int
    flags: int
    total: int
    outgoing: int
    incoming: int
    numbers: int
    requests: int
    statuses: int
    links: int
    queue: int
    words: int
    rests: int

    def private(self) -> dict[str, int]:
        """Return the bytes of each buffer that no rank shares with others, wherever it is."""
        rest = self._asdict()
        del rest["values"], rest["flags"]
        return {**rest, "incoming": PARTS * self.incoming}

    def host(self, ranks_here: int, hosts: int) -> int:
        """Return the bytes that ranks of one host share: flags, values of each, and what arrives from other hosts."""
        return self.flags + ranks_here * self.values + (PARTS * self.incoming if hosts > 1 else 0)


def buffer_sizes(ranks: int, ranks_here: int, rows: int, width: int, payload: str) -> Sizes:
    """Return the sizes for sums of up to `rows` rows of `width` values over `ranks` ranks, so many on this host."""
    blocks = rows * width // BLOCK
    widest = max(block_bytes(payload, 1), PAYLOADS[payload])
    message = max(blocks * widest, rows * PAYLOADS["f32"])  # an exact exchange has a block a row
    return Sizes(
        values=2 * blocks * BLOCK * 4,
        flags=PARTS * (ranks_here + 1) * FLAG_BYTES,
        total=blocks * BLOCK * 4,
        outgoing=message,
        incoming=ceil_to((max(ranks, 2) + 1) * message, _LINE),
        numbers=2 * ranks * 8,
        requests=2 * ranks * REQUEST_BYTES,
        statuses=2 * ranks * STATUS_BYTES,
        links=_LINKS * LINK.itemsize,
        queue=QUEUED * JOB.itemsize,
        words=(_LINKS * SCRATCH_WORDS + 2 * _LINE // 8) * 8,
        rests=blocks * BLOCK * 4 if payload == "q40" else 0,
    )


def all_reduce_bytes(ranks: int, ranks_here: int, hosts: int, rows: int, width: int, payload: str) -> int:
    """Return the bytes that one rank's `AllReduce` of `rows` rows x `width` values (a multiple of 32) allocates.

    ranks_here: ranks of its host, which share memory if there are several; that is counted once for the host, an equal
    part with each of its ranks. hosts: their number. With one rank there is nothing but the values.
    """
    sizes = buffer_sizes(ranks, ranks_here, rows, width, payload)
    if ranks == 1:
        return sizes.values
    private = sum(sizes.private().values()) + len(sizes.private()) * _LINE
    if ranks_here == 1:
        return private + sizes.values + sizes.flags + 2 * _LINE
    return private + ceil_div(sizes.host(ranks_here, hosts), ranks_here)


@dataclass(frozen=True)
class Homes:
    """Who shares memory with whom: leaders, the first rank of each host, and mates, the ranks of this one's host."""

    leaders: list[int]
    mates: list[int]

    @staticmethod
    def of(rank: int, hosts: list[str], alone: list[bool]) -> Homes:
        """Return them by the ranks' host names and whether each has no memory to share."""
        homes = [f"{host}#{r}" if alone[r] else host for r, host in enumerate(hosts)]
        leaders = sorted({homes.index(home) for home in homes})
        return Homes(leaders, [r for r, home in enumerate(homes) if home == homes[rank]])


class Buffers:
    """One rank's buffers. Making them is collective.

    Attributes:
        links: (2,) records, of the main thread and of the one that may exchange meanwhile. values: (2, rows, width)
        float32. rests: (rows, width) float32, see `link`; (0, width) with another payload than
        q40. hosts: number of hosts; ranks that share no memory count as one each. allocated: every array.
        shared: the memory that the ranks of this host share, or None.
    """

    def __init__(self, comm: Any, hosts: list[str], shape: tuple[int, int], payload: str, may_share: bool) -> None:
        rows, width = shape
        here = hosts.count(hosts[comm.rank])
        self.sizes = sizes = buffer_sizes(comm.size, here, rows, width, payload)
        self.allocated: dict[str, np.ndarray] = {}
        bytes_of_host = sizes.host(here, len(set(hosts)))
        self.shared = share(comm, hosts, bytes_of_host) if may_share else None
        homes = Homes.of(comm.rank, hosts, comm.allgather(self.shared is None))
        self.hosts = len(homes.leaders)
        for name, size in sizes.private().items():
            self._allocate(name, size)
        self.links: np.recarray = self.allocated["links"].view(LINK).view(np.recarray)
        link = self.links[0]
        link.width, link.incoming_bytes, link.slot_bytes = block_bytes(payload, 1), sizes.incoming, sizes.values
        if block_bytes(payload, COARSE_ROWS) != link.width:
            link.coarse_width, link.coarse_blocks = block_bytes(payload, COARSE_ROWS), COARSE_ROWS * width // BLOCK
            link.rests = self.allocated["rests"].ctypes.data
        for name in ("total", "outgoing", "incoming", "requests", "statuses", "queue"):
            link[name] = self.allocated[name].ctypes.data
        self._place_words()
        self._number_ranks(comm, homes)
        own = self._place_shared(here)
        self.values: np.ndarray = own.view(np.float32).reshape(2, rows, width)
        self.rests: np.ndarray = self.allocated["rests"].view(np.float32).reshape(-1, width)

    def _allocate(self, name: str, size: int) -> np.ndarray:
        """Return zeros that live as long as this object, on a cache line."""
        raw = np.zeros(size + _LINE, np.uint8)
        start = -raw.ctypes.data % _LINE
        self.allocated[name] = raw[start : start + size]
        return self.allocated[name]

    def _place_words(self) -> None:
        link, words = self.links[0], self.allocated["words"].ctypes.data
        link.queued, link.carried_out, link.scratch = words, words + _LINE, words + 2 * _LINE

    def _number_ranks(self, comm: Any, homes: Homes) -> None:
        link, numbers = self.links[0], self.allocated["numbers"].view(np.int64)
        numbers[: comm.size], numbers[comm.size :][: self.hosts] = range(comm.size), homes.leaders
        link.rank_numbers, link.leader_numbers = numbers.ctypes.data, numbers[comm.size :].ctypes.data
        link.rank, link.ranks = comm.rank, comm.size
        link.host, link.hosts = homes.leaders.index(homes.mates[0]), self.hosts
        link.local, link.locals = homes.mates.index(comm.rank), len(homes.mates)

    def _place_shared(self, here: int) -> np.ndarray:
        """Tell the link where flags, values and what arrives for the host are; return this rank's values as bytes."""
        link, sizes = self.links[0], self.sizes
        if self.shared is None:
            own = self._allocate("values", sizes.values)
            link.slots, link.arrivals = own.ctypes.data, self._allocate("flags", sizes.flags).ctypes.data
            link.host_incoming = link.incoming
            return own
        link.arrivals = self.shared.ctypes.data
        link.slots = link.arrivals + sizes.flags
        link.host_incoming = link.slots + here * sizes.values
        start = sizes.flags + int(link.local) * sizes.values
        return self.shared[start : start + sizes.values]
