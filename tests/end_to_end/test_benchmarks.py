"""Every script of the benchmarks says what it takes."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mpi.launch import ROOT, run
from tests.mpi.pool import pool

LIBRARIES = {"lan.py", "marked.py", "report.py", "soak_requests.py", "twins.py"}
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


@pytest.mark.long
def test_kernels() -> None:
    sizes = "--shape 64x64 --formats q40 --tokens 1 --heads 2x1x32 --depths 64 --attention-tokens 1 --kv-types f16"
    done = pool(1).run([str(ROOT / "benchmarks" / "kernels.py"), *sizes.split(), "--nthreads", "1"])
    assert "matmul q40" in done.stdout
    assert "attention f16 at 64" in done.stdout


@pytest.mark.parametrize(
    ("megabytes_an_hour", "trouble"), [(15, []), (30, ["rank 0's memory grows by 30.0 MB an hour"])]
)
def test_a_leak_is_found(megabytes_an_hour: int, trouble: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour in which a rank of 300 MB grows steadily."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    soak: Any = importlib.import_module("soak")
    memory = [int(1e6 * (300 + megabytes_an_hour * i / 240)) for i in range(241)]
    samples = [soak.Sample(15.0 * i, 0, [each], [30], [5]) for i, each in enumerate(memory)]
    tally = soak.Tally()
    soak.verdict([soak.growth(samples, 0)], argparse.Namespace(most_slope=20.0, most_growth=3.0), tally)
    assert list(tally.trouble) == trouble


@pytest.mark.long
def test_soak(tmp_path: Path) -> None:
    options = ["--minutes", "0.4", "--clients", "4", "--most-growth", "25"]
    done = run([sys.executable, str(ROOT / "benchmarks" / "soak.py"), *options, "--json", str(tmp_path / "figures")])
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures["trouble"] == {}
    assert sum(figures["asked"].values()) > 4 * len(figures["asked"])
    assert figures["batches"]["whole"] > 0
    assert len(figures["ranks"]) == 3
