"""All-reduce: every algorithm, payload, size and rank count, bit for bit as numpy does it on every rank."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from dllama_mpi.parallel.collective.all_reduce import SYNCS
from dllama_mpi.parallel.collective.payload import PAYLOADS
from tests.mpi.launch import ROOT, mpiexec


@functools.cache
def results(ranks: int, calls: str) -> list[dict[str, Any]]:
    """Run all cases once for each rank count and way to call MPI."""
    env = {"PYTHONPATH": str(ROOT), "DLLAMA_MPI_CALLS": calls}
    done = mpiexec(ranks, [str(ROOT / "tests/mpi/all_reduce_job.py")], 300, env)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("way", SYNCS[1:])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_sums(ranks: int, way: str, payload: str) -> None:
    cases = [case for case in results(ranks, "") if (case["way"], case["payload"]) == (way, payload)]
    refused = [case for case in cases if "refused" in case]
    tried = [case for case in cases if "refused" not in case]
    if way == "mpi" and payload != "f32":
        assert not tried
    elif way == "shared":
        assert {len(set(case["homes"])) for case in tried} == {1}
        assert all("do not share memory" in case["refused"] for case in refused)
    else:
        assert not refused
    for case in tried:
        assert not any(case["wrong"]), case


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_through_mpi4py(ranks: int) -> None:
    tried = [case for case in results(ranks, "python") if "refused" not in case]
    assert {case["way"] for case in tried} == {"direct", "scatter", "mpi"}
    for case in tried:
        assert not any(case["wrong"]), case


@pytest.mark.parametrize(("way", "payload"), [("direct", "q80"), ("scatter", "f32"), ("doubling", "f16")])
@pytest.mark.parametrize("ranks", [2, 3])
def test_overlap(ranks: int, way: str, payload: str) -> None:
    """A prompt gives the same bits whether its halves overlap or not."""
    done = mpiexec(ranks, [str(ROOT / "tests/mpi/overlap_job.py"), way, payload], env={"PYTHONPATH": str(ROOT)})
    found = json.loads(done.stdout)
    assert found["parts"] == [0, 50, 100]
    assert found["same"]
