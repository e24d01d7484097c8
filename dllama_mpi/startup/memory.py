"""Does it fit? Checked on every host before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import ClusterError
from ..kernels.layout import PAGE, ceil_div, ceil_to

LEAST_POSITIONS = 256  # a context below this is of no use to anybody
_RESERVE = 0.95  # part of the free memory that may be used
_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Files of a control group: its limit, what it uses, and which line tells how much of that are files' unused pages.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_FULL_PAGES = 16  # for each page for windows, at most, where memory is given by order


@dataclass(frozen=True)
class Need:
    """What one rank needs, and what its host has.

    Attributes:
        fixed: bytes of weights and buffers. per_position: bytes of KV cache for one position.
        available: bytes that its host has free.
        per_window_position: the same as per_position of layers with a window, which keep `window_pages` pages of a
            sequence at most, the same number on all ranks.
    """

    host: str
    fixed: int
    per_position: int
    available: int
    per_window_position: int = 0
    window_pages: int = 0

    def cache(self, positions: int) -> int:
        """Return the bytes of KV cache that one sequence takes at most."""
        return positions * self.per_position + min(positions, PAGE * self.window_pages) * self.per_window_position


def available_bytes() -> int:
    """Return the memory this rank can have: what the system calls available, or what its control groups leave."""
    return min([int(psutil.virtual_memory().available), *_left_by_groups(_PROC, _GROUPS)])


def _left_by_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Yield the bytes that each control group of this process with a limit on memory leaves: its own, and those above.

    proc: /proc. groups: where control groups are mounted, of version 2, or of version 1 in a folder a controller.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not a Linux system
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = groups / "memory" if controllers else groups
        limit, used, cached = _VERSION_1 if controllers else _VERSION_2
        own = top / path.strip("/")  # a container may see its own group's path from outside, and nothing there
        for folder in [own, *own.parents][: len(own.relative_to(top).parts) + 1]:
            try:
                most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            except (OSError, ValueError):  # no limit, or not told
                continue
            yield max(0, most - now + int(stat.get(cached, 0)))  # pages of files give way


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
    """What it can hold: positions of one sequence, and pages of 256 positions that all sequences share.

    Attributes:
        window_pages: of layers with a window; 0: the model has none.
    """

    positions: int
    pages: int
    window_pages: int = 0


@dataclass(frozen=True)
class _Kinds:
    """Numbers, or bytes, of pages: of layers that see all positions, and of those with a window."""

    all: int
    near: int

    def bytes(self, each: _Kinds) -> int:
        """Return the bytes of so many pages of these sizes."""
        return self.all * each.all + self.near * each.near


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
        own = [needs[i] for i in ranks]
        fixed, each = sum(n.fixed for n in own), _page_bytes(own, sum)
        free = usable_bytes(own)
        fits = _divided(free - fixed, each, _one(needs, wish.positions), pages)
        if fits.all < ceil_div(least, PAGE) or (wish.bytes is not None and fits != pages):
            if fits.all >= ceil_div(least, PAGE):
                taken = pages.bytes(each)  # what --kv-memory asks for
                least = PAGE * pages.all
            else:
                taken = sum(n.cache(least) for n in own)
            who = f"rank {ranks[0]} needs" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]} need"
            remedy = "use more hosts, smaller --weights or another --split"
            if fits.all >= 1:
                remedy = f"--max-seq-len {fits.all * PAGE} fits"
                if wish.bytes is not None:
                    remedy = f"--kv-memory {fits.bytes(_page_bytes(own, max)) / 1e9:.3g} fits"
            raise ClusterError(
                f"{who} {_gb(fixed + taken)} (weights and buffers {_gb(fixed)}, KV cache for {least} positions"
                f" {_gb(taken)}), {host} has {_gb(free)} free: {remedy}"
            )
        pages = _Kinds(min(pages.all, fits.all), min(pages.near, fits.near))
    return Room(min(wish.positions, pages.all * PAGE), pages.all, pages.near)


def _page_bytes(needs: Sequence[Need], together: Callable[[Iterable[int]], int]) -> _Kinds:
    """Return the bytes of pages of ranks together, or of the one with the largest."""
    return _Kinds(PAGE * together(n.per_position for n in needs), PAGE * together(n.per_window_position for n in needs))


def _one(needs: Sequence[Need], positions: int) -> _Kinds:
    """Return the pages that one sequence of such a length takes at most."""
    count = ceil_div(positions, PAGE)
    return _Kinds(count, min(count, needs[0].window_pages))


def _limit(needs: list[Need], wish: Wish, least: int) -> _Kinds:
    """Return the most pages that are wished for: of windows what all sequences need, and as many to remember."""
    one = _one(needs, wish.positions)
    asked = _Kinds(wish.sequences * one.all, min(wish.sequences * one.all, 2 * wish.sequences * one.near))
    each = _page_bytes(needs, max)
    if wish.bytes is None or not each.all:
        return asked
    both = wish.bytes // (each.all + each.near)
    most = _Kinds(max(asked.all, both * _FULL_PAGES if each.near else both), both * _FULL_PAGES if one.near else 0)
    pages = _divided(wish.bytes, each, one, most)
    if pages.all < ceil_div(least, PAGE):
        needed = max(need.cache(ceil_to(least, PAGE)) for need in needs) / 1e9
        raise ClusterError(
            f"--kv-memory {wish.bytes / 1e9:g} holds {pages.all * PAGE} positions, and --max-seq-len is {least}:"
            f" give {needed:.3g} or more"
        )
    return pages


def _divided(room: int, each: _Kinds, one: _Kinds, most: _Kinds) -> _Kinds:
    """Return how many pages of each kind fit into `room` bytes, `most` at most.

    One sequence comes first, as long as can be. Of what is left each kind gets half, and what the other leaves; there
    are never more pages for windows than others, since no text can use those.

    each: bytes of a page. one: pages of one sequence.
    """
    if room < 0 or not each.all:
        return most if room >= 0 else _Kinds(0, 0)
    one = _Kinds(min(one.all, most.all), min(one.near, most.near))
    rest = room - one.bytes(each)
    if rest < 0:
        both = min(one.near, room // (each.all + each.near))  # of a short text's pages all are seen
        far = both if both < one.near else (room - both * each.near) // each.all
        return _Kinds(min(far, one.all), both)
    more = min(rest // 2 // each.near, rest // (each.all + each.near)) if each.near else 0
    near = min(most.near, one.near + more)
    far = min(most.all, one.all + (rest - (near - one.near) * each.near) // each.all)
    if each.near:
        near = min(most.near, far, one.near + (rest - (far - one.all) * each.all) // each.near)
    return _Kinds(far, near)


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
