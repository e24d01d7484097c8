"""MPI jobs that stay: ranks that run one case after another, so that a case costs no start of Python, MPI and Numba.

A case is what would be given to `python` on every rank. Each rank of a pool runs it in its own process (see
`pool_job`) and reports its exit status and output as a JSON line over a socket. A case that ends the whole job (an MPI
abort, a signal) needs a job of its own: `launch.mpiexec`.
"""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.mpi import guard
from tests.mpi.launch import ROOT, Done, launcher, launcher_options, run_mark, start

_START_SECONDS = 300.0
_CRASH_SECONDS = 5.0  # for the other ranks, after one has failed in a way that they may not know of


@dataclass
class _Rank:
    """A rank of a pool: its connection, and what has come of its next line."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)

    def take(self) -> dict[str, Any] | None:
        """Read what is there; return the next line, decoded, once it is whole.

        Raises:
            EOFError: the rank has gone.
        """
        data = self.connection.recv(1 << 16)
        if not data:
            raise EOFError
        self.received += data
        line, newline, _ = self.received.partition(b"\n")
        if not newline:
            return None
        self.received.clear()
        found: dict[str, Any] = json.loads(line)
        return found

    def send(self, case: dict[str, Any]) -> None:
        """Have the rank run a case."""
        self.connection.sendall(json.dumps(case).encode() + b"\n")


class Pool:
    """An MPI job of `size` ranks that runs cases."""

    def __init__(self, size: int) -> None:
        self.size, self._mark = size, f"{run_mark()}/pool-{size}"
        self._folder = Path(tempfile.mkdtemp(prefix=guard.folder_prefix()))  # a socket's path has at most 100 bytes
        self._log = self._folder / "log"
        command = [launcher(), *launcher_options(), "-n", str(size)]
        command += [sys.executable, str(ROOT / "tests/mpi/pool_job.py"), str(self._folder / "socket")]
        env = {guard.VARIABLE: self._mark}
        with socket.socket(socket.AF_UNIX) as listener, self._log.open("w") as log:
            listener.bind(str(self._folder / "socket"))
            listener.listen(size)
            self._process = start(command, env, stdout=log, stderr=subprocess.STDOUT)
            self._ranks = self._connect(listener)

    def _connect(self, listener: socket.socket) -> list[_Rank]:
        listener.settimeout(_START_SECONDS)
        found = {}
        try:
            for _ in range(self.size):
                rank = _Rank(listener.accept()[0])
                while (hello := rank.take()) is None:
                    pass
                found[hello["rank"]] = rank
        except (OSError, EOFError) as error:
            self._fail(f"{len(found)} of {self.size} ranks have come up ({error!r})")
        return [found[number] for number in range(self.size)]

    def run(
        self,
        args: Sequence[str],
        timeout: float = 600,
        env: dict[str, str] | None = None,
        check: bool = True,
        stdin: str | None = None,
        folders: Sequence[Path] | None = None,
    ) -> Done:
        """Run `python args` on all ranks; with `check`, a status other than 0 fails the test.

        args: `-m MODULE ...` or a script and its arguments. stdin: what rank 0 reads. folders: each rank's working
        directory; the project's otherwise. Returns the first status other than 0, and all ranks' output in their order.
        """
        for number, rank in enumerate(self._ranks):
            folder = str(folders[number] if folders is not None else ROOT)
            rank.send({"args": list(args), "env": env or {}, "stdin": "" if number else stdin or "", "folder": folder})
        try:
            results = self._results(list(args), timeout)
        except KeyboardInterrupt:
            guard.end_marked(self._mark)  # or closing it would wait for the case to end
            raise
        status = next((result["status"] for result in results if result["status"]), 0)
        out, err = ("".join(result[name] for result in results) for name in ("out", "err"))
        if check and status != 0:
            pytest.fail(f"{args} on {self.size} ranks ended with {status}\n{out}\n{err}")
        return Done(list(args), status, out, err)

    def _results(self, args: list[str], timeout: float) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        end = time.monotonic() + timeout
        while len(found) < self.size:
            waiting = {rank.connection: number for number, rank in enumerate(self._ranks) if number not in found}
            ready = select.select(list(waiting), [], [], max(0.0, end - time.monotonic()))[0]
            if not ready:
                self._fail(f"{args}: ranks {sorted(waiting.values())} of {self.size} do not end\n{_told(found)}")
            for number in (waiting[connection] for connection in ready):
                try:
                    result = self._ranks[number].take()
                except (OSError, EOFError):
                    self._fail(f"{args}: rank {number} of {self.size} has gone\n{_told(found)}")
                if result is not None:
                    found[number] = result
                    if result["crashed"]:
                        end = min(end, time.monotonic() + _CRASH_SECONDS)
        return [found[number] for number in range(self.size)]

    def _fail(self, reason: str) -> None:
        """End this pool, which is of no use any more, and fail the test."""
        guard.end_marked(self._mark)
        log = self._log.read_text()
        self.close()
        pytest.fail(f"{reason}\n{log}")

    def close(self) -> None:
        """Let the ranks leave, and wait for them."""
        _pools.pop(self.size, None)
        for rank in getattr(self, "_ranks", []):
            rank.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_START_SECONDS)
        guard.end_marked(self._mark)
        self._process.wait()
        shutil.rmtree(self._folder)


def _told(found: dict[int, dict[str, Any]]) -> str:
    return "\n".join(f"rank {number} ended with {r['status']}\n{r['out']}{r['err']}" for number, r in found.items())


_pools: dict[int, Pool] = {}


def pool(size: int) -> Pool:
    """Return the pool of so many ranks, started when it is first asked for."""
    if size not in _pools:
        _pools[size] = Pool(size)
    return _pools[size]


def close_pools() -> None:
    """End all pools."""
    for one in list(_pools.values()):
        one.close()
