"""The start of a job: ranks that never come, die, stop or are interrupted before the watchdog watches.

What happens at a moment happens at a place in the program, not at a time: a rank does it to itself there.
"""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.mpi.job import Job
from tests.mpi.launch import has_open_mpi
from tests.tiers import all_but, slow

HOST = socket.gethostname().split(".")[0]
RUN = [
    "--nthreads",
    "1",
    "--temperature",
    "0",
    "--prompt",
    "Return the",
    "--steps",
    "100000",
    "--ignore-eos",
    "--max-seq-len",
    "100100",
]
PROGRAM = ["-m", "dllama_mpi"]

# Has a rank do something once it gets to a place: the import of a module of this name, or a call of MPI's.
SCRIPT = """
import os, runpy, signal, sys, time
from importlib.abc import MetaPathFinder

rank = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))

def there():
    if rank in {ranks}:
        {what}

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{place}":
            there()
        return None

sys.meta_path.insert(0, Finder())
if "{place}" == "MPI is up":
    from dllama_mpi.parallel import launch
    world = launch.world
    def arrive():
        comm = world()
        there()
        return comm
    launch.world = arrive
runpy.run_module("dllama_mpi", run_name="__main__", alter_sys=True)
"""
PLACES = ("dllama_mpi.cli", "mpi4py", "MPI is up", "numba", "dllama_mpi.weights.slices")
BEFORE_WATCHDOG = PLACES[:3]


def _script(folder: Path, place: str, what: str, *ranks: int) -> str:
    path = folder / "job.py"
    path.write_text(SCRIPT.format(place=place, what=what, ranks=[str(rank) for rank in ranks]))
    return str(path)


def _told(job: Job) -> str:
    """Return the one line that a job ends with, by one rank or by several at once; launchers may say more."""
    try:
        told = job.ends()
    finally:
        job.end()
    assert "Traceback" not in told
    (said,) = {line for line in told.splitlines() if "error:" in line}
    return said


NEVER = {
    "exit 0": "not running",
    "sleep 1000": "which has not started MPI",
    "kill -STOP $$": "stopped",
}


@pytest.mark.parametrize("command", all_but(["sleep 1000"], NEVER))
def test_a_rank_that_never_comes(command: str, tmp_path: Path) -> None:
    said = _told(Job(1, [*PROGRAM, *RUN, "--timeout", "1"], tmp_path, ["bash", "-c", command]))
    assert said.startswith("error: 1 of 2 ranks came within 1 s (--timeout); missing: rank 1 (")
    assert NEVER[command] in said


COMMANDS = {
    "chat": ["--chat-template", "chatml"],
    "serve": ["--port", "0"],
    "bench": [],
    "batch": ["--input", "none", "--output", "none"],
    "perplexity": ["--file", "none"],
    "plan": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(command: str, tmp_path: Path) -> None:
    arguments = [*PROGRAM, command, *COMMANDS[command], "--timeout", "1"]
    assert "1 of 2 ranks came within 1 s" in _told(Job(1, arguments, tmp_path, ["sleep", "1000"]))


@pytest.mark.slow
def test_python_programs(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("from dllama_mpi import LLM\nLLM('demo', timeout=1)\n")
    assert "1 of 2 ranks came within 1 s" in _told(Job(1, [str(tmp_path / "job.py")], tmp_path, ["sleep", "1000"]))


STOPPED = [(place, ranks, victim) for place in PLACES for ranks, victim in ((2, 1), (3, 0))]


@pytest.mark.parametrize(("place", "ranks", "victim"), all_but([("mpi4py", 2, 1)], STOPPED))
def test_a_stopped_rank(place: str, ranks: int, victim: int, tmp_path: Path) -> None:
    script = _script(tmp_path, place, "os.kill(os.getpid(), signal.SIGSTOP)", victim)
    said = _told(Job(ranks, [script, *RUN, "--timeout", "2"], tmp_path))
    if place in BEFORE_WATCHDOG:
        missing = f"missing: rank {victim} (stopped)"
        assert f"{ranks - 1} of {ranks} ranks came within 2 s (--timeout); {missing}" in said
    else:
        assert f"rank {victim} on {HOST} has been silent for 2 s (loading)" in said


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ["signal.SIGKILL", "signal.SIGINT"])
def test_a_rank_that_a_signal_ends(place: str, what: str, tmp_path: Path) -> None:
    """Time counts where nobody may have seen that the rank was there."""
    script = _script(tmp_path, place, f"os.kill(os.getpid(), {what})", 1)
    job = Job(3, [script, *RUN, "--timeout", "2" if place in BEFORE_WATCHDOG else "0"], tmp_path)
    try:
        told = job.ends()
    finally:
        job.end()
    assert "Traceback" not in told
    assert len({line for line in told.splitlines() if "error:" in line}) <= 1


@pytest.mark.slow
def test_a_rank_that_is_at_work_is_waited_for(tmp_path: Path) -> None:
    """One rank takes much longer than the timeout to come to MPI, but computes."""
    work = "end = time.monotonic() + 10\n        while time.monotonic() < end: pass"
    script = _script(tmp_path, "mpi4py", work, 1)
    job = Job(2, [script, "--prompt", "Return the", "--steps", "3", "--timeout", "4"], tmp_path)
    try:
        assert job.process.wait(600) == 0, job.err.read_text()
    finally:
        job.end()


@pytest.mark.slow
def test_a_start_that_is_suspended_goes_on(tmp_path: Path) -> None:
    """All ranks stop for longer than the timeout, as by Ctrl-Z."""
    script = _script(tmp_path, "mpi4py", f"open('{tmp_path}/came', 'a').write('x'); time.sleep(1)", 0, 1)
    job = Job(2, [script, "--prompt", "Return the", "--steps", "3", "--timeout", "4"], tmp_path)
    try:
        job.wait_for(tmp_path / "came", "xx")
        job.send(signal.SIGSTOP, 0, 1)
        time.sleep(6)
        job.send(signal.SIGCONT, 0, 1)
        assert job.process.wait(600) == 0, job.err.read_text()
    finally:
        job.end()


MOMENTS = [tenths / 10 for tenths in range(30)]


@pytest.mark.parametrize("seconds", all_but([0.3], MOMENTS))
@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_an_interrupt(ranks: int, seconds: float, tmp_path: Path) -> None:
    """Ctrl-C at some moment after Python has begun with the program; the moments fall where the machine has them."""
    script = _script(tmp_path, "dllama_mpi.cli", f"open('{tmp_path}/came', 'a').write('x')", *range(ranks))
    job = Job(ranks, [script, *RUN, "--timeout", "0"], tmp_path)
    try:
        job.wait_for(tmp_path / "came", "x" * ranks)
        time.sleep(seconds)
        job.process.send_signal(signal.SIGINT)
        told = job.ends()
    finally:
        job.end()
    assert told.count("\n") <= 1, told
    if not has_open_mpi():
        assert job.process.returncode == 130, told
