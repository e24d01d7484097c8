"""The twins of the mixture-of-experts models: against hand-made figures, and as whole models against the references."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.naive_experts import (
    E2M1,
    Expert,
    Groups,
    Routing,
    SparseModel,
    best_then_softmax,
    clamped_swiglu,
    exact_product,
    grouped_sigmoid,
    mixture,
    mxfp4_dequantise,
    silu_mul,
    sink_attention,
    softmax_then_best,
)
from tests.sparse_tensors import mxfp4
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model
from tests.tiny_models.references import load_reference
from tests.tiny_sparse import SPARSE_CASES


def log(*probabilities: float) -> list[float]:
    """Return logits whose softmax these probabilities are."""
    return [math.log(p) for p in probabilities]


def logit(*sigmoids: float) -> list[float]:
    """Return logits whose sigmoids these are."""
    return [math.log(p / (1 - p)) for p in sigmoids]


@pytest.mark.parametrize("case", SPARSE_CASES.values(), ids=SPARSE_CASES)
def test_the_twin_gives_the_references(case: Case, tmp_path: Path) -> None:
    reference = load_reference(case)
    got = SparseModel(write_model(case, tmp_path), "f32").logits(reference.tokens)
    np.testing.assert_allclose(got, reference.logits, rtol=0, atol=2e-4)


def test_softmax_before_the_choice() -> None:
    logits = [log(0.1, 0.5, 0.1, 0.3), log(0.4, 0.1, 0.4, 0.1)]
    plain = softmax_then_best(logits, 2, renormalise=False)
    assert plain.experts.tolist() == [[1, 3], [0, 2]]
    np.testing.assert_allclose(plain.weights, [[0.5, 0.3], [0.4, 0.4]])
    renormalised = softmax_then_best(logits, 2, renormalise=True)
    assert renormalised.experts.tolist() == plain.experts.tolist()
    np.testing.assert_allclose(renormalised.weights, [[0.625, 0.375], [0.5, 0.5]])


def test_softmax_after_the_choice_is_the_renormalised_one() -> None:
    logits = np.random.RandomState(0).standard_normal((20, 8))
    after, before = best_then_softmax(logits, 3), softmax_then_best(logits, 3, renormalise=True)
    assert after.experts.tolist() == before.experts.tolist()
    np.testing.assert_allclose(after.weights, before.weights)


def test_the_correction_chooses_and_does_not_weigh() -> None:
    routing = grouped_sigmoid([logit(0.5, 0.6, 0.2)], [0.0, -0.3, 0.4], 2, Groups(1, 1), False, 1.0)
    assert routing.experts.tolist() == [[2, 0]]
    np.testing.assert_allclose(routing.weights, [[0.2, 0.5]])
    scaled = grouped_sigmoid([logit(0.5, 0.6, 0.2)], [0.0, -0.3, 0.4], 2, Groups(1, 1), True, 2.5)
    np.testing.assert_allclose(scaled.weights, [[2.5 * 0.2 / 0.7, 2.5 * 0.5 / 0.7]])


def test_a_group_counts_by_its_two_best() -> None:
    # Three groups of three: the best expert is in the second, the best pair in the third, the best three in the first.
    scores = logit(0.5, 0.5, 0.5, 0.9, 0.05, 0.05, 0.7, 0.6, 0.01)
    routing = grouped_sigmoid([scores], np.zeros(9), 3, Groups(3, 1), False, 1.0)
    assert routing.experts.tolist() == [[6, 7, 8]]
    routing = grouped_sigmoid([scores], np.zeros(9), 3, Groups(3, 2), False, 1.0)
    assert routing.experts.tolist() == [[6, 7, 0]]


def test_activations() -> None:
    np.testing.assert_allclose(silu_mul([0.0, 1.0, -2.0], [3.0, 3.0, 3.0]), [0.0, 2.19317574, -0.71521752])
    # Inside the limits; the gate clamped from above only; up from both sides.
    gate, up = [1.0, 9.0, -9.0, 0.5, 0.5], [2.0, 0.0, 0.0, 9.0, -9.0]
    expected = [
        3 / (1 + math.exp(-1.7)),
        7 / (1 + math.exp(-11.9)),
        -9 / (1 + math.exp(15.3)),
        4 / (1 + math.exp(-0.85)),
        -3 / (1 + math.exp(-0.85)),
    ]
    np.testing.assert_allclose(clamped_swiglu(gate, up, 1.7, 7.0), expected)


def test_mixture() -> None:
    state = np.random.RandomState(1)
    x = state.standard_normal((2, 3)).astype(np.float32)
    experts = [
        Expert(*(state.standard_normal(s).astype(np.float32) for s in ((4, 3), (4, 3), (3, 4)))) for _ in range(3)
    ]
    one = [np.array(exact_product(e.down, silu_mul(x @ e.gate.T, x @ e.up.T).astype(np.float32))) for e in experts]
    routing = Routing(np.array([[2, 0], [1, 2]]), np.array([[0.75, 0.5], [1.0, 0.0]]))
    got = mixture(x, routing, experts, silu_mul)
    np.testing.assert_allclose(got, [0.75 * one[2][0] + 0.5 * one[0][0], one[1][1]], rtol=1e-5)
    biased = [e._replace(down_bias=np.array([1, 2, 3], np.float32)) for e in experts]
    np.testing.assert_allclose(mixture(x, routing, biased, silu_mul) - got, np.outer([1.25, 1], [1, 2, 3]), rtol=1e-5)


def test_mxfp4_layout() -> None:
    blocks = np.zeros((1, 2, 16), np.uint8)
    blocks[0, 0, :8] = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    blocks[0, 1, 15] = 0x2F
    got = mxfp4_dequantise(blocks, np.array([[127, 124]], np.uint8))
    assert got.shape == (1, 64)
    assert got[0, :16].tolist() == list(E2M1)
    assert not got[0, 16:62].any()
    assert got[0, 62:].tolist() == [-0.75, 0.125]


def test_mxfp4_quantises_what_it_holds() -> None:
    state = np.random.RandomState(2)
    codes = state.randint(0, 16, size=(5, 3, 32))
    codes[:, :, 0] = 7  # a block's scale is found from its largest value
    values = np.take(np.array(E2M1), codes) * 2.0 ** state.randint(-9, 9, size=(5, 3, 1))
    blocks, scales = mxfp4(values.reshape(5, 96))
    assert blocks.shape == (5, 3, 16)
    assert blocks.dtype == scales.dtype == np.uint8
    np.testing.assert_array_equal(mxfp4_dequantise(blocks, scales), values.reshape(5, 96))


def test_a_sink_takes_its_share() -> None:
    state = np.random.RandomState(3)
    q, k, v = (state.standard_normal((4, heads, 2)).astype(np.float32) for heads in (2, 1, 1))
    zero = np.zeros_like(q)
    got = sink_attention(zero, k, v, 1.0, 0, np.array([0.0, math.log(3)], np.float32))
    for t in range(4):  # all scores are 0: t + 1 equal weights, and that of the sink
        np.testing.assert_allclose(got[t, 0], v[: t + 1, 0].sum(axis=0) / (t + 2), rtol=1e-5)
        np.testing.assert_allclose(got[t, 1], v[: t + 1, 0].sum(axis=0) / (t + 4), rtol=1e-5)
    np.testing.assert_allclose(
        sink_attention(q, k, v, 0.3, 2, np.full(2, -1e9, np.float32)), sink_attention(q, k, v, 0.3, 2, None)
    )
