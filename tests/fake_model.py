"""A model for tests of the engine: its cache and states hold token ids, and the next token is a hash of all before.

It checks what it is fed, and what it gives does not depend on how steps are packed: only on whether the pages and the
state of a sequence really hold its tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine.candidates import local_best, merge
from dllama_mpi.engine.engine import Context, Engine
from dllama_mpi.engine.lookup import MOST_DRAFTS, Lookup
from dllama_mpi.engine.request import Output, Request, SamplingParams
from dllama_mpi.engine.sampler import choose, row_of
from dllama_mpi.engine.scheduler import Limits
from dllama_mpi.engine.step import ROW, Step
from dllama_mpi.parallel.group import TensorParallelGroup

VOCABULARY = 12
CONTEXT = 40


def logits_after(tokens: list[int]) -> np.ndarray:
    """Return the logits (VOCABULARY,) float32 after a text."""
    digest = blake2b(bytes(str(tokens), "ascii"), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).normal(0, 2, VOCABULARY).astype(np.float32)


def state_after(tokens: list[int]) -> np.ndarray:
    """Return the hidden state (2,) float32 after a text."""
    return np.array([len(tokens), sum(tokens)], np.float32)


@dataclass
class FakeRunner:
    """Stands in for a runner; fed: tokens in all steps."""

    limits: Limits
    fed: int = 0
    steps: list[Step] = field(default_factory=list)
    watch: Any = None
    pooled: Any = None

    def __post_init__(self) -> None:
        self.cache = np.full((self.limits.pages, self.limits.page), -1, np.int64)
        self.near = np.full((self.limits.window_pages, self.limits.page), -1, np.int64)
        self.states: dict[int, list[int]] = {}

    def step(self, step: Step) -> list[np.ndarray]:
        """Carry out a step; return one rank's answer."""
        batch = Step.from_bytes(step.to_bytes()).batch
        assert batch.tokens > 0
        assert len(set(batch.owners.tolist())) == len(batch.owners)
        for source, target in batch.page_copies.tolist():
            self.cache[target] = self.cache[source]
        for source, target in batch.window_copies.tolist():
            self.near[target] = self.near[source]
        for source, target in batch.state_copies.tolist():
            self.states[target] = list(self.states[source])
        texts = [self._feed(batch, i) for i in range(batch.tokens)]
        self.fed += batch.tokens
        self.steps.append(step)
        if not len(batch.logit_rows):
            return []
        _, scored = step.ends
        self.pooled = np.array([state_after(texts[row]) for row in batch.logit_rows[scored:]], np.float32)
        if not scored:
            return []
        logits = np.stack([logits_after(texts[row]) for row in batch.logit_rows[:scored]])
        return [local_best(logits, step.rows[:scored], 0, int(step.rows["k"].max()))]

    def _feed(self, batch: Any, i: int) -> list[int]:
        slot, position, size = int(batch.slots[i]), int(batch.positions[i]), self.limits.page
        pages = batch.pages_of(slot)
        self.cache[pages[position // size], position % size] = batch.token_ids[i]
        text: list[int] = self.cache[pages[: position // size + 1]].reshape(-1)[: position + 1].tolist()
        if self.limits.window:
            self._feed_window(batch, i, text)
        else:
            assert not batch.has_windows
        if self.limits.slots:
            assert slot < self.limits.slots
            self.states[slot] = [*(self.states.get(slot, []) if position else []), int(batch.token_ids[i])]
            assert self.states[slot] == text
        return text

    def _feed_window(self, batch: Any, i: int, text: list[int]) -> None:
        """Check that layers with a window find the tokens that it sees, in the pages that their table has."""
        slot, position, size = int(batch.slots[i]), int(batch.positions[i]), self.limits.page
        first, pages = batch.window_of(slot)
        self.near[pages[position // size - first], position % size] = batch.token_ids[i]
        for seen in range(max(0, position + 1 - self.limits.window), position + 1):
            assert seen // size >= first
            assert self.near[pages[seen // size - first], seen % size] == text[seen]

    def full_logits(self, row: int) -> list[np.ndarray]:
        """Nothing is left out of the candidates of so few tokens."""
        raise AssertionError


class Guesser(Lookup):
    """Drafts what the model will say, with mistakes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def propose(self, tokens: list[int], most: int, cost: float) -> list[int]:
        """Return up to `most` tokens."""
        drafts: list[int] = []
        for _ in range(self._random.randint(0, min(most, MOST_DRAFTS))):
            right = int(logits_after([*tokens, *drafts]).argmax())
            drafts.append(right if self._random.random() < 0.8 else self._random.randrange(VOCABULARY))
        return drafts


def limits(**changes: Any) -> Limits:
    """Return limits with pages of 4 positions."""
    return Limits(**{"sequences": 4, "pages": 40, "chunk": 7, "page": 4} | changes)


def engine_of(
    limits: Limits, context: int = CONTEXT, max_queue: int | None = None, drafter: Any = None
) -> tuple[Engine, FakeRunner]:
    """Return an engine over a fake model."""
    runner: Any = FakeRunner(limits)
    group = TensorParallelGroup(None)
    return Engine(runner, group, Context(VOCABULARY, context, max_queue), limits, drafter), runner


def alone(request: Request, context: int = CONTEXT) -> tuple[list[int], str]:
    """Return the tokens that a request must get, and how it ends, run by itself."""
    p, tokens = request.params, list(request.token_ids)
    limit = context if p.max_tokens is None else min(context, len(tokens) + p.max_tokens)
    rng = np.random.default_rng(p.seed)
    while len(tokens) < limit:
        rows = np.array([row_of(p, len(request.token_ids), VOCABULARY)], ROW)
        (candidates,) = merge([local_best(logits_after(tokens)[None], rows, 0, int(rows["k"][0]))])
        token = choose(candidates, p, 0.0 if p.temperature == 0 else float(rng.random()))
        assert token is not None
        if token in request.stop_ids and not p.ignore_eos:
            return tokens[len(request.token_ids) :], "stop"
        tokens.append(token)
    return tokens[len(request.token_ids) :], "length"


def ask(prompt: list[int], stop: int | None = None, priority: int = 0, **params: Any) -> Request:
    """Return a request, greedy unless told otherwise."""
    given = SamplingParams(**{"temperature": 0.0, "seed": 1} | params)
    return Request(tuple(prompt), given, frozenset() if stop is None else frozenset([stop]), priority)


def run(engine: Engine) -> dict[int, list[Output]]:
    """Step until nothing is left; return every request's outputs."""
    outputs: dict[int, list[Output]] = {}
    for _ in range(10_000):
        if engine.is_idle:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.scheduler.cache.check(engine.scheduler.running)
    raise AssertionError("the engine comes to no end")


def tokens_of(outputs: list[Output]) -> list[int]:
    """Return the tokens of a request's outputs."""
    return [token for output in outputs for token in output.token_ids]


def pooled(prompt: list[int], pooling: str) -> Request:
    """Return a request for a prompt's hidden states."""
    return Request(tuple(prompt), SamplingParams(temperature=0.0), pooling=pooling)


def check_scores(prompt: list[int], count: int, outputs: list[Output]) -> None:
    """Check the log-probabilities of a prompt's tokens."""
    told = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    assert len(told) == 1
    assert len(told[0]) == len(prompt) - 1
    for i, found in enumerate(told[0]):
        logits = logits_after(prompt[: i + 1]).astype(np.float64)
        ref = logits - np.logaddexp.reduce(logits)
        assert found.logprob == pytest.approx(ref[prompt[i + 1]], abs=1e-5)
        best = np.argsort(-ref, kind="stable")[:count].tolist()
        assert [token for token, _ in found.top] == best
        assert [value for _, value in found.top] == pytest.approx(ref[best], abs=1e-5)


def check_hidden(prompt: list[int], pooling: str, outputs: list[Output]) -> None:
    """Check what came of a request for hidden states."""
    states = [state_after(prompt[: i + 1]) for i in range(len(prompt))]
    wanted = np.mean(states, axis=0) if pooling == "mean" else states[-1]
    (output,) = outputs
    assert output.finish_reason == "stop"
    assert output.token_ids == ()
    assert output.hidden is not None
    assert output.hidden.dtype == np.float32
    assert output.hidden.tolist() == pytest.approx(wanted.tolist())
    assert output.usage is not None
    assert (output.usage.prompt_tokens, output.usage.output_tokens) == (len(prompt), 0)
