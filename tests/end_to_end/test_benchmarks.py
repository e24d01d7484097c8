"""Every script of the benchmarks says what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.launch import ROOT
from tests.mpi.pool import pool

LIBRARIES = {"report.py", "soak_requests.py", "twins.py"}
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.name not in LIBRARIES)


@pytest.mark.parametrize("script", [pytest.param(path, id=path.stem) for path in SCRIPTS])
def test_help(script: Path) -> None:
    done = pool(1).run([str(script), "--help"])
    assert done.stdout.startswith(f"usage: {script.name} ")
    assert "--help" in done.stdout
    assert done.stderr == ""


def test_libraries_are_no_scripts() -> None:
    for name in LIBRARIES:
        assert "__main__" not in (ROOT / "benchmarks" / name).read_text()


@pytest.mark.slow
def test_kernels() -> None:
    sizes = "--shape 64x64 --formats q40 --tokens 1 --heads 2x1x32 --depths 64 --attention-tokens 1 --kv-types f16"
    done = pool(1).run([str(ROOT / "benchmarks" / "kernels.py"), *sizes.split(), "--nthreads", "1"])
    assert "matmul q40" in done.stdout
    assert "attention f16 at 64" in done.stdout
