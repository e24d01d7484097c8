"""A running MPI job whose ranks tests can find, send signals to, and wait for the end of."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.mpi import guard
from tests.mpi.launch import launcher, launcher_options, run_mark, start

RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
PATIENCE = 600.0  # seconds for a job to get where the test wants it, on a busy machine


class Job:
    """A running MPI job, its processes known by a mark in their environment."""

    def __init__(self, ranks: int, args: list[str], folder: Path, beside: Sequence[str] = ()) -> None:
        """Start `python args` on so many ranks and, if given, another command as one more."""
        self.mark = f"{run_mark()}/{uuid.uuid4().hex}"
        self.out, self.err = folder / "out", folder / "err"
        command = [launcher(), *launcher_options(), "-n", str(ranks), sys.executable, *args]
        command += [":", "-n", "1", *beside] if beside else []
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = start(command, {guard.VARIABLE: self.mark}, subprocess.PIPE, out, err)

    def processes(self) -> dict[int, str]:
        """Return the job's living processes: id and rank, "" for a launcher's."""
        found = {}
        for pid in guard.marked(self.mark):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                about = process.environ()
                if process.status() != psutil.STATUS_ZOMBIE:
                    found[pid] = next((about[name] for name in RANKS if name in about), "")
        return found

    def wait_for(self, path: Path, text: str) -> None:
        """Wait until a file has a text in it."""
        end = time.monotonic() + PATIENCE
        while not (path.exists() and text in path.read_text()):
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.02)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to these ranks."""
        ids = [pid for pid, place in self.processes().items() if place in map(str, ranks)]
        assert len(ids) == len(ranks)
        for pid in ids:
            os.kill(pid, number)

    def ends(self) -> str:
        """Wait for the end of the job, all of it; return what stderr says."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None or self.processes():
            assert time.monotonic() < end, (self.processes(), self.err.read_text())
            time.sleep(0.02)
        assert self.process.returncode != 0
        return self.err.read_text()

    def end(self) -> None:
        """Kill what is left."""
        guard.end_marked(self.mark)
        self.process.communicate()
