"""Choosing a token: from candidates of several ranks as from the whole vocabulary, and as the naive twin does."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine import sampler
from dllama_mpi.engine.candidates import Candidates, local_best, merge, penalise, whole
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.engine.sampler import WANTED, choose, wanted
from dllama_mpi.engine.step import ROW
from dllama_mpi.errors import RequestError
from dllama_mpi.kernels.sampling import log_sum_exp
from tests import naive_sampling
from tests.naive_numbers import Floats
from tests.tiers import slow

VOCAB = 200
CUTS = ((0, 200), (0, 100, 200), (0, 3, 3, 120, 200), (0, 16, 32, 48, 200, 200), (0, 1, 2, 200))
FILTERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.317},
    {"top_p": 0.913},
    {"min_p": 0.137},
    {"min_p": 0.011},
    {"top_k": 20, "top_p": 0.713},
    {"top_p": 0.913, "min_p": 0.053},
    {"top_k": 30, "top_p": 0.913, "min_p": 0.053},
)
every_filter = pytest.mark.parametrize("filters", FILTERS, ids=str)


def row(k: int, temperature: float, **penalties: float) -> np.ndarray:
    """Return one `ROW`, without penalties unless given."""
    rows = np.zeros(1, ROW)
    rows["k"], rows["temperature"], rows["repeat"] = k, temperature, 1
    for name, value in penalties.items():
        rows[name] = value
    return rows


def candidates(logits: Floats, cuts: tuple[int, ...], k: int, temperature: float) -> Candidates:
    """Return the merged candidates of ranks that hold the ids between `cuts`."""
    rows = row(k, temperature)
    parts = [local_best(logits[None, a:b], rows, a, int(rows["k"].max())) for a, b in pairwise(cuts)]
    (merged,) = merge(parts)
    return merged


def samples(seed: int) -> list[Floats]:
    """Return logits (200,) of many shapes: peaked, flat, full of ties, all the same."""
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(VOCAB)).astype(np.float32) for scale in (0.1, 1, 3, 10)] + [
        rng.integers(0, 4, VOCAB).astype(np.float32),
        3 * rng.integers(-2, 2, VOCAB).astype(np.float32),
        np.zeros(VOCAB, np.float32),
        np.where(rng.random(VOCAB) < 0.05, 5, -5).astype(np.float32),
    ]


def temperatures(filters: dict[str, Any]) -> tuple[float, ...]:
    """Return the temperatures to try with filters."""
    return (0,) if "temperature" in filters else (0.3, 1.0, 2.5)


def is_covered(logits: Floats, floor: float, params: SamplingParams, value: float) -> bool:
    """Return whether the tokens strictly above the floor, and that none is above it besides, decide the choice."""
    if params.temperature == 0 or params.top_k or floor == -math.inf:
        return True
    above = int((logits > floor).sum())
    plain = naive_sampling.distribution(logits, params.temperature)
    if params.top_p < 1:
        return sum(p for _, p in plain[:above]) >= params.top_p
    if params.min_p > 0:
        return above >= len(naive_sampling.distribution(logits, params.temperature, min_p=params.min_p))
    return value < sum(p for _, p in plain[:above])


# --------------------------------------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------------------------------------


@every_filter
def test_choice_from_the_whole_vocabulary(filters: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    for temperature in temperatures(filters):
        params = SamplingParams(**{"temperature": temperature} | filters)
        for logits in samples(2):
            choices = naive_sampling.distribution(logits, **{"temperature": temperature} | filters)
            everything = whole(logits, temperature)
            for value in [0.0, *rng.random(20).tolist(), 0.9999]:
                assert choose(everything, params, value) == naive_sampling.choose(choices, value)


@every_filter
@pytest.mark.parametrize("cuts", [cuts if cuts is CUTS[2] else slow(cuts) for cuts in CUTS], ids=str)
def test_choice_from_candidates_of_ranks(filters: dict[str, Any], cuts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    answered, declined = 0, 0
    for temperature in temperatures(filters):
        params = SamplingParams(**{"temperature": temperature} | filters)
        for logits in samples(4):
            everything = whole(logits, temperature)
            for k in (wanted(params, VOCAB),) if params.top_k or temperature == 0 else (1, 5, 64, VOCAB):
                merged = candidates(logits, cuts, k, temperature)
                for value in [0.0, *rng.random(4).tolist(), 0.9999]:
                    token = choose(merged, params, value)
                    assert (token is not None) == is_covered(logits, merged.floor, params, value)
                    if token is None:
                        declined += 1
                    else:
                        answered += 1
                        assert token == choose(everything, params, value)
    assert answered > 0
    assert (declined > 0) == (not params.top_k and params.temperature != 0)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_greedy_ties_go_to_the_lowest_id(cuts: tuple[int, ...]) -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[150, 17, 199]] = 2
    assert choose(candidates(logits, cuts, 1, 0), SamplingParams(temperature=0), 0.0) == 17


def test_top_p_stops_at_the_token_that_reaches_it() -> None:
    even = whole(np.zeros(2, np.float32), 1.0)
    assert choose(even, SamplingParams(top_p=0.5), 0.99) == 0
    assert choose(even, SamplingParams(top_p=0.51), 0.99) == 1


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_nearly_uniform() -> None:
    logits = samples(5)[1]
    for value in (0.0, 0.3, 0.999):
        assert choose(whole(logits, 1e-3), SamplingParams(temperature=1e-3), value) == logits.argmax()
    ids = np.argsort(-logits, kind="stable")
    for value in (0.1, 0.5, 0.9):
        token = choose(whole(logits, 100), SamplingParams(temperature=100), value)
        assert abs(ids.tolist().index(token) - VOCAB * value) < 10


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.01, 0.1, 0.7, 1.3, 100])
def test_candidates_know_their_probabilities(temperature: float) -> None:
    logits = samples(6)[3]
    merged = candidates(logits, (0, 70, 200), 10, temperature)
    ref = dict(naive_sampling.distribution(logits, temperature))
    got = np.exp(merged.logits / temperature - merged.log_sum)
    np.testing.assert_allclose(got, [ref[i] for i in merged.ids.tolist()], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    "filters",
    [{"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}],
    ids=str,
)
def test_sampled_tokens_have_the_softmax_distribution(filters: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    logits = rng.standard_normal(16).astype(np.float32)
    params, draws = SamplingParams(**filters), 8000
    expected = dict(naive_sampling.distribution(logits, **{"temperature": 1.0} | filters))
    few = candidates(logits, (0, 5, 16), wanted(params, 4), params.temperature)
    everything = whole(logits, params.temperature)
    counts = dict.fromkeys(expected, 0)
    for value in rng.random(draws).tolist():
        token = choose(few, params, value)
        token = choose(everything, params, value) if token is None else token
        assert token is not None
        counts[token] += 1  # a KeyError here: a token that the filters exclude
    chi_square = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items())
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)  # about one in ten thousand


@pytest.mark.parametrize(
    ("params", "vocab", "expected"),
    [
        ({"temperature": 0}, 1000, 1),
        ({"temperature": 0, "top_k": 50}, 1000, 1),
        ({"top_k": 5}, 1000, 5),
        ({"top_k": 5000}, 1000, 1000),
        ({}, 1000, WANTED),
        ({"top_p": 0.9}, 1000, WANTED),
        ({}, 10, 10),
    ],
)
def test_wanted(params: dict[str, Any], vocab: int, expected: int) -> None:
    assert wanted(SamplingParams(**params), vocab) == expected


# --------------------------------------------------------------------------------------------------------------------
# Candidates
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("k", [1, 3, 64, 200, 500])
def test_merged_candidates(cuts: tuple[int, ...], k: int) -> None:
    for logits in samples(8):
        merged = candidates(logits, cuts, k, 0.8)
        order = [(-v, i) for i, v in zip(merged.ids.tolist(), merged.logits.tolist(), strict=True)]
        assert order == sorted(order)
        assert all(logits[i] == -v for v, i in order)
        left_out = np.delete(logits, merged.ids)
        assert len(merged.ids) == sum(min(k, b - a) for a, b in pairwise(cuts))
        assert left_out.max(initial=-np.inf) <= merged.floor
        assert (merged.floor == -np.inf) == (left_out.size == 0)
        assert merged.log_sum == pytest.approx(whole(logits, 0.8).log_sum, abs=1e-5)


def test_rows_that_want_different_numbers() -> None:
    logits = np.stack(samples(9)[:3])
    rows = np.concatenate([row(1, 0), row(7, 1.0), row(3, 0.5)])
    k = int(rows["k"].max())
    merged = merge([local_best(logits[:, :90], rows, 0, k), local_best(logits[:, 90:], rows, 90, k)])
    for got, own, one in zip(merged, logits, rows, strict=True):
        assert got.ids[0] == own.argmax()
        if one["temperature"] > 0:
            assert got.log_sum == pytest.approx(whole(own, float(one["temperature"])).log_sum, abs=1e-5)
    alone = [candidates(own, (0, 90, 200), 7, 1.0) for own in logits]
    for got, ref in zip(merged, alone, strict=True):
        assert got.ids.tolist() == ref.ids.tolist()
        assert got.floor == ref.floor


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1, 100])
def test_log_sum_exp(temperature: float) -> None:
    for logits in (*samples(10), np.array([1e4, -1e4], np.float32), np.array([-1e4], np.float32)):
        exact = logits.astype(np.float64) / temperature
        ref = exact.max() + math.log(math.fsum(np.exp(exact - exact.max()).tolist()))
        assert log_sum_exp(logits, temperature) == pytest.approx(ref, rel=1e-6, abs=1e-6)
    assert log_sum_exp(np.zeros(0, np.float32), temperature) == -math.inf


# --------------------------------------------------------------------------------------------------------------------
# Penalties
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(
    ("repeat", "presence", "frequency"),
    [(1, 0, 0), (1.3, 0, 0), (0.7, 0, 0), (1, 0.5, 0), (1, 0, 0.25), (1, -0.5, -0.25), (1.5, 1.5, 2)],
)
def test_penalties(cuts: tuple[int, ...], repeat: float, presence: float, frequency: float) -> None:
    rng = np.random.default_rng(11)
    for length, prompt in ((1, 1), (5, 2), (60, 20), (60, 60), (300, 1)):
        logits = samples(length)[2]
        history = rng.integers(0, VOCAB, length)
        history[rng.random(length) < 0.3] = 17  # one that comes often
        one = row(1, 1.0, prompt=prompt, repeat=repeat, presence=presence, frequency=frequency)[0]
        got = logits.copy()
        for a, b in pairwise(cuts):
            penalise(got[a:b], one, history, a)
        ref = naive_sampling.penalised(logits, history.tolist(), prompt, repeat, presence, frequency)
        np.testing.assert_allclose(got, ref, rtol=1e-6, atol=1e-6)


def test_prompt_tokens_count_for_the_repeat_penalty_only() -> None:
    logits = np.array([2.0, -2.0, 2.0, 2.0], np.float32)
    penalise(logits, row(1, 1.0, prompt=2, repeat=2, presence=0.5, frequency=0.25)[0], np.array([0, 1, 2, 2]), 0)
    assert logits.tolist() == [1.0, -4.0, 1.0 - 0.5 - 2 * 0.25, 2.0]


# --------------------------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repeat_penalty", 0),
        ("repeat_penalty", 100),
        ("presence_penalty", -101),
        ("frequency_penalty", math.inf),
        ("max_tokens", -1),
        ("seed", -1),
        ("stop", ["a", ""]),
        ("stop", [3]),
    ],
)
def test_a_parameter_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name} is .*; it must be ") as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


def test_parameters_at_their_limits() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1e-9, min_p=0, max_tokens=0, seed=0)
    SamplingParams(temperature=100, top_p=1, min_p=1, presence_penalty=100, frequency_penalty=-100)
    assert SamplingParams(stop="END").stop == ("END",)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers(bad: float, temperature: float, capsys: pytest.CaptureFixture[str]) -> None:
    sampler._warn_of_logits.cache_clear()
    found = Candidates(np.array([7, 3]), np.array([bad, bad]), -math.inf, bad if temperature else -math.inf)
    for _ in range(2):
        assert choose(found, SamplingParams(temperature=temperature), 0.5) == 7
    said = capsys.readouterr().err
    assert said.count("warning: logits are not finite") == 1
