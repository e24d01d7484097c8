"""The benchmark of scaling over test hosts: what it writes agrees, and a prediction stands beside each measurement."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.mpi.launch import ROOT, has_open_mpi, run

pytestmark = [pytest.mark.slow, pytest.mark.lan]
SCRIPT = ROOT / "benchmarks" / "lan_scaling.py"


def test_table_figures_and_picture(tmp_path: Path) -> None:
    if has_open_mpi():
        pytest.skip("the hosts are started by MPICH's mpiexec")
    if not sys.platform.startswith("linux") or os.getuid() != 0 or not shutil.which("tc"):
        pytest.skip("network namespaces need Linux, root and iproute2")
    has_pictures = importlib.util.find_spec("matplotlib") is not None
    shutil.copy(SCRIPT.with_name("RESULTS.md"), tmp_path)
    lengths = "--model demo --ranks 1,2 --links 1000 -p 16 -n 4 -r 1"
    written = ["--write", str(tmp_path)] if has_pictures else []
    done = run([sys.executable, str(SCRIPT), *lengths.split(), *written, "--json", str(tmp_path / "f.json")], 1200)
    if done.returncode == 2 and "RTNETLINK" in done.stderr:
        pytest.skip(f"network namespaces cannot be made here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures == json.loads(done.stdout.splitlines()[-1])
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    assert [row[:2] for row in rows] == [["1", "-"], ["2", "1000 Mbit/s"]]
    for row, record in zip(rows, figures["records"], strict=True):
        for phase, cells in (("decode", row[2:5]), ("prefill", row[5:8])):
            assert cells[0].startswith(f"{record[phase]['tokens_per_second']:.1f} (")
            assert cells[1] == f"{record[phase]['predicted']:.1f}"
            assert record[phase]["predicted"] > 0
    sent, least = (figures["records"][1][key] for key in ("decode_sent_kb_per_token", "least_kb_per_token"))
    assert sent >= least > 0
    if has_pictures:
        table = "\n".join(done.stdout.splitlines()[:-1])
        assert table.strip() in (tmp_path / "RESULTS.md").read_text()
        assert json.loads((tmp_path / "results" / "lan_scaling.json").read_text()) == figures
        assert (tmp_path / "results" / "lan_scaling.png").read_bytes().startswith(b"\x89PNG")
