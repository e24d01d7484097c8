"""The engine over a fake model while anything happens: whatever runs beside a request, it gets what it gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dllama_mpi.engine import scheduler
from dllama_mpi.engine.request import Output, Request, RequestStats
from dllama_mpi.kernels.layout import pages_over
from tests.fake_model import (
    CONTEXT,
    VOCABULARY,
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


class Anything(RuleBasedStateMachine):
    """Requests that begin alike or not come, go and are cancelled while the engine steps, with few pages."""

    def __init__(self) -> None:
        super().__init__()
        self.least, scheduler.LEAST_COPIED = scheduler.LEAST_COPIED, 2

    @initialize(
        pages=st.integers(CONTEXT // 4, 24),
        sequences=st.integers(1, 5),
        chunk=st.integers(1, 12),
        kind=st.sampled_from(["plain", "drafts", "states", "states", "apart"]),
        spare=st.sampled_from([2, 12]),
        window=st.just(0) | st.integers(1, CONTEXT),
        more=st.integers(0, 12),
    )
    def begin(self, pages: int, sequences: int, chunk: int, kind: str, spare: int, window: int, more: int) -> None:
        given = limits(
            pages=pages,
            sequences=sequences,
            chunk=chunk,
            slots=sequences + spare if kind == "states" else 0,
            drafts=20 if kind == "drafts" else 0,
            shares=kind != "apart",
            window=window,
            window_pages=min(pages_over(window - 1 + chunk, 4) + more, pages) if window else 0,
        )
        self.engine, self.runner = engine_of(given, CONTEXT, drafter=Guesser if kind == "drafts" else None)
        self.requests: dict[int, Request] = {}
        self.outputs: dict[int, list[Output]] = {}
        self.cancelled: set[int] = set()

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 25),
        own=st.lists(st.integers(0, VOCABULARY - 1), max_size=14),
        most=st.none() | st.integers(0, 20),
        temperature=st.sampled_from([0.0, 1.0]),
        stop=st.none() | st.integers(0, VOCABULARY - 1),
        priority=st.sampled_from([0, 0, 0, 1]),
        wants=st.sampled_from(["text", "text", "text", "scores", "mean", "last"]),
    )
    def add(
        self,
        family: int,
        shared: int,
        own: list[int],
        most: int | None,
        temperature: float,
        stop: int | None,
        priority: int,
        wants: str,
    ) -> None:
        beginning = np.random.default_rng(family).integers(VOCABULARY, size=shared).tolist()
        prompt = [*beginning, *own] or [0]
        scores = 2 if wants == "scores" else None
        params: dict[str, Any] = {"temperature": temperature, "max_tokens": most, "prompt_logprobs": scores}
        request = ask(prompt, stop, priority, seed=len(prompt), **params)
        if wants in ("mean", "last"):
            request = pooled(prompt, wants)
        self.requests[self.engine.add(request)] = request

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.cancel(request_id)
        self.cancelled.add(request_id)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                self.take(output)

    def take(self, output: Output) -> None:
        before = self.outputs.setdefault(output.id, [])
        assert not before or before[-1].finish_reason is None
        before.append(output)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "engine"):
            return
        own = self.engine.scheduler
        own.cache.check(own.running)
        assert len(own.running) <= own.limits.sequences
        assert {s.slot for s in own.running}.isdisjoint(own.slots._free)

    def teardown(self) -> None:
        scheduler.LEAST_COPIED = self.least
        if not hasattr(self, "engine"):
            return
        for outputs in run(self.engine).values():
            for output in outputs:
                self.take(output)
        assert self.engine.scheduler.pages.used == self.engine.scheduler.cache.near.used == 0
        assert self.engine.scheduler.slots.available == self.engine.scheduler.slots.count
        snapshot = self.engine.snapshot()
        assert (snapshot.pages_used, snapshot.window_pages_used) == (0, 0)
        assert snapshot.window_pages_total == self.engine.scheduler.limits.window_pages
        assert set(self.outputs) == set(self.requests)
        for request_id, request in self.requests.items():
            outputs = self.outputs[request_id]
            ref, reason = ([], "stop") if request.pooling is not None else alone(request, CONTEXT)
            found, last = tokens_of(outputs), outputs[-1]
            if last.finish_reason == "abort":
                assert request_id in self.cancelled
                assert found == ref[: len(found)]
            else:
                assert (found, last.finish_reason) == (ref, reason)
                if request.pooling is not None:
                    check_hidden(list(request.token_ids), request.pooling, outputs)
                elif request.params.prompt_logprobs is not None:
                    check_scores(list(request.token_ids), 2, outputs)
            check_usage(last.usage, request, found, last)


def check_usage(usage: RequestStats | None, request: Request, found: list[int], last: Output) -> None:
    """Check the figures of a request."""
    assert usage is not None
    assert usage.prompt_tokens == len(request.token_ids)
    assert 0 <= usage.cached_tokens < usage.prompt_tokens or usage.cached_tokens == 0
    assert usage.output_tokens == len(found) + (last.stop_id is not None)
    assert 0 <= usage.accepted <= usage.drafted
    assert (usage.first_token is None) == (usage.output_tokens == 0)
    if usage.first_token is not None and usage.last_token is not None:
        assert usage.queued <= usage.first_token <= usage.last_token


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
