"""Calls between compiled functions, in a first process and in those that find some of them in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.mpi.launch import ROOT
from tests.unit import compiled_functions

WRITTEN = {"first": 7, "second": 70, "third": 700}


def run(cache: Path, *functions: str) -> list[str]:
    """Return what a process of its own prints."""
    command = [sys.executable, "-m", "tests.unit.compiled_functions", *functions]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "first", "second")], ids=str)
def test_what_is_called_is_found_from_the_cache(order: tuple[str, ...], tmp_path: Path) -> None:
    """Also where a new function copies a cached one that calls another where it lies."""
    for name in order:
        assert run(tmp_path, name) == [str([WRITTEN[name]] * 3)]
    assert run(tmp_path, *WRITTEN) == [str([value] * 3) for value in WRITTEN.values()]


def test_python_may_call_what_has_no_wrapper() -> None:
    numbers = np.arange(3.0)
    compiled_functions.middle(numbers, 2)
    np.testing.assert_array_equal(numbers, [2, 3, 4])


def test_one_of_several_processes_compiles(tmp_path: Path) -> None:
    """The others wait, and load what it has made."""
    code = """
import numpy as np
from tests.unit.compiled_functions import third
third(np.zeros(3), 7)
print(sum(third.stats.cache_misses.values()), sum(third.stats.cache_hits.values()))
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    assert sorted(process.communicate()[0] for process in processes) == [b"0 1\n", b"0 1\n", b"1 0\n"]


def test_without_room_to_keep_them_functions_are_compiled_all_the_same(tmp_path: Path) -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
import numpy as np
from tests.unit.compiled_functions import third
numbers = np.zeros(3)
third(numbers, 7)
print(numbers.tolist())
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[700.0, 700.0, 700.0]\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: compiled kernels cannot be kept in {tmp_path}/")
    assert line.endswith(": File too large")
