"""The engine over a fake model: whatever runs beside a request, it gets what it gets alone, and nothing leaks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine import scheduler
from dllama_mpi.engine.request import Output, Request, SamplingParams
from dllama_mpi.errors import QueueFull, RequestError
from tests.fake_model import (
    VOCABULARY,
    FakeRunner,
    Guesser,
    alone,
    ask,
    engine_of,
    limits,
    logits_after,
    run,
    tokens_of,
)


@pytest.fixture(autouse=True)
def short_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pages copied for two tokens already: here they are small."""
    monkeypatch.setattr(scheduler, "LEAST_COPIED", 2)


# --------------------------------------------------------------------------------------------------------------------
# Sharing
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beginning", [8, 10, 22])
def test_what_many_begin_with_is_computed_once(beginning: int) -> None:
    """All come at once; nobody has computed it yet."""
    engine, runner = engine_of(limits(sequences=8, pages=80))
    common = [i % 5 for i in range(beginning)]
    ids = [engine.add(ask([*common, i], max_tokens=1)) for i in range(8)]
    outputs = run(engine)
    assert runner.fed == beginning + 8
    usages = [outputs[i][-1].usage for i in ids]
    assert sum(usage.cached_tokens for usage in usages if usage is not None) == 7 * beginning


def test_full_pages_are_held_once() -> None:
    engine, _ = engine_of(limits(sequences=8, pages=80, chunk=100))
    for i in range(8):
        engine.add(ask([*range(4), *range(4), i], max_tokens=6))
    for _ in range(4):
        engine.step()
    held = [s.pages for s in engine.scheduler.running]
    assert len(held) == 8
    assert len({tuple(pages[:2]) for pages in held}) == 1
    assert engine.snapshot().pages_used == 2 + 8


