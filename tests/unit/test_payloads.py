"""Payloads of an all-reduce and their sums, bit for bit as their twins in ``tests.naive_payloads``."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi.parallel.collective.payload import decode_sum, encode_keeping
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
    # Of q40's transform a value has all codes' errors: up to the root of 32 halves of a step of an eighth.
    steps = {"f32": 0, "f16": 2**-11, "q80": 0.51 / 127 + 2**-11, "q40": 0.51 / 7 * 32}
    error = steps[payload] * np.abs(x).max(axis=2)
    allowed = 2**-20 * np.abs(x).sum(axis=0) + (error + 127 * 2.0**-24).sum(axis=0)[:, None]
    assert (np.abs(got - x.astype(np.float64).sum(axis=0)) <= allowed).all()


@pytest.mark.parametrize("payload", ["q80", "q40"])
def test_what_is_left_out_goes_with_the_next(payload: str) -> None:
    """What was sent in all differs from the values by what is left at last, however much was sent."""
    rest, sent, wanted = np.zeros((9, 32), np.float32), np.zeros((9, 32)), np.zeros((9, 32))
    for seed in range(20):
        x = uneven(seed, 9, 32)
        wanted += x
        given = x + rest
        found = np.empty((9, PAYLOADS[payload]), np.uint8)
        encode_keeping(x, found, rest)
        np.testing.assert_array_equal(x, given)
        np.testing.assert_array_equal(found, naive_payloads.encode(given, payload))
        np.testing.assert_array_equal(rest, given - naive_payloads.decode(found))
        sent += naive_payloads.decode(found)
    np.testing.assert_allclose(sent + rest, wanted, atol=1e-4 * np.abs(wanted).max())


def test_one_large_value_costs_the_others_little() -> None:
    """A value a hundred times as large as the rest: without the transform, all others would be sent as zero."""
    x = random(1, 50, 32)
    x[:, 5] = 100 * np.abs(x[:, 6]).max()
    others = np.delete(x - naive_payloads.decode(encoded(x, "q40")), 5, axis=1)
    assert np.abs(others).max() < 0.06 * 100 * np.abs(x[:, 6]).max()
    plain = x.copy()
    plain[:, 5] = 0
    left = plain - naive_payloads.decode(encoded(plain, "q40"))
    assert (left**2).mean() < 0.009 * (plain**2).mean()


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
    if payload in ("q80", "q40"):  # its scale may move by a rounding: the largest code need not be 127
        np.testing.assert_allclose(again, values, atol=np.abs(values).max() * 2**-8)
    else:
        np.testing.assert_array_equal(again, values)
