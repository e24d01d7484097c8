"""The command line of `emulated`, as far as it fetches nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import emulated


def said(*args: str) -> tuple[int, str]:
    """Return the exit status of the program with these arguments, and what it says on stderr."""
    done = subprocess.run([sys.executable, emulated.__file__, *args], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("args", [(), ("fly",), ("run",), ("run", "pi4,pi5"), ("python",), ("mpiexec",)], ids=str)
def test_usage(args: tuple[str, ...]) -> None:
    status, text = said(*args)
    assert status == 2
    assert "usage: emulated.py setup" in text


def test_unknown_boards() -> None:
    assert said("run", "here") == (2, "error: here: there are pi4, pi5\n")
    assert said("mpiexec", "here,pi3", "-m", "x") == (2, "error: pi3: there are pi4, pi5, here\n")


def test_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "mpi_version", lambda: "5.0.1")
    wanted = emulated.requirements()
    assert "mpich==5.0.1" in wanted
    assert {name.partition(">")[0] for name in wanted} >= {"mpi4py", "numpy", "numba", "tokenizers", "psutil", "pytest"}
    assert not any(";" in name for name in wanted)


def test_ranks_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "mpi_version", lambda: "5.0.1")
    monkeypatch.setenv(emulated.VARIABLE, "/somewhere")
    pi, own = "/somewhere/environment/bin/python-pi4", sys.executable
    assert emulated.python("pi4") == Path(pi)
    line = emulated.mpiexec_line(["here", "pi4"], ["-m", "x"])
    assert line[1:] == ["-n", "1", own, "-m", "x", ":", "-n", "1", pi, "-m", "x"]


def test_another_kind_of_computer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(emulated.UnavailableError, match=r"for Linux on x86_64, this is .* on riscv64"):
        emulated.setup()
