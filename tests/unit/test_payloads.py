"""Payloads of an all-reduce and their sums, bit for bit as their twins in ``tests.naive_payloads``."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi.parallel.collective.payload import decode_sum
from dllama_mpi.parallel.collective.table import PAYLOADS
from tests import naive_payloads
from tests.unit.kernel_inputs import encoded, random, uneven

every_payload = pytest.mark.parametrize("payload", PAYLOADS)


@every_payload
@pytest.mark.parametrize("blocks", [1, 2, 7, 64])
def test_encode(payload: str, blocks: int) -> None:
    for x in (random(blocks, blocks, 32), uneven(blocks, blocks, 32), np.zeros((blocks, 32), np.float32)):
        np.testing.assert_array_equal(encoded(x, payload), naive_payloads.encode(x, payload))


@every_payload
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_decode_sum(payload: str, ranks: int) -> None:
    x = np.stack([uneven(rank, 9, 32) for rank in range(ranks)])
    payloads = np.stack([naive_payloads.encode(part, payload) for part in x])
    got = np.full((9, 32), np.nan, np.float32)
    decode_sum(payloads, got)
    np.testing.assert_array_equal(got, naive_payloads.decode_sum(payloads))
    # A code may be off by half a step, and by a little more where the float16 scale was rounded down.
    error = {"f32": 0, "f16": 2**-11, "q80": 0.51 / 127 + 2**-11}[payload] * np.abs(x).max(axis=2)
    allowed = 2**-20 * np.abs(x).sum(axis=0) + (error + 127 * 2.0**-24).sum(axis=0)[:, None]
    assert (np.abs(got - x.astype(np.float64).sum(axis=0)) <= allowed).all()


def test_a_sum_is_in_rank_order() -> None:
    x = np.array([1e8, -1e8, 1.0], np.float32)[:, None, None] * np.ones((1, 1, 32), np.float32)
    for order, expected in (((0, 1, 2), 1.0), ((0, 2, 1), 0.0)):
        got = np.empty((1, 32), np.float32)
        decode_sum(np.stack([encoded(x[rank], "f32") for rank in order]), got)
        assert (got == expected).all()


@every_payload
def test_a_decoded_payload_encodes_to_itself(payload: str) -> None:
    first = encoded(random(8, 20, 32), payload)
    values = np.empty((20, 32), np.float32)
    decode_sum(first[None], values)
    again = np.empty_like(values)
    decode_sum(encoded(values, payload)[None], again)
    if payload == "q80":  # its scale may move by a rounding: the largest code need not be 127
        np.testing.assert_allclose(again, values, atol=np.abs(values).max() * 2**-8)
    else:
        np.testing.assert_array_equal(again, values)
