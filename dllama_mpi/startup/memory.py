"""Does it fit? Checked on every host before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import ClusterError

LEAST_POSITIONS = 256  # a context below this is of no use to anybody
_RESERVE = 0.95  # part of the free memory that may be used


@dataclass(frozen=True)
class Need:
    """What one rank needs, and what its host has.

    Attributes:
        fixed: bytes of weights and buffers. per_position: bytes of KV cache for one position of all slots.
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


def fitting_positions(needs: list[Need], wanted: int, is_explicit: bool) -> int:
    """Return how many positions the KV cache can have: `wanted`, or fewer if memory is short and nobody insisted.

    needs: every rank's, in rank order.

    Raises:
        ClusterError: some host has too little memory, with the numbers.
    """
    fitting = wanted
    for host in dict.fromkeys(n.host for n in needs):
        ranks = [i for i, n in enumerate(needs) if n.host == host]
        fixed, each = (sum(getattr(needs[i], name) for i in ranks) for name in ("fixed", "per_position"))
        free = usable_bytes([needs[i] for i in ranks])
        fits = max(0, free - fixed) // each if each else wanted * (fixed <= free)
        least = wanted if is_explicit else min(wanted, LEAST_POSITIONS)
        if fits < least:
            who = f"rank {ranks[0]} needs" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]} need"
            remedy = (
                f"--max-seq-len {fits} fits" if fits >= 1 else "use more hosts, smaller --weights or another --split"
            )
            raise ClusterError(
                f"{who} {_gb(fixed + least * each)} (weights and buffers {_gb(fixed)}, KV cache for {least} positions"
                f" {_gb(least * each)}), {host} has {_gb(free)} free: {remedy}"
            )
        fitting = min(fitting, fits)
    return fitting


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
