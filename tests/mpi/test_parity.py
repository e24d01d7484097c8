"""Parallel equals serial, for every architecture: logits and greedy tokens against transformers at 1 to 4 ranks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.mpi.launch import ROOT, mpiexec
from tests.tiny_models import CASES, write_model

TOLERANCE = 1e-4  # of logits about 1 to 5 in size; the observed error is about 1e-5


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, case in CASES.items():
        (folder / name).mkdir()
        write_model(case, folder / name)
    return folder


@functools.cache
def results(ranks: int, models: Path) -> dict[str, Any]:
    """Run the whole comparison once for each rank count."""
    done = mpiexec(ranks, [str(ROOT / "tests/mpi/parity_job.py"), str(models)], 300, {"PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parity(ranks: int, name: str, models: Path) -> None:
    result = results(ranks, models)[name]
    assert max(result["errors"].values()) < TOLERANCE, result["errors"]
    for how, tokens in result["greedy"].items():
        assert tokens == result["expected"], how
