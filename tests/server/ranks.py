"""The processes of a server's ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import psutil

from tests.server.running import Server

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")


def ranks_of(server: Server) -> list[Any]:
    """Return the processes of a server's ranks, rank 0 first."""
    found = {}
    for each in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            about = each.environ()
            rank = next((about[name] for name in RANK_VARIABLES if name in about), None)
            if rank is not None and each.cmdline()[1:3] == ["-m", "dllama_mpi"]:
                found[int(rank)] = each
    return [found[rank] for rank in sorted(found)]


def memory_of(server: Server) -> list[int]:
    """Return each rank's resident memory in bytes."""
    found = []
    for rank in ranks_of(server):
        lines = Path(f"/proc/{rank.pid}/status").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1]))
    return found
