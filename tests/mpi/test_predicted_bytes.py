"""Real ranks allocate what was predicted, the buffers of their all-reduces included."""

from __future__ import annotations

import json

import pytest

from tests.mpi.pool import pool
from tests.tiers import slow

JOB = "tests/mpi/predicted_bytes_job.py"


@pytest.mark.parametrize("ranks", [1, 2, 3, slow(8)])
@pytest.mark.parametrize("weights", ["q40", "f32"])
def test_predicted_is_allocated(ranks: int, weights: str) -> None:
    told = json.loads(pool(ranks).run([JOB, "random:tiny", weights, "512"], timeout=300).stdout)
    assert len(told["predicted"]) == len(told["allocated"]) == ranks
    assert told["predicted"] == pytest.approx(told["allocated"], rel=0.02)