def test_a_running_text_is_shared() -> None:
    engine, _ = engine_of(limits())
    engine.add(ask(list(range(11)), max_tokens=20))
    for _ in range(6):
        engine.step()
    second = engine.add(ask(list(range(11)), max_tokens=3))
    outputs = run(engine)
    usage = outputs[second][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 10
    assert tokens_of(outputs[second]) == alone(ask(list(range(11)), max_tokens=3))[0]


def test_the_next_turn_of_a_conversation_goes_on_behind_the_last() -> None:
    for slots in (0, 6):
        engine, runner = engine_of(limits(slots=slots))
        first = ask(list(range(10)), max_tokens=7)
        said = tokens_of(outputs_of(engine, first))
        fed = runner.fed
        turn = ask([*range(10), *said, 3, 4], max_tokens=4)
        assert tokens_of(outputs_of(engine, turn)) == alone(turn)[0]
        assert runner.fed - fed == 3 + 3  # the last token said was not fed yet; and what follows


def outputs_of(engine: Any, request: Request) -> list[Output]:
    """Return what a request gets that runs by itself."""
    request_id = engine.add(request)
    return run(engine)[request_id]


def test_a_state_is_kept_where_texts_turn_off() -> None:
    """The third text with a beginning goes on from where the second turned off."""
    engine, runner = engine_of(limits(slots=8, chunk=100))
    fed = []
    for i in range(3):
        before = runner.fed
        outputs_of(engine, ask([*range(9), *[i] * 9], max_tokens=1))
        fed.append(runner.fed - before)
    assert fed == [18, 18, 10]


def test_a_state_without_its_pages_is_of_no_use() -> None:
    """The second text takes the last page of the first, but no slot; the third begins like the first."""
    engine, _ = engine_of(limits(pages=10, slots=12, chunk=100))
    first = ask(list(range(6)), max_tokens=1)
    said = tokens_of(outputs_of(engine, first))
    outputs_of(engine, ask([9] * 33, max_tokens=1))
    third = ask([*range(6), *said, 3], max_tokens=4)
    assert tokens_of(outputs_of(engine, third)) == alone(third)[0]


def test_oldest_pages_are_forgotten_first() -> None:
    engine, runner = engine_of(limits(pages=10, chunk=100))
    for i in range(4):  # three pages each
        outputs_of(engine, ask([i] * 12, max_tokens=1))
    counts = []
    for i in (3, 0):
        before = runner.fed
        outputs_of(engine, ask([i] * 12, max_tokens=1))
        counts.append(runner.fed - before)
    assert counts == [1, 12]


def test_nothing_is_shared_where_that_would_be_wrong() -> None:
    engine, runner = engine_of(limits(shares=False))
    for _ in range(2):
        outputs_of(engine, ask(list(range(10)), max_tokens=1))
    assert runner.fed == 20
    assert engine.snapshot().pages_cached == 0


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


def test_the_youngest_gives_way_and_comes_back() -> None:
    engine, _ = engine_of(limits(pages=10, shares=False))
    requests = [ask([i, i + 1], max_tokens=30) for i in range(3)]
    ids = [engine.add(request) for request in requests]
    outputs = run(engine)
    assert engine.snapshot().preemptions > 0
    usage = [outputs[i][-1].usage for i in ids]
    assert [u.preempted > 0 for u in usage if u is not None] == [False, True, True]
    for request_id, request in zip(ids, requests, strict=True):
        assert tokens_of(outputs[request_id]) == alone(request)[0]


def test_who_cannot_get_pages_waits() -> None:
    engine, _ = engine_of(limits(pages=10, shares=False, chunk=100))
    first, second = engine.add(ask([1] * 30, max_tokens=2)), engine.add(ask([2] * 30, max_tokens=2))
    engine.step()
    assert [s.id for s in engine.scheduler.running] == [first]
    assert engine.snapshot().waiting == 1
    assert list(run(engine)) == [first, second]


def test_a_cancelled_request_leaves_its_pages_at_the_next_step() -> None:
    engine, _ = engine_of(limits())
    first, second = engine.add(ask([1] * 30)), engine.add(ask([2] * 30))
    engine.step()
    used = engine.snapshot().pages_used
    engine.cancel(first)
    outputs = engine.step()
    assert [(o.id, o.finish_reason) for o in outputs if o.finish_reason] == [(first, "abort")]
    assert engine.snapshot().pages_used < used + 3
    assert {page for s in engine.scheduler.running for page in s.pages}
    assert all(s.id == second for s in engine.scheduler.running)


# --------------------------------------------------------------------------------------------------------------------
# Order
# --------------------------------------------------------------------------------------------------------------------


def first_tokens(engine: Any) -> list[int]:
    """Return requests in the order of their first tokens."""
    order: list[int] = []
    while not engine.is_idle:
        order += [o.id for o in engine.step() if o.token_ids and o.id not in order]
    return order


def test_equals_are_served_in_order() -> None:
    engine, _ = engine_of(limits(chunk=5))
    ids = [engine.add(ask([i] * 10, max_tokens=2)) for i in range(6)]
    assert first_tokens(engine) == ids


def test_a_long_prompt_holds_up_no_short_one() -> None:
    engine, _ = engine_of(limits(chunk=5))
    long = engine.add(ask([1] * 35, max_tokens=2))
    engine.step()
    short = engine.add(ask([2] * 5, max_tokens=1))
    assert [o.id for o in engine.step()] == [short]
    assert first_tokens(engine) == [long]


def test_a_stream_of_short_prompts_starves_no_long_one() -> None:
    engine, _ = engine_of(limits(chunk=5, sequences=3))
    long = engine.add(ask([1] * 35, max_tokens=1))
    for i in range(200):
        if engine.snapshot().waiting < 2:
            engine.add(ask([2 + i % 9, *[i % 7] * 4], max_tokens=1))
        if any(o.id == long for o in engine.step()):
            return
    raise AssertionError("the long prompt is never read")


def test_a_higher_priority_goes_first() -> None:
    engine, _ = engine_of(limits(sequences=1))
    ids = [engine.add(ask([i], max_tokens=2, priority=i)) for i in range(4)]
    assert first_tokens(engine) == ids[::-1]


def test_no_more_than_the_queue_holds_may_wait() -> None:
    engine, _ = engine_of(limits(sequences=1), max_queue=2)
    running = engine.add(ask([1]))
    engine.step()
    ids = [engine.add(ask([2], max_tokens=1)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait"):
        engine.add(ask([3]))
    engine.cancel(running)
    assert set(run(engine)) == {running, *ids}
    engine.add(ask([3], max_tokens=1))


# --------------------------------------------------------------------------------------------------------------------
# What is asked for
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "has no tokens"),
        ([1, VOCABULARY], f"token id {VOCABULARY} is out of range"),
        ([-1], "token id -1 is out of range"),
        ([1.5], r"token id 1\.5 is no integer"),
        ([True], "token id True is no integer"),
        ([1] * 41, "the prompt has 41 tokens; the context holds 40"),
    ],
)
def test_a_wrong_prompt_is_refused_at_once(ids: list[Any], message: str) -> None:
    engine, _ = engine_of(limits())
    with pytest.raises(RequestError, match=message):
        engine.add(ask(ids))
    assert engine.is_idle


def test_nothing_to_generate_ends_without_a_step() -> None:
    engine, runner = engine_of(limits())
    full, none = engine.add(ask([1] * 40)), engine.add(ask([1], max_tokens=0))
    assert [(o.id, o.token_ids, o.finish_reason) for o in engine.step()] == [(full, (), "length"), (none, (), "length")]
    assert runner.fed == 0
    assert engine.step() == []


