"""Does it fit? Checked on every host before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import ClusterError
from ..kernels.layout import PAGE, ceil_div

LEAST_POSITIONS = 256  # a context below this is of no use to anybody
_RESERVE = 0.95  # part of the free memory that may be used


@dataclass(frozen=True)
class Need:
    """What one rank needs, and what its host has.

    Attributes:
        fixed: bytes of weights and buffers. per_position: bytes of KV cache for one position.
        available: bytes that its host has free.
    """

    host: str
    fixed: int
    per_position: int
    available: int


def available_bytes() -> int:
    """Return the memory this host can give: what the system calls available, or what a control group leaves."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def usable_bytes(needs: Sequence[Need]) -> int:
    """Return the bytes that ranks of one host may use together."""
    return int(min(need.available for need in needs) * _RESERVE)


@dataclass(frozen=True)
class Wish:
    """What the KV cache should hold.

    Attributes:
        positions: of one sequence. is_explicit: whether the user insists on them. sequences: at once.
        bytes: of each rank's cache, or None for as much as the sequences can need.
    """

    positions: int
    is_explicit: bool
    sequences: int = 1
    bytes: int | None = None


@dataclass(frozen=True)
class Room:
    """What it can hold: positions of one sequence, and pages of 256 positions that all sequences share."""

    positions: int
    pages: int


def fitting(needs: list[Need], wish: Wish) -> Room:
    """Return what the KV cache can hold: what is wished, or less if memory is short and nobody insisted.

    needs: every rank's, in rank order.

    Raises:
        ClusterError: some host has too little memory, with the numbers.
    """
    least = wish.positions if wish.is_explicit else min(wish.positions, LEAST_POSITIONS)
    pages = _limit(needs, wish, least)
    for host in dict.fromkeys(n.host for n in needs):
        ranks = [i for i, n in enumerate(needs) if n.host == host]
        fixed, each = (sum(getattr(needs[i], name) for i in ranks) for name in ("fixed", "per_position"))
        free = usable_bytes([needs[i] for i in ranks])
        fits = max(0, free - fixed) // (PAGE * each) if each else pages * (fixed <= free)
        if fits < ceil_div(least, PAGE) or (wish.bytes is not None and fits < pages):
            if fits >= ceil_div(least, PAGE):
                least = PAGE * pages  # of what --kv-memory asks for
            who = f"rank {ranks[0]} needs" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]} need"
            remedy = "use more hosts, smaller --weights or another --split"
            if fits >= 1:
                remedy = f"--max-seq-len {fits * PAGE} fits"
                if wish.bytes is not None:
                    most = max(needs[i].per_position for i in ranks)
                    remedy = f"--kv-memory {fits * PAGE * most / 1e9:.3g} fits"
            raise ClusterError(
                f"{who} {_gb(fixed + least * each)} (weights and buffers {_gb(fixed)}, KV cache for {least} positions"
                f" {_gb(least * each)}), {host} has {_gb(free)} free: {remedy}"
            )
        pages = min(pages, fits)
    return Room(min(wish.positions, pages * PAGE), pages)


def _limit(needs: list[Need], wish: Wish, least: int) -> int:
    """Return the most pages that are wished for."""
    if wish.bytes is None:
        return wish.sequences * ceil_div(wish.positions, PAGE)
    each = max(need.per_position for need in needs)
    pages = wish.bytes // (PAGE * each) if each else wish.sequences * ceil_div(wish.positions, PAGE)
    if pages < ceil_div(least, PAGE):
        needed = ceil_div(least, PAGE) * PAGE * each / 1e9
        raise ClusterError(
            f"--kv-memory {wish.bytes / 1e9:g} holds {pages * PAGE} positions, and --max-seq-len is {least}:"
            f" give {needed:.3g} or more"
        )
    return pages


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
