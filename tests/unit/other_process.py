"""Code of the tests in a process of its own, with another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from dllama_mpi.kernels import runtime
from tests.mpi.launch import ROOT


def run_with(
    isa: str, module: str, function: str, python: str = sys.executable, settings: Mapping[str, str] | None = None
) -> str:
    """Call a function of tests.unit with an instruction set in a new process, warnings being errors.

    Returns what it prints. settings: environment variables besides.
    """
    code = (
        f"from tests.unit import {module}; from dllama_mpi.kernels import runtime;"
        f"assert runtime.ISA == {isa!r}, runtime.ISA; {module}.{function}()"
    )
    done = subprocess.run(
        [python, "-W", "error", "-c", code],
        env=os.environ | {runtime.ISA_VARIABLE: isa, "PYTHONPATH": str(ROOT)} | dict(settings or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
