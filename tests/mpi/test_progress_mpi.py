"""Progress and energy through a real launcher: a bar on its terminal, lines in its file, a host's joules."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.mpi.launch import ROOT, launcher, launcher_options, mpiexec
from tests.mpi.typist import Typist
from tests.unit.test_energy import RAILS, write_vcgencmd

JOB = str(ROOT / "tests/mpi/progress_job.py")


@pytest.mark.slow
def test_a_bar_comes_through_to_the_launchers_terminal() -> None:
    command = [launcher(), *launcher_options(), "-n", "2", sys.executable, JOB, "bar"]
    typist = Typist(command, {"TERM": "xterm"})
    typist.until("loading [######..................] 25%, 250 of 1,000 tensors", 120)
    typist.type("\n")
    assert typist.status(120) == 0
    assert "\r\x1b[K" in typist.seen
    assert "done" in typist.seen


@pytest.mark.slow
def test_lines_without_a_terminal() -> None:
    done = mpiexec(2, [JOB, "lines"], timeout=120)
    assert done.stdout.split() == ["done"]
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("loading: 25%, 250 of 1,000 tensors, ") for line in lines)
    assert "\r" not in done.stderr


@pytest.mark.slow
def test_joules_of_a_host(tmp_path: Path) -> None:
    write_vcgencmd(tmp_path / "bin", RAILS)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    generate = ["--prompt", "This module provides", "--steps", "20", "--ignore-eos", "--json", "--stats"]
    done = mpiexec(2, ["-m", "dllama_mpi", *generate], env=env)
    stats = json.loads(done.stdout)["stats"]
    assert stats["metered_hosts"] == 1
    for phase in ("prefill", "decode"):
        assert stats[phase]["joules"] == pytest.approx(stats[phase]["joules_per_token"] * stats[phase]["tokens"])
    assert stats["prefill"]["joules"] + stats["decode"]["joules"] > 0
    assert "energy: prompt " in done.stderr
    bench = ["bench", "-p", "8", "-n", "8", "-r", "2"]
    done = mpiexec(2, ["-m", "dllama_mpi", *bench], env=env)
    assert "J/t" in done.stdout.splitlines()[2]
    assert "bench: 2 tests of 2 repetitions on 2 ranks, " in done.stderr
