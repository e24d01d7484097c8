"""Running real MPI jobs from tests. No job outlives the test run, whatever ends that: see `guard`."""

from __future__ import annotations

import functools
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import pytest

from dllama_mpi.parallel.mpiexec import OPEN_MPI, family_of
from tests.mpi import guard

ROOT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]


def launcher() -> str:
    """Return the mpiexec that belongs to this Python's environment, else the one on PATH; skip the test without one."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec: pip install 'dllama-mpi[mpich]'")
    return found


@functools.cache
def has_open_mpi() -> bool:
    """Return whether the launcher is Open MPI's and not MPICH's."""
    return family_of(launcher()) == OPEN_MPI


_BANNER = re.compile(r"^-{60,}\n.*?^-{60,}\n", re.MULTILINE | re.DOTALL)


def without_banners(text: str) -> str:
    """Return a job's words without what Open MPI's mpirun says of a status other than 0, between two rules."""
    return _BANNER.sub("", text)


def launcher_options() -> list[str]:
    """Return what Open MPI needs to run more ranks than cores, each with all of them; MPICH needs nothing."""
    if not has_open_mpi():
        return []
    return ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]


@functools.cache
def temporary_folder() -> str:
    """Return where this test run's jobs have their temporary files, MPI included; the guard removes it."""
    return tempfile.mkdtemp(prefix=guard.folder_prefix())  # short: sockets lie there, whose paths have 100 bytes


@functools.cache
def run_mark() -> str:
    """Return the mark of this test run's processes; a guard, started here, ends them when the run is over."""
    above = os.environ.get(guard.VARIABLE)  # of the run that has started this one
    mark = f"{above}/{os.getpid()}" if above else f"{os.getpid()}-{secrets.token_hex(4)}"
    command = [sys.executable, "-S", guard.__file__, mark]
    # The pipe is inherited by nobody: it closes when this process ends, and by nothing else.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    _guards.append(process)
    return mark


_guards: list[subprocess.Popen[bytes]] = []


def dismiss_guard() -> None:
    """Have the guard do its work now, at the end of a run, and wait for it."""
    for process in _guards:
        process.communicate()
    _guards.clear()


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment, marked as this run's and without another launcher's variables.

    The package and the tests are imported from this folder, wherever a script lies and whatever is installed.
    """
    foreign = ("PMI_", "PMIX_", "OMPI_", "SLURM_", "HYDRA_", "MPI_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    own = {"PYTHONPATH": str(ROOT), guard.VARIABLE: run_mark(), "TMPDIR": temporary_folder()}
    return {**kept, **own, **(extra or {})}


def start(
    command: list[str],
    env: dict[str, str] | None = None,
    stdin: int | IO[Any] = subprocess.DEVNULL,
    stdout: int | IO[Any] = subprocess.PIPE,
    stderr: int | IO[Any] = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start a command from the project's folder, in a session of its own."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(env),
        text=True,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def run(command: list[str], timeout: float = 600, env: dict[str, str] | None = None, stdin: str | None = None) -> Done:
    """Run a command from the project's folder; kill it and all it has started when time is up, or at an interrupt.

    What Open MPI's launcher itself says of the end is left out of stderr.
    """
    job = f"{run_mark()}/{secrets.token_hex(4)}"
    given = subprocess.DEVNULL if stdin is None else subprocess.PIPE
    with start(command, {**(env or {}), guard.VARIABLE: job}, given) as process:
        try:
            out, err = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            guard.end_marked(job)
            out, err = process.communicate()
            pytest.fail(f"{command} still ran after {timeout} s\n{out}\n{err}")
        except BaseException:
            guard.end_marked(job)
            raise
    return Done(command, process.returncode, out, without_banners(err))


def mpiexec(
    ranks: int,
    args: list[str],
    timeout: float = 600,
    env: dict[str, str] | None = None,
    check: bool = True,
    stdin: str | None = None,
) -> Done:
    """Run `python args` on this many ranks; with `check`, a status other than 0 fails the test.

    Starting a job takes seconds: `pool` runs the same in ranks that are there already.
    """
    command = [launcher(), *launcher_options(), "-n", str(ranks), sys.executable, *args]
    done = run(command, timeout, env, stdin)
    if check and done.returncode != 0:
        pytest.fail(f"{args} on {ranks} ranks ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