def test_a_stop_token_is_told_and_not_given() -> None:
    engine, _ = engine_of(limits())
    tokens = alone(ask([5], max_tokens=9))[0]
    (output,) = outputs_of(engine, ask([5], tokens[0]))
    assert (output.token_ids, output.finish_reason, output.stop_id) == ((), "stop", tokens[0])
    assert output.usage is not None
    assert output.usage.output_tokens == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [0, 1, 5, VOCABULARY])
def test_log_probabilities_are_exact(temperature: float, count: int) -> None:
    engine, _ = engine_of(limits(drafts=20), drafter=Guesser)
    request = ask([5, 6], max_tokens=12, temperature=temperature, logprobs=count, top_k=3)
    outputs, text = outputs_of(engine, request), [5, 6]
    assert tokens_of(outputs) == alone(request)[0]
    for token, told in zip(tokens_of(outputs), [p for o in outputs for p in o.logprobs or ()], strict=True):
        logits = logits_after(text).astype(np.float64)
        ref = logits - np.logaddexp.reduce(logits)
        assert told.logprob == pytest.approx(ref[token], abs=1e-5)
        best = np.argsort(-ref, kind="stable")[:count].tolist()
        assert [i for i, _ in told.top] == best
        assert [value for _, value in told.top] == pytest.approx(ref[best], abs=1e-5)
        text.append(token)


# --------------------------------------------------------------------------------------------------------------------
# Threads
# --------------------------------------------------------------------------------------------------------------------


def test_requests_may_come_from_any_thread() -> None:
    engine, _ = engine_of(limits())
    requests: dict[int, Request] = {}

    def add(seed: int) -> None:
        for i in range(10):
            request = ask([seed, i % 5], max_tokens=5)
            requests[engine.add(request)] = request

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    outputs: dict[int, list[Output]] = {}
    while any(thread.is_alive() for thread in threads) or not engine.is_idle:
        engine.wait(0.05)
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
    assert len(outputs) == 40
    for request_id, request in requests.items():
        assert tokens_of(outputs[request_id]) == alone(request)[0]


def test_waiting_ends_when_a_request_comes() -> None:
    engine, _ = engine_of(limits())
    engine.wait(0.01)
    threading.Timer(0.05, lambda: engine.add(ask([1]))).start()
    engine.wait(None)
    assert not engine.is_idle


def test_a_step_that_fails_leaves_an_engine_that_works() -> None:
    engine, runner = engine_of(limits())
    request = ask(list(range(10)), max_tokens=8)
    engine.add(request)
    engine.step()

    def interrupted(step: Any) -> None:
        raise KeyboardInterrupt

    engine.runner.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.runner.step = lambda step: FakeRunner.step(runner, step)  # type: ignore[method-assign]
    assert engine.is_idle
    assert tokens_of(outputs_of(engine, request)) == alone(request)[0]


# --------------------------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": None}, {"temperature": "1"}, {"temperature": float("nan")}, {"top_k": 1.5}, {"top_k": True},
        {"max_tokens": 2.0}, {"max_tokens": -1}, {"seed": "7"}, {"stop": [1]}, {"stop": None}, {"logprobs": -1},
        {"logprobs": 101}, {"logit_bias": {1: 101}}, {"logit_bias": {"1": 1}}, {"logit_bias": [1]}, {"ignore_eos": 1},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_parameters_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(given))} is .*; it must be "):
        SamplingParams(**given)


def test_numpys_numbers_are_numbers() -> None:
    numbers: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(3), "max_tokens": np.int32(4)}
    assert SamplingParams(**numbers).top_k == 3


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("chunk", [3, 5, 7])
def test_what_another_is_just_computing_is_computed_once(chunk: int, window: int) -> None:
    """Requests with one beginning come a step apart: each but the first computes its own end alone."""
    near = {"window": window, "window_pages": 40} if window else {}
    engine, _ = engine_of(limits(sequences=8, chunk=chunk, **near))
    shared, usages = [i % VOCABULARY for i in range(22)], {}
    for i in range(6):
        engine.add(ask([*shared, i, i], max_tokens=2))
        for output in engine.step():
            usages[output.id] = output.usage
    for id, outputs in run(engine).items():
        usages[id] = outputs[-1].usage
    computed = [usage.prompt_tokens - usage.cached_tokens for usage in usages.values() if usage is not None]
    assert sorted(computed)[-1] == len(shared) + 2
    assert sorted(computed)[:-1] == [2] * 5
