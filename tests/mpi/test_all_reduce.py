"""All-reduce: every algorithm, payload, size and rank count, bit for bit as numpy does it on every rank."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from dllama_mpi.parallel.collective.memory import all_reduce_bytes
from dllama_mpi.parallel.collective.table import PAYLOADS, SYNCS
from dllama_mpi.parallel.group import TensorParallelGroup
from tests.mpi.launch import ROOT
from tests.mpi.pool import pool
from tests.tiny_dense import DENSE_CASES
from tests.tiny_models.files import write_model

slow = pytest.mark.slow


@functools.cache
def results(ranks: int, calls: str) -> list[dict[str, Any]]:
    """Run all cases once for each rank count and manner of calling MPI."""
    done = pool(ranks).run([str(ROOT / "tests/mpi/all_reduce_job.py")], env={"DLLAMA_MPI_CALLS": calls})
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("algorithm", SYNCS[1:])
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=slow), pytest.param(4, marks=pytest.mark.long)])
def test_sums(ranks: int, algorithm: str, payload: str) -> None:
    cases = [case for case in results(ranks, "") if (case["algorithm"], case["payload"]) == (algorithm, payload)]
    refused = [case for case in cases if "refused" in case]
    tried = [case for case in cases if "refused" not in case]
    if (algorithm == "mpi" and payload != "f32") or (algorithm == "doubling" and payload == "q40"):
        assert not tried
    elif algorithm == "shared":
        assert {len(set(case["homes"])) for case in tried} == {1}
        assert all("do not share memory" in case["refused"] for case in refused)
    else:
        assert not refused
    for case in tried:
        assert not any(case["wrong"]), case


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=slow), pytest.param(3, marks=slow)])
def test_sums_through_mpi4py(ranks: int) -> None:
    tried = [case for case in results(ranks, "python") if "refused" not in case]
    assert {case["algorithm"] for case in tried} == {"direct", "scatter", "mpi"}
    for case in tried:
        assert not any(case["wrong"]), case


@pytest.mark.parametrize(
    ("algorithm", "payload", "model"),
    [
        ("direct", "q80", "demo"),
        ("scatter", "f32", "demo"),
        ("doubling", "f16", "demo"),
        ("direct", "q80", "olmo2"),
        ("direct", "q40", "demo"),
    ],
)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=slow)])
def test_overlap(ranks: int, algorithm: str, payload: str, model: str, tmp_path: Path) -> None:
    """A prompt gives the same bits whether its halves overlap or not; OLMo 2's attention has a sum of its own."""
    folder = model if model == "demo" else str(write_model(DENSE_CASES[model], tmp_path))
    done = pool(ranks).run([str(ROOT / "tests/mpi/overlap_job.py"), algorithm, payload, folder])
    found = json.loads(done.stdout)
    assert found["parts"] == [0, 40, 80]
    assert found["same"]


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=slow) for ranks in (3, 4, 8))])
def test_predicted_bytes(ranks: int) -> None:
    """What is allocated is what planning and the check of memory are told, within 2 %, in every layout of hosts."""
    done = pool(ranks).run([str(ROOT / "tests/mpi/all_reduce_bytes_job.py")])
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert {case["payload"] for case in cases} == set(PAYLOADS)
    for case in cases:
        for allocated, predicted in case["bytes"]:
            assert allocated == pytest.approx(predicted, rel=0.02), case


def test_predicted_bytes_of_one_rank() -> None:
    values = TensorParallelGroup(None).prepare_all_reduce(256, 1024, None, "auto")
    assert values.nbytes == all_reduce_bytes(1, 1, 1, 256, 1024, "q80")
