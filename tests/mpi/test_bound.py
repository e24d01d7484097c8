"""Open MPI's mpirun binds a rank to one core unless told otherwise; where cores are idle so, that is said."""

from __future__ import annotations

import os
import sys

import pytest

from dllama_mpi.kernels.runtime import usable_cores
from tests.mpi.launch import has_open_mpi, launcher, run

GENERATE = ["-m", "dllama_mpi", "--prompt", "Return the", "--steps", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "given", "is_said"),
    [([], [], True), ([], ["--nthreads", "1"], False), (["--bind-to", "none"], [], False)],
)
def test_one_rank_on_one_of_several_cores(bound: list[str], given: list[str], is_said: bool) -> None:
    if not has_open_mpi():
        pytest.skip("MPICH's mpiexec binds no rank unless told to")
    cores = len(usable_cores())
    if cores < 2:
        pytest.skip("one core alone")
    command = [launcher(), *bound, *(["--allow-run-as-root"] if os.getuid() == 0 else []), "-n", "1", sys.executable]
    done = run([*command, *GENERATE, *given])
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "--bind-to none" in line]
    assert len(said) == is_said
    assert all(f" of the {cores} cores of " in line for line in said)
