"""Nothing hangs: a rank that is killed, stopped or slow, at any moment, on two and three ranks."""

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

from tests.mpi.launch import ROOT, environment, launcher, launcher_options, mpiexec

HOST = socket.gethostname().split(".")[0]
MARK = "DLLAMA_MPI_TEST_JOB"
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
PATIENCE = 60.0  # seconds for a job to get where the test wants it, on a busy machine
LONG = ["--nthreads", "1", "--temperature", "0", "--prompt", "Return the", "--steps", "400", "--ignore-eos"]
CHAT = ["chat", "--nthreads", "1", "--temperature", "0", "--chat-template", "chatml"]
# What makes a phase last long enough to be hit by a test.
SLOW = {
    "loading": """
import time
from dllama_mpi.engine import llm
def slow(*args):
    open("{folder}/loading", "a").write("x")
    time.sleep(100)
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
        self.mark, self.size = uuid.uuid4().hex, ranks
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [launcher(), *launcher_options(), "-n", str(ranks), sys.executable, *args],
                cwd=ROOT,
                env=environment({MARK: self.mark}),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def processes(self) -> dict[int, str]:
        """Return the job's living processes: id and rank, "" for a launcher's."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                about = process.environ()
                if about.get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = next((about[name] for name in RANKS if name in about), "")
        return found

    def wait_for(self, path: Path, text: str) -> None:
        """Wait until a file has a text in it."""
        end = time.monotonic() + PATIENCE
        while not (path.exists() and text in path.read_text()):
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.02)

    def send(self, number: signal.Signals, *ranks: int) -> float:
        """Send a signal to these ranks and return the time of it."""
        ids = [pid for pid, place in self.processes().items() if place in map(str, ranks)]
        assert len(ids) == len(ranks)
        for pid in ids:
            os.kill(pid, number)
        return time.monotonic()

    def ends(self, since: float, limit: float) -> str:
        """Wait for the end of the job, all of it, within `limit` seconds of `since`; return what stderr says."""
        while self.process.poll() is None or self.processes():
            assert time.monotonic() - since < limit, (self.processes(), self.err.read_text())
            time.sleep(0.02)
        assert self.process.returncode != 0
        return self.err.read_text()

    def end(self) -> None:
        """Kill what is left."""
        for pid in (self.process.pid, *self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@contextlib.contextmanager
def running(ranks: int, phase: str, folder: Path, timeout: float = 30) -> Iterator[Job]:
    """A job in the middle of loading, of decoding, or waiting for a line to be typed."""
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


@pytest.mark.parametrize("phase", ["loading", "decode", "idle"])
@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (3, 2)])
def test_a_killed_rank(ranks: int, victim: int, phase: str, tmp_path: Path) -> None:
    with running(ranks, phase, tmp_path) as job:
        told = job.ends(job.send(signal.SIGKILL, victim), 5)
    launchers = "signal 9" in job.out.read_text() + told  # which may end the rest before they can say a word
    assert launchers or f"error: rank {victim} on {HOST} has died (" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("phase", "ranks", "victim"),
    [("loading", 2, 1), ("loading", 3, 0), ("decode", 2, 0), ("decode", 3, 2), ("idle", 2, 1), ("idle", 3, 0)],
)
def test_a_stopped_rank(phase: str, ranks: int, victim: int, tmp_path: Path) -> None:
    with running(ranks, phase, tmp_path, 2) as job:
        stopped = job.send(signal.SIGSTOP, victim)
        told = job.ends(stopped, 2 + 5)
    assert f"error: rank {victim} on {HOST} has been silent for 2 s (" in told
    assert phase in told
    assert told.count("error:") == 1


def test_a_stop_shorter_than_the_timeout(tmp_path: Path) -> None:
    """Each rank in turn stands still for a while, in the middle of an answer, and the text is what it would be."""
    with running(2, "decode", tmp_path, 4) as job:
        for rank in (0, 1):
            job.send(signal.SIGSTOP, rank)
            time.sleep(1)
            job.send(signal.SIGCONT, rank)
        assert job.process.wait(PATIENCE) == 0, job.err.read_text()
    assert job.err.read_text() == ""
    assert job.out.read_text() == mpiexec(2, ["-m", "dllama_mpi", *LONG]).stdout


def test_everybody_stopped_for_longer_than_the_timeout(tmp_path: Path) -> None:
    """A job that is suspended as a whole, as by Ctrl-Z, goes on when it is continued."""
    with running(2, "idle", tmp_path, 2) as job:
        job.send(signal.SIGSTOP, 0, 1)
        time.sleep(3.5)
        job.send(signal.SIGCONT, 0, 1)
        time.sleep(2.5)
        job.process.communicate(b"/quit\n", PATIENCE)
        assert job.process.returncode == 0, job.err.read_text()
