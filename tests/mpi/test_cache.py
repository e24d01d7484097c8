"""The cache of compiled kernels: many ranks may fill it at once, and it may be missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.launch import mpiexec

pytestmark = pytest.mark.slow  # kernels are compiled anew
GREEDY = ["-m", "dllama_mpi", "--prompt", "Return the", "--steps", "8", "--temperature", "0", "--nthreads", "1"]


def test_ranks_fill_an_empty_cache_at_once(tmp_path: Path) -> None:
    """Two ranks compile the same kernels at the same time, and the next job finds them whole."""
    cold = {"XDG_CACHE_HOME": str(tmp_path)}
    first = mpiexec(2, GREEDY, 600, cold)
    assert first.stderr.count("compiling kernels") == 1
    kept = sorted(path.name for path in tmp_path.rglob("*.nb?"))
    assert kept
    second = mpiexec(2, GREEDY, 600, cold)
    assert second.stdout == first.stdout == mpiexec(2, GREEDY).stdout
    assert second.stderr == ""
    assert sorted(path.name for path in tmp_path.rglob("*.nb?")) == kept


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    """Without a place to keep kernels they go to the temporary folder, and nothing alarming is said."""
    (tmp_path / "file").write_text("")
    blocked = {"XDG_CACHE_HOME": str(tmp_path / "file"), "HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = mpiexec(1, GREEDY, 600, blocked)
    assert done.stdout == mpiexec(1, GREEDY).stdout
    assert [line for line in done.stderr.splitlines() if not line.startswith("compiling kernels")] == []
    assert list(tmp_path.rglob("*.nbi"))
