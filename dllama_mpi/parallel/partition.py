"""Who holds what: pure arithmetic over contiguous ranges, no MPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError

Range = tuple[int, int]


def cut(units: int, shares: Sequence[float], least: int = 0) -> list[Range]:
    """Cut range(units) into contiguous ranges in proportion to `shares`, each of at least `least` units.

    Every rank gets the whole part of its share; units left over go to the largest remainders (largest-remainder
    method), lower ranks first on ties.

    Raises:
        UsageError: `least` units for everybody are more than there are.
    """
    if least * len(shares) > units:
        raise UsageError(f"{units} units cannot be cut into {len(shares)} parts of at least {least}")
    total, free = sum(shares), units - least * len(shares)
    ideal = [max(0.0, units * s / total - least) for s in shares]
    scale = free / sum(ideal) if sum(ideal) > 0 else 0.0
    exact = [i * scale for i in ideal]
    sizes = [int(e + 1e-9) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda r: (sizes[r] - exact[r], r))
    for rank in by_remainder[: free - sum(sizes)]:
        sizes[rank] += 1
    ranges, start = [], 0
    for size in sizes:
        ranges.append((start, start + least + size))
        start += least + size
    return ranges


@dataclass(frozen=True)
class Axis:
    """Something of which a layer has many, and which is shared out among the ranks.

    Attributes:
        name: "heads", "inner", ... units: how many there are. size: elements of a unit in a tensor. total: elements in
            all; the last unit may be short. least: units that each rank must have. group: 0, or this axis follows
            another one, of which each unit belongs to `group` of the other's; a unit that is cut lives on both ranks.
        limit: what the number of units is called in a config, for people.
    """

    name: str
    units: int
    size: int
    total: int
    least: int = 0
    group: int = 0
    limit: str = ""

    @classmethod
    def of(cls, name: str, total: int, size: int) -> Axis:
        """Return an axis of `total` elements in units of `size`."""
        return cls(name, -(-total // size), size, total)


@dataclass(frozen=True)
class Shard:
    """One rank's part of every axis, in units.

    Attributes:
        rank: whose it is. ranges: of each axis.
    """

    rank: int
    ranges: Mapping[Axis, Range]

    def units(self, axis: Axis) -> Range:
        """Return the rank's units of an axis."""
        return self.ranges[axis]

    def elements(self, axis: Axis) -> Range:
        """Return the rank's elements along an axis."""
        first, last = self.ranges[axis]
        return min(first * axis.size, axis.total), min(last * axis.size, axis.total)


def shards(axes: Sequence[tuple[Axis, Axis | None]], shares: Sequence[float]) -> list[Shard]:
    """Return every rank's shard.

    axes: each with the axis that it follows, or None; the latter must stand before it. A rank may hold no unit at all
    of an axis whose `least` is 0.

    Raises:
        UsageError: more ranks than units of an axis of which each rank must have some.
    """
    found: list[dict[Axis, Range]] = [{} for _ in shares]
    for axis, leader in axes:
        if axis.least * len(shares) > axis.units:
            raise UsageError(f"{axis.limit} is {axis.units}; {len(shares)} ranks asked for; use at most {axis.units}")
        ranges = cut(axis.units, shares, axis.least) if leader is None else None
        for rank, own in enumerate(found):
            if ranges is not None:
                own[axis] = ranges[rank]
            elif leader is not None:
                first, last = own[leader]
                own[axis] = first // axis.group, -(-last // axis.group)
    return [Shard(rank, own) for rank, own in enumerate(found)]


AUTO = "auto"  # as --split: shares by measured speed


def parse_split(text: str | None, size: int) -> list[float]:
    """Return the ranks' shares from `--split 3,1,1` (None: equal shares).

    Raises:
        UsageError: not positive numbers, or not one for each rank.
    """
    if text is None:
        return [1.0] * size
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < s < float("inf") for s in shares):
        raise UsageError(f"--split {text}: give positive numbers separated by commas, for example 3,1,1, or auto")
    if len(shares) != size:
        raise UsageError(f"--split {text} has {len(shares)} shares; the job has {size} ranks; give {size}")
    return shares
