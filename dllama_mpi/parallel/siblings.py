"""The ranks of this job on this host, as the system's table of processes (/proc) shows them: MPI need not be up."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_MARK = "dllama-waits"  # the name of a thread of ranks that wait for the others; 15 characters at most


@dataclass(frozen=True)
class Sibling:
    """A rank of this job on this host.

    Attributes:
        command: the name of what runs there. is_stopped: by SIGSTOP, a terminal or a debugger.
        waits: it waits for the others in MPI's start. spent: clock ticks of the processor, bytes read from disks.
    """

    rank: int
    command: str
    is_stopped: bool
    waits: bool
    spent: tuple[int, int]

    def has_worked_since(self, before: Sibling) -> bool:
        """Return whether it has done something in between."""
        return self.spent > before.spent


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    command: str
    state: str
    ticks: int
    rank: int | None


def mark_as_waiting() -> None:
    """Have other ranks of this host see that this one waits, as long as the calling thread lives."""
    with contextlib.suppress(OSError):
        (_PROC / f"self/task/{threading.get_native_id()}/comm").write_text(_MARK)


def siblings(variable: str) -> dict[int, Sibling]:
    """Return the living ranks on this host, this one included; nothing where there is no /proc.

    variable: of the environment, in which the launcher tells each rank its number.
    """
    table = _processes(variable)
    launcher = os.getpid()
    while launcher in table and table[launcher].rank is not None:
        launcher = table[launcher].parent
    ranks: defaultdict[int, list[_Process]] = defaultdict(list)
    for process in table.values():
        if process.rank is not None and _descends(process, launcher, table):
            ranks[process.rank].append(process)
    return {rank: _sibling(rank, ranks[rank]) for rank in sorted(ranks)}


def _processes(variable: str) -> dict[int, _Process]:
    """Return this user's living processes by number."""
    found: dict[int, _Process] = {}
    for entry in os.scandir(_PROC) if _PROC.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended, or may not be looked at
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                process = _process(int(entry.name), f"\0{variable}=".encode())
                if process.state not in "ZX":
                    found[process.pid] = process
    return found


def _process(pid: int, entry: bytes) -> _Process:
    folder = _PROC / str(pid)
    head, _, tail = (folder / "stat").read_text(errors="replace").rpartition(")")
    fields = tail.split()
    rank = None
    with contextlib.suppress(OSError):
        value = (b"\0" + (folder / "environ").read_bytes()).partition(entry)[2].partition(b"\0")[0]
        rank = int(value) if value.isdigit() else None
    ticks = int(fields[11]) + int(fields[12])
    return _Process(pid, int(fields[1]), head.partition("(")[2], fields[0], ticks, rank)


def _descends(process: _Process, ancestor: int, table: dict[int, _Process]) -> bool:
    at = process
    while at.parent != ancestor:
        if at.parent not in table:
            return False
        at = table[at.parent]
    return True


def _sibling(rank: int, processes: list[_Process]) -> Sibling:
    """Return what processes with one rank's number are, of which some may have started the others."""
    parents = {process.parent for process in processes}
    inner = [process for process in processes if process.pid not in parents] or processes
    waiting = [process for process in inner if _waits(process.pid)]
    chosen = (waiting or inner)[0]
    ticks, read = sum(process.ticks for process in processes), sum(_bytes_read(process.pid) for process in processes)
    return Sibling(rank, chosen.command, chosen.state in "Tt", bool(waiting), (ticks, read))


def _waits(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return any((task / "comm").read_text().strip() == _MARK for task in (_PROC / str(pid) / "task").iterdir())
    return False


def _bytes_read(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int((_PROC / str(pid) / "io").read_text().partition("read_bytes:")[2].split()[0])
    return 0
