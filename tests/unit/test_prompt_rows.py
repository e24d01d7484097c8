"""What requests want to know of their prompts: log-probabilities and hidden states, beside others that generate."""

from __future__ import annotations

from typing import Any

import pytest

from dllama_mpi.engine.engine import Engine
from dllama_mpi.engine.scheduler import Limits
from dllama_mpi.errors import RequestError
from tests.fake_model import (
    Guesser,
    alone,
    ask,
    check_hidden,
    check_scores,
    engine_of,
    limits,
    pooled,
    run,
    tokens_of,
)

SHARED = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def few(**more: Any) -> Limits:
    return limits(**{"sequences": 3, "pages": 12, "chunk": 5} | more)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("most", [0, 1, 6])
def test_a_prompt_is_scored_and_goes_on(count: int, most: int) -> None:
    engine, _ = engine_of(few(drafts=9), drafter=Guesser)
    request = ask(SHARED, max_tokens=most, prompt_logprobs=count)
    id = engine.add(request)
    outputs = run(engine)[id]
    assert tokens_of(outputs) == alone(request)[0]
    assert outputs[-1].finish_reason == "length"
    check_scores(SHARED, count, outputs)


@pytest.mark.parametrize("slots", [0, 6])
def test_what_others_have_computed_is_told_of_too(slots: int) -> None:
    engine, _ = engine_of(few(slots=slots))
    first = engine.add(ask(SHARED, max_tokens=4))
    assert tokens_of(run(engine)[first]) == alone(ask(SHARED, max_tokens=4))[0]
    asked: dict[int, str | None] = {engine.add(ask([*SHARED, 11], max_tokens=2, prompt_logprobs=1)): None}
    asked |= {engine.add(pooled([*SHARED, 3], each)): each for each in ("mean", "last")}
    for id, outputs in run(engine).items():
        if asked[id] is None:
            check_scores([*SHARED, 11], 1, outputs)
        else:
            check_hidden([*SHARED, 3], str(asked[id]), outputs)
    assert engine.snapshot().pages_used == 0


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("length", [1, 4, 5, 40])
def test_hidden_states_of_any_prompt_that_fits(pooling: str, length: int) -> None:
    engine, _ = engine_of(few())
    prompt = [i % 12 for i in range(length)]
    id = engine.add(pooled(prompt, pooling))
    check_hidden(prompt, pooling, run(engine)[id])
    assert engine.is_idle


def test_a_token_alone_has_nothing_to_score() -> None:
    engine, _ = engine_of(few())
    id = engine.add(ask([3], max_tokens=0, prompt_logprobs=2))
    (output,) = run(engine)[id]
    assert (output.finish_reason, output.prompt_logprobs) == ("length", ())


def test_preempted_requests_are_told_everything_once() -> None:
    engine, _ = engine_of(few(pages=6, sequences=4, chunk=3))
    wanted: dict[int, Any] = {engine.add(ask([5, 6], max_tokens=14)): "tokens"}
    engine.step()
    wanted[engine.add(ask(SHARED, max_tokens=9, prompt_logprobs=2))] = "scores"
    wanted[engine.add(pooled(SHARED[::-1], "mean"))] = "mean"
    wanted[engine.add(ask([7, 7], max_tokens=14))] = "tokens"
    found = run(engine)
    assert engine.scheduler.preemptions > 0
    for id, kind in wanted.items():
        if kind == "scores":
            check_scores(SHARED, 2, found[id])
        elif kind == "mean":
            check_hidden(SHARED[::-1], "mean", found[id])


def test_an_unknown_pooling_is_refused() -> None:
    engine: Engine = engine_of(few())[0]
    with pytest.raises(RequestError, match="pooling is 'max'; it must be one of mean, last"):
        engine.add(pooled([1], "max"))
