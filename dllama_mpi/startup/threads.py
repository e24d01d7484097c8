"""How many threads a rank uses, and on which cores."""

from __future__ import annotations

from ..kernels import runtime
from ..parallel.group import TensorParallelGroup


def place_threads(
    group: TensorParallelGroup, everybody: list[tuple[str, list[int]]], wanted: int | None, bind: bool
) -> int:
    """Set this rank's threads and return their number: `wanted`, or its cores divided by the ranks that share them.

    everybody: each rank's host and the cores it may use. bind: keep the rank and its threads on cores of their own.

    Raises:
        UsageError: more threads than cores.
    """
    cores = runtime.usable_cores()
    sharing = [rank for rank, other in enumerate(everybody) if other == (group.host, cores)]
    if bind and len(cores) >= len(sharing):
        place = sharing.index(group.rank)
        cores = cores[len(cores) * place // len(sharing) : len(cores) * (place + 1) // len(sharing)]
        runtime.bind(cores)
        sharing = [group.rank]
    if wanted is None:
        wanted = max(1, min(len(cores) // len(sharing), runtime.most_threads()))
    runtime.set_threads(wanted)
    return wanted
