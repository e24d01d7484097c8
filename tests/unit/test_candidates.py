"""The best candidates for a token, as their twin in ``tests.naive_sampling`` finds them."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi.kernels import sampling
from tests import naive_sampling
from tests.unit.kernel_inputs import random


@pytest.mark.parametrize("k", [1, 2, 5, 64, 200])
def test_top_k(k: int) -> None:
    rng = np.random.default_rng(k)
    for logits in (
        random(k, 200),
        rng.integers(-3, 3, 200).astype(np.float32),  # full of ties
        np.zeros(200, np.float32),
        np.arange(200, dtype=np.float32),
        -np.arange(200, dtype=np.float32),
        np.where(rng.random(200) < 0.5, -np.inf, random(k, 200)).astype(np.float32),
    ):
        ids, values = np.full(k, -1, np.int64), np.full(k, np.nan, np.float32)
        sampling.top_k(logits, ids, values)
        ref_ids, ref_values = naive_sampling.top_k(logits, k)
        assert ids.tolist() == ref_ids
        assert values.tolist() == ref_values
