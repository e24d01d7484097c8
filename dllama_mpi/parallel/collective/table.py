"""The all-reduce's algorithms, once: how each is called, what it costs and where it can be used.

Reports, the command line, checks, the choice by measurement, predictions and compiled code take them from here. A hop
is the time in which messages cross the network once; a payload, the bytes of all values that are summed.

"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import UsageError

PAYLOADS = {"f32": 128, "f16": 64, "q80": 34, "q40": 18}  # bytes of 32 values, see `payload`
COARSE_ROWS = 32  # q40 is for messages of at least so many tokens; smaller ones, which it speeds up little, are q80


def block_bytes(payload: str, rows: int) -> int:
    """Return the bytes of 32 values in a message of so many tokens."""
    return PAYLOADS["q80" if payload == "q40" and rows < COARSE_ROWS else payload]


class Setting(NamedTuple):
    """Who sums, which decides what can be used: so many ranks, in so many hosts.

    Ranks that share memory count as one host, all others as a host each. is_compiled: MPI is called from compiled code,
    on every rank. payload: of `PAYLOADS`.
    """

    ranks: int
    hosts: int
    is_compiled: bool
    payload: str


class Cost(NamedTuple):
    """A cost by the number N of those who send: as a formula, and as a function."""

    formula: str
    of: Callable[[int], float]


@dataclass(frozen=True)
class Algorithm:
    """How ranks sum.

    Attributes:
        name: for `--sync` and in reports. number: in compiled code. how: what is done.
        hops, payloads: one after the other, and sent by the busiest of N ranks; two-level: of N hosts.
        least_ranks: with fewer, `direct` costs the same or less. needs_one_host: all ranks share memory.
        has_levels: it is of use where some ranks share memory and some do not.
        needs_compiled, needs_f32: see `Setting`. rounds_again: sums are rounded in every hop.
    """

    name: str
    number: int
    how: str
    hops: Cost
    payloads: Cost
    least_ranks: int = 2
    needs_one_host: bool = False
    has_levels: bool = False
    needs_compiled: bool = False
    needs_f32: bool = False
    rounds_again: bool = False

    def message(self, ranks: int) -> float:
        """Return the part of a payload in each message, where a rank sends one to every other in each hop."""
        return self.payloads.of(ranks) / self.hops.of(ranks) / (ranks - 1)

    def check(self, setting: Setting) -> None:
        """Raise a UsageError if this cannot be used in a setting; the same on every rank."""
        if self.needs_f32 and setting.payload != "f32":
            raise UsageError(
                f"--sync {self.name} sends f32; --buffer-float-type is {setting.payload}; leave it out or give f32"
            )
        if self.rounds_again and setting.payload == "q40":
            raise UsageError(
                f"--sync {self.name} rounds in every hop, too coarse with q40; use auto, direct or scatter"
            )
        if self.needs_compiled and not setting.is_compiled:
            raise UsageError(
                f"--sync {self.name} needs MPI from compiled code, which cannot call this library; use direct"
            )
        if self.needs_one_host and setting.hosts > 1:
            raise UsageError(
                f"--sync {self.name}: the ranks do not share memory, they are in {setting.hosts} places;"
                " use two-level or auto"
            )

    def suits(self, setting: Setting) -> bool:
        """Return whether this can be used in a setting."""
        try:
            self.check(setting)
        except UsageError:
            return False
        return True


def _doubling_steps(ranks: int) -> float:
    """Return log2 of the largest power of two, and two more for ranks beyond it, which hand over and get back."""
    power = int(math.log2(ranks))
    return power + (2 if ranks > 1 << power else 0)


_NONE, _ONE, _TWO = Cost("0", lambda n: 0), Cost("1", lambda n: 1), Cost("2", lambda n: 2)
_PARTS = Cost("2 (N - 1) / N", lambda n: 2 * (n - 1) / n)
_STEPS = Cost("log2 N, or + 2", _doubling_steps)

SHARED = Algorithm(
    name="shared",
    number=0,
    how="the ranks of one host read each other's float32 in shared memory",
    hops=_NONE,
    payloads=_NONE,
    needs_one_host=True,
    needs_compiled=True,
)
DIRECT = Algorithm(
    name="direct",
    number=1,
    how="every rank sends its payload to every other",
    hops=_ONE,
    payloads=Cost("N - 1", lambda n: n - 1),
)
SCATTER = Algorithm(
    name="scatter",
    number=2,
    how="reduce-scatter, then all-gather",
    hops=_TWO,
    payloads=_PARTS,
    least_ranks=3,
)
DOUBLING = Algorithm(
    name="doubling",
    number=3,
    how="recursive doubling; + 2 where N is no power of two",
    hops=_STEPS,
    payloads=_STEPS,
    least_ranks=3,
    needs_compiled=True,
    rounds_again=True,
)
TWO_LEVEL = Algorithm(
    name="two-level",
    number=4,
    how="shared memory within hosts; between them direct (two hosts, small messages) or scatter",
    hops=Cost("1 or 2", lambda n: min(2, n - 1)),
    payloads=_PARTS,
    has_levels=True,
    needs_compiled=True,
)
MPI = Algorithm(
    name="mpi",
    number=5,
    how="the library's own Allreduce in float32, through mpi4py; what it sends at least",
    hops=_TWO,
    payloads=_PARTS,
    needs_f32=True,
)

ALGORITHMS = {a.name: a for a in (SHARED, DIRECT, SCATTER, DOUBLING, TWO_LEVEL, MPI)}
SYNCS = ("auto", *ALGORITHMS)


def candidates(setting: Setting) -> list[Algorithm]:
    """Return the algorithms that could be the fastest in a setting."""
    if SHARED.suits(setting):
        return [SHARED]
    found = [a for a in ALGORITHMS.values() if a.suits(setting) and setting.ranks >= a.least_ranks]
    return [a for a in found if not a.has_levels or setting.hosts < setting.ranks]


def cost_table() -> str:
    """Return the algorithms and their costs as lines for people."""
    rows = [("", "hops", "payloads sent", "")]
    rows += [(a.name, a.hops.formula, a.payloads.formula, a.how) for a in ALGORITHMS.values()]
    return "\n".join(f"{name:<11}{hops:<16}{payloads:<16}{how}".rstrip() for name, hops, payloads, how in rows)


__doc__ = f"{__doc__}{cost_table()}"
