"""The command launch: what it starts is the same job as by hand, and nobody outlives it."""

from __future__ import annotations

import json
import secrets
import shlex
import signal
import sys
import time

import pytest

from dllama_mpi.parallel.mpiexec import family_of
from tests.mpi import guard
from tests.mpi.launch import has_open_mpi, launcher, mpiexec, run, run_mark, start
from tests.mpi.pool import pool
from tests.mpi.typist import Typist
from tests.tiers import slow

LAUNCH = [sys.executable, "-m", "dllama_mpi", "launch"]
SHORT = ["--prompt", "Return the", "--steps", "5", "--temperature", "0"]
ENDLESS = ["--prompt", "Return the", "--steps", "1000000", "--max-seq-len", "1000000", "--ignore-eos"]
CHAT = ["chat", "--seed", "1", "--ignore-eos", "--max-seq-len", "100000"]
END_SECONDS = 60.0


@pytest.fixture(autouse=True)
def needs_mpi() -> None:
    launcher()


def test_the_same_text_as_by_hand() -> None:
    by_hand = mpiexec(2, ["-m", "dllama_mpi", *SHORT])
    done = run([*LAUNCH, "-n", "2", "--", *SHORT])
    assert done.returncode == 0, done.stderr
    assert done.stdout == by_hand.stdout
    first, *rest = done.stderr.splitlines()
    assert family_of(shlex.split(first)[0]) == family_of(launcher())  # which may be another name of the same program
    assert first.endswith(f" -n 2 {sys.executable} -m dllama_mpi --prompt 'Return the' --steps 5 --temperature 0")
    assert rest == by_hand.stderr.splitlines()


def test_ranks_by_host() -> None:
    done = run([*LAUNCH, "--hosts", "localhost:2", "--", *SHORT, "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 2


def test_the_status_and_the_error_are_the_jobs() -> None:
    done = run([*LAUNCH, "-n", "2", "--", "--model", "/nowhere", "--prompt", "x"])
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_standard_input_is_rank_0s() -> None:
    said = "What is a list?\n/quit\nnever read\n"
    done = run([*LAUNCH, "-n", "2", "--", "chat", "--temperature", "0", "--steps", "5", "--ignore-eos"], stdin=said)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 5
    assert done.stderr.count("> ") == 2


def test_under_mpiexec_it_is_refused_once() -> None:
    done = pool(2).run(["-m", "dllama_mpi", "launch", "-n", "2", "--", "chat"], check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: launch under ")


def until_gone(job: str) -> None:
    """Wait until no process of a job lives."""
    end = time.monotonic() + END_SECONDS
    while left := guard.marked(job):
        assert time.monotonic() < end, f"left: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM), slow(signal.SIGHUP)])
def test_nobody_outlives_the_launcher(number: int) -> None:
    job = f"{run_mark()}/{secrets.token_hex(4)}"
    with start([*LAUNCH, "-n", "2", "--", *ENDLESS], {guard.VARIABLE: job}) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)  # it generates
            assert len(guard.marked(job)) >= 3
            process.send_signal(number)
            process.communicate()
            assert process.returncode != 0
            until_gone(job)
        finally:
            guard.end_marked(job)


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_not_the_chat() -> None:
    typist = Typist([*LAUNCH, "-n", "2", "--", *CHAT], {"TERM": "xterm", "NO_COLOR": "1"})
    typist.until("\x1b[0m>")
    for _ in range(2):  # mpiexec itself would end the job at the second
        typist.type("tell me\r")
        typist.until("tell me")
        typist.until("\n")
        typist.type("\x03/help\r")
        typist.until("/quit")
        typist.until("\x1b[0m>")
    typist.type("/quit\r")
    assert typist.status() == 0


def test_ctrl_c_ends_a_text() -> None:
    job = f"{run_mark()}/{secrets.token_hex(4)}"
    typist = Typist([*LAUNCH, "-n", "2", "--", *ENDLESS], {guard.VARIABLE: job})
    typist.until(" positions")  # said while loading
    typist.until("\n")
    typist.until(" ")  # of the text
    typist.type("\x03")
    # Open MPI's mpirun ends the ranks itself, and says so by a status of its own.
    assert typist.status() == (1 if has_open_mpi() else 130)
    until_gone(job)
