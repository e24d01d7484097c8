"""Running real MPI jobs from tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def launcher() -> str:
    """Return the mpiexec that belongs to this Python's environment, else the one on PATH; skip the test without one."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec: pip install 'dllama-mpi[mpich]'")
    return found


def launcher_options() -> list[str]:
    """Return what Open MPI needs to run more ranks than cores, each with all of them; MPICH needs nothing."""
    about = subprocess.run([launcher(), "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" not in about and "prte" not in about.lower():
        return []
    return ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without another launcher's variables."""
    foreign = ("PMI_", "PMIX_", "OMPI_", "SLURM_", "HYDRA_", "MPI_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return {**kept, **(extra or {})}


def run(
    command: list[str], timeout: float = 120, env: dict[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command from the project's folder; kill it and all its children when time is up."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(env),
        text=True,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} still ran after {timeout} s\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def mpiexec(
    ranks: int,
    args: list[str],
    timeout: float = 120,
    env: dict[str, str] | None = None,
    check: bool = True,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python args` on this many ranks; with `check`, a status other than 0 fails the test."""
    command = [launcher(), *launcher_options(), "-n", str(ranks), sys.executable, *args]
    done = run(command, timeout, env, stdin)
    if check and done.returncode != 0:
        pytest.fail(f"{args} on {ranks} ranks ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
