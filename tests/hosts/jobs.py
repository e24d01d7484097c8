"""One job whose ranks are started in different ways."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from tests.hosts.emulated import ENVIRONMENT
from tests.mpi.launch import ROOT, Done, launcher, launcher_options, run

HERE = (sys.executable,)
"""What a rank is that is started as all others: see `job`."""


def job(ranks: Sequence[Sequence[str]], args: Sequence[str], timeout: float = 600) -> Done:
    """Run `python args` as one job: each of `ranks` is options of mpiexec, what starts its python, and that python.

    The environment is one in which ranks may be emulated.
    """
    command = [launcher(), *launcher_options()]
    for i, start in enumerate(ranks):
        command += [*([":"] if i else []), "-n", "1", *start, *args]
    return run(command, timeout, ENVIRONMENT)


def text(ranks: Sequence[Sequence[str]], *options: str, timeout: float = 1800) -> str:
    """Return what a job writes of the demo model's likeliest text."""
    args = ["-m", "dllama_mpi", "--prompt", "This module provides", "--steps", "20", "--temperature", "0"]
    done = job(ranks, [*args, "--sync", "direct", "--timeout", str(timeout), *options], timeout)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20
    return done.stdout


def offered() -> list[str]:
    """Return the instruction sets of this processor, as a process without restrictions finds them."""
    code = "from dllama_mpi.kernels import runtime; print(*runtime.host_isas())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()
