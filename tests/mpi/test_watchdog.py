"""Nothing hangs: a rank that is killed, stopped or slow, at any moment, on two and three ranks.

Each test has a job of its own. What must not happen in time is made impossible instead of being timed: where a death
has to be noticed, silence is never counted.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mpi.job import PATIENCE, Job
from tests.mpi.pool import pool
from tests.tiers import all_but

HOST = socket.gethostname().split(".")[0]
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
