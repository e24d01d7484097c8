"""The processes of a server's ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from tests.server.running import Server


def ranks_of(server: Server) -> list[Any]:
    """Return the processes of a server's ranks, the root first."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = [each for each in children if "dllama_mpi" in each.cmdline() and "mpiexec" not in each.name()]
    return sorted(found, key=lambda each: int(each.pid))


def memory_of(server: Server) -> list[int]:
    """Return each rank's resident memory in bytes."""
    found = []
    for rank in ranks_of(server):
        lines = Path(f"/proc/{rank.pid}/status").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1]))
    return found
