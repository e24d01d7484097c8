"""A test run that is killed leaves nothing behind: no job, no network."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mpi import guard
from tests.mpi.lan import no_lan
from tests.mpi.launch import ROOT, environment, launcher, run_mark, start, temporary_folder
from tests.slurm.cluster import reason_against

PATIENCE = 600.0
RANKS = 2
# A test of the run inside, whose job of two ranks says that it runs and then does so for ever.
RANK = """
import sys, time
from mpi4py import MPI
open(sys.argv[1] + str(MPI.COMM_WORLD.rank), "w").close()
while True:
    time.sleep(1)
"""
INSIDE = """
import time
from pathlib import Path
from tests.mpi.lan import lan
from tests.mpi.launch import mpiexec
from tests.mpi.pool import pool
from tests.server.running import served
from tests.slurm.cluster import cluster

folder = Path({folder!r})
job = [str(folder / "rank.py"), str(folder / "up")]

def test_inside():
{how}
"""
JOBS = {
    "own job": "mpiexec(2, job)",
    "pool": "pool(2).run(job)",
    "idle pool": "pool(2); mpiexec(2, job)",
}
# How else tests start processes, and what else than processes they make.
OTHERS = {
    "server": """
with served(2, "--nthreads", "1"):
    for rank in range(2):
        Path(f"{job[1]}{rank}").touch()
    time.sleep(1000)
""",
    "network": "with lan(2, folder) as hosts: hosts.mpiexec(2, job)",
    "Slurm": """
with cluster(2, folder / "slurm") as hosts:
    script = "#!/bin/sh\\ncase $(hostname) in node0) i=0;; *) i=1;; esac\\n: >%s$i\\nsleep 1000\\n" % job[1]
    (folder / "task").write_text(script)
    (folder / "task").chmod(0o755)
    hosts.submit(folder, "--nodes=2", "--wrap", f"srun -N2 -n2 {folder}/task")
    time.sleep(1000)
""",
}


def need(how: str) -> None:
    """Skip the test where there can be no such job."""
    launcher()
    if how == "network" and (against := no_lan()):
        pytest.skip(against)
    if how == "Slurm" and (against := reason_against()):
        pytest.skip(against)


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@contextlib.contextmanager
def inner_run(how: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a test run whose job has started, and the mark of its processes."""
    need(how)
    (folder / "rank.py").write_text(RANK)
    test = folder / "test_inside.py"
    test.write_text(INSIDE.format(folder=str(folder), how=textwrap.indent({**JOBS, **OTHERS}[how], "    ")))
    mark = f"{run_mark()}/{secrets.token_hex(4)}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    with (folder / "out").open("w") as out:
        process = start([*command, f"--rootdir={ROOT}", str(test)], {guard.VARIABLE: mark}, stdout=out, stderr=out)
    try:
        up = [folder / f"up{rank}" for rank in range(RANKS)]
        wait_until(lambda: process.poll() is not None or all(path.exists() for path in up), "no job")
        assert process.poll() is None, (folder / "out").read_text()
        yield process, mark
    finally:
        guard.end_marked(mark)
        process.communicate()


def shared_memory(mark: str) -> set[Path]:
    """Return the files of shared memory that processes of a run have open; on Linux alone they can be told."""
    found = set()
    for pid in guard.marked(mark):
        with contextlib.suppress(OSError):  # it has ended
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            found |= {Path(line.split(None, 5)[5]) for line in lines if f" {guard.SHARED_MEMORY}/" in line}
    return {path for path in found if path.exists()}


@pytest.mark.slow
@pytest.mark.parametrize("how", JOBS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_jobs_end_with_the_run(number: signal.Signals, how: str, tmp_path: Path) -> None:
    with inner_run(how, tmp_path) as (process, mark):
        assert len(guard.marked(mark)) > RANKS + 1  # the run, the launcher, the ranks
        process.send_signal(number)
        process.wait(PATIENCE)
        wait_until(lambda: not guard.marked(mark), "processes are left")
        left = Path(temporary_folder())
        wait_until(lambda: not list(left.glob(f"{guard.FOLDER}{process.pid}-*")), "folders are left")


@pytest.mark.long
@pytest.mark.parametrize("how", [*JOBS, *OTHERS])
def test_nothing_is_left_of_a_killed_run(how: str, tmp_path: Path) -> None:
    """No process, no network, no folder of temporary files, MPI's included, no shared memory."""
    with inner_run(how, tmp_path) as (process, mark):
        assert len(guard.marked(mark)) > RANKS + 1
        memory, left = shared_memory(mark), Path(temporary_folder())
        assert list(left.glob(f"{guard.FOLDER}{process.pid}-*"))
        assert how != "network" or process.pid in guard.networks().values()
        process.kill()
        process.wait(PATIENCE)
        wait_until(lambda: not guard.marked(mark), "processes are left")
        wait_until(lambda: process.pid not in guard.networks().values(), "networks are left")
        wait_until(lambda: not list(left.glob(f"{guard.FOLDER}{process.pid}-*")), "folders are left")
        wait_until(lambda: not any(path.exists() for path in memory), "shared memory is left")


def test_continuous_integration_ends_what_it_has_started(tmp_path: Path) -> None:
    """The script with something else to do: a process in the background that would stay."""
    before, _, after = (ROOT / ".ci/run").read_text().partition("\nall() {")
    end = after[after.index("\n}\n") :]
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_text(f"{before}\nall() {{\n  sleep 1000 & touch up; sleep 1000{end}")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    mark = f"{run_mark()}/{secrets.token_hex(4)}"
    process = start(["bash", str(script)], {guard.VARIABLE: mark})
    try:
        wait_until((tmp_path / "up").exists, "not up")
        assert len(guard.marked(mark)) > 2
        process.kill()
        process.wait()
        wait_until(lambda: not guard.marked(mark), "processes are left")
    finally:
        guard.end_marked(mark)
        process.communicate()


def test_a_mark_is_that_of_a_run_and_its_jobs_alone() -> None:
    mark = f"{run_mark()}/{secrets.token_hex(4)}"
    others = [mark, f"{mark}/1", f"{mark}1"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "input()"], env=environment({guard.VARIABLE: other}), stdin=subprocess.PIPE
        )
        for other in others
    ]
    try:
        assert sorted(guard.marked(mark)) == sorted(process.pid for process in processes[:2])
        guard.end_marked(mark)
        assert [process.wait(PATIENCE) for process in processes[:2]] == [-signal.SIGKILL] * 2
        assert processes[2].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def dead_process() -> int:
    """Return the id of a process that was and is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.lan
def test_networks_of_dead_runs_are_removed() -> None:
    dead, mine = (f"{guard.NETWORK}{pid}-guard" for pid in (dead_process(), os.getpid()))
    if not shutil.which("ip"):
        pytest.skip("network namespaces need iproute2")
    for name in (dead, mine):
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        assert guard.networks()[mine] == os.getpid()
        guard.remove_networks()
        assert mine in guard.networks()
        assert dead not in guard.networks()
    finally:
        subprocess.run(["ip", "netns", "del", mine], check=True)
