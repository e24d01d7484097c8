"""A test run that is killed leaves nothing behind: no job, no network."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mpi import guard
from tests.mpi.launch import ROOT, environment, launcher, run_mark, start, temporary_folder
from tests.tiers import all_but

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
from tests.mpi.launch import mpiexec
from tests.mpi.pool import pool

def test_inside():
    {how}
"""
WAYS = {
    "own job": 'mpiexec({ranks}, ["{folder}/rank.py", "{folder}/up"])',
    "pool": 'pool({ranks}).run(["{folder}/rank.py", "{folder}/up"])',
    "idle pool": 'pool({ranks}); mpiexec({ranks}, ["{folder}/rank.py", "{folder}/up"])',
}


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@contextlib.contextmanager
def inner_run(how: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a test run whose job has started, and the mark of its processes."""
    launcher()
    (folder / "rank.py").write_text(RANK)
    test = folder / "test_inside.py"
    test.write_text(INSIDE.format(how=WAYS[how].format(ranks=RANKS, folder=folder)))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "how"),
    all_but(
        [(signal.SIGKILL, "own job"), (signal.SIGTERM, "pool")],
        [(number, how) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL) for how in WAYS],
    ),
)
def test_jobs_end_with_the_run(number: signal.Signals, how: str, tmp_path: Path) -> None:
    with inner_run(how, tmp_path) as (process, mark):
        assert len(guard.marked(mark)) > RANKS + 1  # the run, the launcher, the ranks
        process.send_signal(number)
        process.wait(PATIENCE)
        wait_until(lambda: not guard.marked(mark), "processes are left")
        left = Path(temporary_folder())
        wait_until(lambda: not list(left.glob(f"{guard.FOLDER}{process.pid}-*")), "folders are left")


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
