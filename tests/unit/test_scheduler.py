"""Packing steps: prefill in chunks, many sequences in few slots, how much of prompts beside what runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine.budget import LEAST, Budget
from dllama_mpi.engine.scheduler import Limits
from dllama_mpi.engine.step import BIAS, ROW, Step, Want
from dllama_mpi.kernels.layout import PAGE
from dllama_mpi.model.batch import Batch
from tests.fake_model import alone, ask, engine_of, run, tokens_of


def steps_of(slots: int, chunk: int, *requests: Any) -> list[Step]:
    """Return the steps that requests take, which must get what they get alone."""
    engine, runner = engine_of(Limits(slots, 40, chunk))
    ids = [engine.add(request) for request in requests]
    outputs = run(engine)
    for request_id, request in zip(ids, requests, strict=True):
        assert (tokens_of(outputs[request_id]), outputs[request_id][-1].finish_reason) == alone(request)
    return runner.steps


@pytest.mark.parametrize(
    ("length", "chunk", "parts"),
    [(1, 4, [1]), (4, 4, [4]), (5, 4, [4, 1]), (12, 4, [4, 4, 4]), (3, 1, [1, 1, 1]), (7, 100, [7])],
)
def test_a_prompt_is_fed_in_chunks(length: int, chunk: int, parts: list[int]) -> None:
    steps = steps_of(1, chunk, ask([i % 5 for i in range(length)], max_tokens=3))
    assert [s.batch.tokens for s in steps] == [*parts, 1, 1]
    assert [len(s.rows) for s in steps] == [0] * (len(parts) - 1) + [1] * 3
    assert np.concatenate([s.batch.positions for s in steps]).tolist() == list(range(length + 2))


def test_lengths_are_the_prompts_and_then_each_tokens_own() -> None:
    steps = steps_of(1, 3, ask([5, 6, 7, 8], max_tokens=3))
    assert [s.batch.lengths.tolist() for s in steps] == [[4, 4, 4], [4], [5], [6]]


def test_prompts_share_a_step_and_tokens_ride_along() -> None:
    steps = steps_of(3, 8, ask([1, 2, 3], max_tokens=3), ask([4, 5, 6, 7], max_tokens=4), ask([8] * 9, max_tokens=2))
    assert steps[0].batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [s.batch.tokens for s in steps[1:]] == [10, 3, 1]
    assert [len(s.rows) for s in steps] == [2, 3, 3, 1]


def test_many_sequences_in_few_slots() -> None:
    steps = steps_of(2, 4, *[ask([i, 1], max_tokens=1 + i) for i in range(7)])
    assert {slot for s in steps for slot in s.batch.slots.tolist()} == {0, 1}


def test_pages_are_taken_as_they_are_needed() -> None:
    engine, _ = engine_of(Limits(2, 40, 1000), context=2000)
    engine.add(ask([1] * PAGE, max_tokens=3))
    engine.step()
    assert engine.snapshot().pages_used == 1
    engine.step()
    assert engine.snapshot().pages_used == 2


def test_a_text_by_itself_leaves_no_trace() -> None:
    engine, _ = engine_of(Limits(2, 4, 300))
    batches = list(engine.scheduler.batches([3] * 700))
    assert [batch.tokens for batch in batches] == [300, 300, 100]
    assert np.concatenate([batch.positions for batch in batches]).tolist() == list(range(700))
    assert all(len(batch.pages) == 3 and len(batch.logit_rows) == batch.tokens for batch in batches)
    engine.scheduler.pages.check()
    assert engine.scheduler.pages.available == 4
    assert engine.scheduler.pages.cached == 0


# --------------------------------------------------------------------------------------------------------------------
# Prompt tokens beside what runs
# --------------------------------------------------------------------------------------------------------------------


def timed(budget: Budget, steps: int, base: float, each: float, running: int = 1) -> list[tuple[int, float]]:
    """Return the prompt tokens and the seconds of steps on a machine of such times."""
    found = []
    for _ in range(steps):
        budget.observe(0, running, base)
        tokens = budget.tokens(running)
        seconds = base * (running > 0) + each * tokens
        budget.observe(tokens, running, seconds)
        found.append((tokens, seconds))
    return found


@pytest.mark.parametrize("base", [0.01, 0.1])
@pytest.mark.parametrize("each", [0.001, 0.005, 0.02])
def test_a_step_takes_no_longer_than_it_may(base: float, each: float) -> None:
    steps = timed(Budget(256, 0.25), 30, base, each)
    for tokens, seconds in steps[10:]:
        assert seconds <= 0.25 or tokens == LEAST
        assert seconds > 0.25 - 0.025 - LEAST * each or tokens == 256


def test_without_anything_beside_it_a_chunk_is_whole() -> None:
    assert {tokens for tokens, _ in timed(Budget(256, 0.25), 10, 0.01, 0.01, running=0)} == {256}
    assert {tokens for tokens, _ in timed(Budget(256, math.inf), 10, 0.01, 0.01)} == {256}
    assert timed(Budget(256, 0.25, always=True), 30, 0.01, 0.01, running=0)[-1][0] < 25


def test_a_slow_first_step_is_forgotten() -> None:
    budget = Budget(256, 0.25)
    budget.observe(256, 0, 30.0)  # kernels were compiled
    assert budget.tokens(1) == LEAST
    assert timed(budget, 30, 0.01, 0.001)[-1][0] > 150


def test_reading_always_goes_on() -> None:
    budget = Budget(256, 0.25)
    budget.observe(0, 3, 1.0)
    budget.observe(64, 3, 1.5)
    assert budget.tokens(3) == LEAST


def test_the_engine_reads_less_beside_running_sequences() -> None:
    engine, runner = engine_of(Limits(2, 40, 256), context=2000)
    engine.add(ask([1], max_tokens=50))
    engine.step()
    engine.add(ask([2] * 600, max_tokens=1))
    engine.scheduler.budget.observe(100, 1, 1.0)  # ten milliseconds a token
    engine.step()
    assert LEAST < runner.steps[-1].batch.tokens < 30


# --------------------------------------------------------------------------------------------------------------------
# On the way to the workers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("want", list(Want))
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (17, 3), (5, 0), (0, 0)])
def test_a_step_survives_its_bytes(want: Want, tokens: int, rows: int) -> None:
    rng = np.random.default_rng(tokens)
    columns = rng.integers(0, 2**31 - 1, (4, tokens), dtype=np.int32)
    table = np.zeros(rows, ROW)
    for name in ROW.names or ():
        table[name] = rng.integers(0, 100, rows)
    biases = np.array([(0, 5, 1.5), (0, 7, -3)], BIAS)
    pages = {3: [4, 5, 6, 1, 2, 9], 0: [], 7: range(100)}
    batch = Batch.of(list(columns), rng.integers(0, 9, rows, dtype=np.int32), pages, [(1, 2)], [(3, 4), (5, 6)])
    step = Step(batch, table, want, biases)
    got = Step.from_bytes(step.to_bytes())
    assert got.want is want
    np.testing.assert_array_equal(got.rows, table)
    np.testing.assert_array_equal(got.biases, biases)
    for name in ("token_ids", "positions", "slots", "lengths", "logit_rows", "page_copies", "state_copies"):
        np.testing.assert_array_equal(getattr(got.batch, name), getattr(step.batch, name))
    for slot, held in pages.items():
        assert got.batch.pages_of(slot).tolist() == list(held)
        assert got.batch.tables()[0, slot, : len(held)].tolist() == list(held)


def test_a_decode_step_of_a_long_text_is_small() -> None:
    """Pages that follow one another take no more bytes than one."""
    batch = Batch.of([[1], [130_000], [0], [130_001]], [0], {0: range(508)})
    assert len(Step(batch, np.zeros(1, ROW), Want.CANDIDATES).to_bytes()) < 150
