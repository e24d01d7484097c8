"""How many threads a rank uses, and on which cores."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from ..kernels import runtime
from ..kernels.quantize import PLAIN, widen_rows
from ..log import warn
from ..parallel.group import TensorParallelGroup
from ..parallel.launch import cores_kept_back


def place_threads(
    group: TensorParallelGroup, everybody: list[tuple[str, list[int]]], wanted: int | None, bind: bool
) -> int:
    """Set this rank's threads and return their number: `wanted`, or its cores divided by the ranks that share them.

    everybody: each rank's host and the cores it may use. bind: keep the rank and its threads on cores of their own.
    The root warns where Open MPI has bound its host's ranks so that cores are idle.

    Raises:
        UsageError: more threads than cores.
    """
    cores = runtime.usable_cores()
    sharing = [rank for rank, other in enumerate(everybody) if other == (group.host, cores)]
    is_bound = bind and len(cores) >= len(sharing)
    if is_bound:
        place = sharing.index(group.rank)
        cores = cores[len(cores) * place // len(sharing) : len(cores) * (place + 1) // len(sharing)]
        runtime.bind(cores)
        sharing = [group.rank]
    if wanted is None:
        if group.is_root:
            _warn_of_idle_cores(everybody)
        wanted = max(1, min(len(cores) // len(sharing), runtime.most_threads()))
    runtime.set_threads(wanted)
    if is_bound:
        _bind_threads(cores)
    return wanted


def _warn_of_idle_cores(everybody: list[tuple[str, list[int]]]) -> None:
    host = everybody[0][0]
    used = {core for other, cores in everybody if other == host for core in cores}
    if idle := cores_kept_back(used):
        cores = f"{len(used)} of the {len(used) + idle} cores of {host}"
        warn(f"mpirun has bound its ranks to {cores}; give it --bind-to none")


def _bind_threads(cores: list[int]) -> None:
    """Keep each of the kernels' threads on a core of its own, where the system tells what threads there are."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir() or not hasattr(os, "sched_setaffinity"):
        return
    before = {path.name for path in tasks.iterdir()}
    widen_rows(np.zeros((len(cores), 1), np.float32), PLAIN, np.zeros((len(cores), 1), np.float32))  # starts them
    started = sorted(int(path.name) for path in tasks.iterdir() if path.name not in before)
    for task, core in zip([os.getpid(), *started], cores, strict=False):
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(task, {core})
