"""What kernels run on: the instruction set, the number of threads, and the shares of parallel regions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from dllama_mpi.errors import UsageError
from dllama_mpi.kernels import runtime
from dllama_mpi.kernels.parallel import run_parallel


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.ISA_VARIABLE, "mmx")
    with pytest.raises(UsageError, match=r"DLLAMA_MPI_ISA=mmx: this processor offers .*generic"):
        runtime.choose_isa()
    for isa in runtime.host_isas():
        monkeypatch.setenv(runtime.ISA_VARIABLE, isa)
        assert runtime.choose_isa() == isa
    monkeypatch.delenv(runtime.ISA_VARIABLE)
    assert runtime.choose_isa() == runtime.host_isas()[0]


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_a_number_of_threads_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=rf"--nthreads {count}: this rank may use \d+ cores; give 1 to \d+"):
        runtime.set_threads(count)


# --------------------------------------------------------------------------------------------------------------------
# Parallel regions
# --------------------------------------------------------------------------------------------------------------------


@njit
def _note_share(numbers: Any, pair: Any, factor: Any, thread: Any, threads: Any) -> None:
    """Write to a thread's own place what it has been given."""
    numbers[thread] = factor * (100 * threads + thread) + pair[0][thread] + pair[1]


@njit
def _note(numbers: Any, pair: Any, factor: Any, threads: Any) -> None:
    run_parallel(_note_share, (numbers, pair, factor), threads)  # type: ignore[call-arg]  # an intrinsic


@pytest.mark.parametrize("threads", [1, 2, 3, 20])
def test_every_share_is_done_once(threads: int) -> None:
    """More shares than threads of the pool are done all the same; arguments come through as they are."""
    numbers, offsets = np.zeros(threads + 1), np.arange(threads, dtype=np.int32)
    for turn in range(1, 4):
        _note(numbers, (offsets, 7), 0.5, threads)
        expected = 0.5 * (100 * threads + np.arange(threads)) + np.arange(threads) + 7
        np.testing.assert_array_equal(numbers[:-1], expected, err_msg=f"turn {turn}")
        assert numbers[-1] == 0
        numbers[:] = 0
