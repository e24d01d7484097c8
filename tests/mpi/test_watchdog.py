"""Nothing hangs: a rank that is killed, stopped or slow, at any moment, on two and three ranks.

Each test has a job of its own. What must not happen in time is made impossible instead of being timed: where a death
has to be noticed, silence is never counted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.mpi import guard
from tests.mpi.launch import launcher, launcher_options, run_mark, start
from tests.mpi.pool import pool
from tests.tiers import all_but

HOST = socket.gethostname().split(".")[0]
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
PATIENCE = 600.0  # seconds for a job to get where the test wants it, on a busy machine
LONG = ["--nthreads", "1", "--temperature", "0", "--prompt", "Return the", "--steps", "400", "--ignore-eos"]
CHAT = ["chat", "--nthreads", "1", "--temperature", "0", "--chat-template", "chatml"]
# What makes a phase last long enough to be hit by a test.
SLOW = {
    "loading": """
import time
from dllama_mpi.engine import llm
def slow(*args):
    open("{folder}/loading", "a").write("x")
    time.sleep(1000)
llm.Transformer = slow
""",
    "decode": """
import time
from dllama_mpi.engine.runner import Runner
step = Runner.step
def slow(*args):
    time.sleep(0.02)
    return step(*args)
Runner.step = slow
""",
    "idle": "",
}


class Job:
    """A running MPI job, its processes known by a mark in their environment."""

    def __init__(self, ranks: int, args: list[str], folder: Path) -> None:
        self.mark = f"{run_mark()}/{uuid.uuid4().hex}"
        self.out, self.err = folder / "out", folder / "err"
        command = [launcher(), *launcher_options(), "-n", str(ranks), sys.executable, *args]
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


@contextlib.contextmanager
def running(ranks: int, phase: str, folder: Path, timeout: float) -> Iterator[Job]:
    """Yield a job in the middle of loading, of decoding, or waiting for a line to be typed."""
    script = folder / "job.py"
    script.write_text(
        SLOW[phase].format(folder=str(folder)) + "import sys\nfrom dllama_mpi import cli\nsys.exit(cli.main())\n"
    )
    job = Job(ranks, [str(script), *(CHAT if phase == "idle" else LONG), "--timeout", str(timeout)], folder)
    try:
        if phase == "loading":
            job.wait_for(folder / "loading", "x" * ranks)
        elif phase == "decode":
            job.wait_for(job.out, "\n\n")  # some way into the text
        else:
            job.wait_for(job.err, "> ")
        yield job
    finally:
        job.end()


KILLED = [(phase, ranks, victim) for ranks, victim in ((2, 0), (3, 2)) for phase in SLOW]
STOPPED = [("loading", 2, 1), ("loading", 3, 0), ("decode", 2, 0), ("decode", 3, 2), ("idle", 2, 1), ("idle", 3, 0)]


@pytest.mark.parametrize(("phase", "ranks", "victim"), all_but([("decode", 3, 2)], KILLED))
def test_a_killed_rank(phase: str, ranks: int, victim: int, tmp_path: Path) -> None:
    with running(ranks, phase, tmp_path, 0) as job:
        job.send(signal.SIGKILL, victim)
        told = job.ends()
    launchers = "signal 9" in job.out.read_text() + told  # which may end the rest before they can say a word
    assert launchers or f"error: rank {victim} on {HOST} has died (" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("phase", "ranks", "victim"), all_but([("decode", 2, 0)], STOPPED))
def test_a_stopped_rank(phase: str, ranks: int, victim: int, tmp_path: Path) -> None:
    with running(ranks, phase, tmp_path, 2) as job:
        job.send(signal.SIGSTOP, victim)
        told = job.ends()
    assert f"error: rank {victim} on {HOST} has been silent for 2 s (" in told
    assert phase in told
    assert told.count("error:") == 1


@pytest.mark.slow
def test_a_stop_shorter_than_the_timeout(tmp_path: Path) -> None:
    """Each rank in turn stands still for a while, in the middle of an answer, and the text is what it would be."""
    with running(2, "decode", tmp_path, 10) as job:
        for rank in (0, 1):
            job.send(signal.SIGSTOP, rank)
            time.sleep(1)
            job.send(signal.SIGCONT, rank)
        assert job.process.wait(PATIENCE) == 0, job.err.read_text()
    assert job.err.read_text() == ""
    assert job.out.read_text() == pool(2).run(["-m", "dllama_mpi", *LONG]).stdout


@pytest.mark.slow
def test_everybody_stopped_for_longer_than_the_timeout(tmp_path: Path) -> None:
    """A job that is suspended as a whole, as by Ctrl-Z, goes on when it is continued."""
    with running(2, "idle", tmp_path, 2) as job:
        job.send(signal.SIGSTOP, 0, 1)
        time.sleep(3.5)
        job.send(signal.SIGCONT, 0, 1)
        time.sleep(2.5)
        job.process.communicate("/quit\n", PATIENCE)
        assert job.process.returncode == 0, job.err.read_text()
