"""The root's engine: requests become steps, steps become tokens. It knows nothing of text or terminals."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from ..errors import QueueFull, RequestError
from ..parallel.connection import Phase
from ..parallel.group import TensorParallelGroup
from ..parallel.star import measure_star
from .candidates import Candidates, merge, whole
from .lookup import Lookup
from .plan import Plan
from .rank_report import reports
from .request import POOLINGS, Output, Request, SamplingParams, is_integer
from .runner import Runner
from .sampler import POOLED_ROW, choose, logprobs_of, row_of, score_row
from .scheduler import Limits, Scheduler
from .sequence import Sequence
from .stats import EngineStats, SequenceStats, Stats, StepStats
from .step import BIAS, ROW, Command, Step, Want


@dataclass(frozen=True)
class Context:
    """What requests must keep to: ids below vocab_size, max_seq_len tokens, max_queue that wait (None: any number)."""

    vocab_size: int
    max_seq_len: int
    max_queue: int | None = None


class Engine:
    """Runs on rank 0 and orders the workers about; every other rank is in `worker.serve` meanwhile.

    `add`, `cancel`, `wait`, `snapshot` and `is_idle` may be used by any thread, and by signal handlers; `step` and the
    others by one thread only.

    Attributes:
        last_step: figures of the last step, or None if there was nothing to do.
    """

    def __init__(
        self,
        runner: Runner,
        group: TensorParallelGroup,
        context: Context,
        limits: Limits,
        drafter: Callable[[], Lookup] | None = None,
    ) -> None:
        """Make an engine. drafter: makes what drafts a request's tokens; None: no speculation."""
        self.runner, self.group, self.context = runner, group, context
        self.scheduler = Scheduler(limits)
        self.last_step: StepStats | None = None
        self._drafter = drafter
        self._ids = itertools.count(1)
        self._changed = threading.Condition(threading.RLock())
        self._inbox: deque[Sequence | int] = deque()  # requests, and the ids of those to cancel
        self._sequences: dict[int, Sequence] = {}
        self._prompt_tokens = self._output_tokens = self._full_gathers = 0
        self._stats = self._count()

    # ---- from any thread

    def add(self, request: Request) -> int:
        """Queue a request; return its id, by which its outputs are known.

        Raises:
            RequestError: no tokens, ids out of range, or a prompt longer than the context. QueueFull: try later.
        """
        self.check(request.token_ids, request.params)
        p, seed = request.params, request.params.seed
        n, most = len(request.token_ids), self.context.max_seq_len
        limit = most if p.max_tokens is None else min(most, n + p.max_tokens)
        if request.pooling not in (None, *POOLINGS):
            raise RequestError(f"pooling is {request.pooling!r}; it must be one of {', '.join(POOLINGS)}")
        rng = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
        drafter = self._drafter if request.constraint is None and request.pooling is None else None
        lookup = drafter() if drafter is not None else None
        with self._changed:
            waiting, allowed = self._waiting(), self.context.max_queue
            if allowed is not None and waiting >= allowed:
                raise QueueFull(f"{waiting} requests wait, as many as may; try again later or raise --max-queue")
            sequence = Sequence(next(self._ids), request, limit, rng, lookup)
            self._inbox.append(sequence)
            self._changed.notify_all()
        return sequence.id

    def check(self, token_ids: Collection[int], params: SamplingParams | None = None) -> None:
        """Check a prompt, and the token ids among parameters.

        Raises:
            RequestError: no tokens, ids out of range, or a prompt longer than the context.
        """
        ids, size, most = token_ids, self.context.vocab_size, self.context.max_seq_len
        if not ids:
            raise RequestError("the prompt has no tokens; give at least one")
        for token in itertools.chain(ids, params.logit_bias if params is not None else ()):
            if not is_integer(token):
                raise RequestError(f"token id {token!r} is no integer")
            if not 0 <= token < size:
                raise RequestError(f"token id {token} is out of range; the vocabulary has ids 0 to {size - 1}")
        if len(ids) > most:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the context holds {most}; shorten it or raise --max-seq-len"
            )

    def cancel(self, request_id: int) -> None:
        """End a request before the next step, with finish_reason "abort"; without effect once it is over."""
        with self._changed:
            self._inbox.append(request_id)
            self._changed.notify_all()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: nothing runs or waits."""
        return not self._inbox and not self._sequences

    def wait(self, timeout: float | None = None) -> None:
        """Sleep until there is something to do, or for `timeout` seconds."""
        with self._changed:
            if self.is_idle:
                self._changed.wait(timeout)

    def snapshot(self) -> EngineStats:
        """Return figures as of the last step."""
        return self._stats

    def _waiting(self) -> int:
        return len(self.scheduler.waiting) + sum(isinstance(each, Sequence) for each in list(self._inbox))

    # ---- steps

    def step(self) -> list[Output]:
        """Make one step on all ranks; return what it gave, nothing where there was nothing to do."""
        self.last_step = None
        try:
            self._take_inbox()
            plan = self.scheduler.next_plan()
            if plan is not None:
                self._carry_out(plan)
        except BaseException:
            self.reset()
            raise
        outputs = [output for s in self._sequences.values() if (output := s.take_output()) is not None]
        for output in outputs:
            if output.finish_reason is not None:
                self.scheduler.remove(self._sequences.pop(output.id))
        self._stats = self._count()
        if not self._sequences:
            self.group.watchdog.tell(Phase.IDLE)
        return outputs

    def drop(self) -> None:
        """End every request without a word; what is computed of them stays of use."""
        self._inbox.clear()
        for sequence in self._sequences.values():
            self.scheduler.remove(sequence)
        self._sequences.clear()
        self._stats = self._count()
        self.group.watchdog.tell(Phase.IDLE)

    def reset(self) -> None:
        """Drop every request without a word, and what is remembered of former ones."""
        self._inbox.clear()
        self._sequences.clear()
        self.scheduler.reset()
        self._stats = self._count()
        self.group.watchdog.tell(Phase.IDLE)

    def _take_inbox(self) -> None:
        while self._inbox:
            each = self._inbox.popleft()
            if isinstance(each, Sequence):
                self._sequences[each.id] = each
                self._prompt_tokens += each.prompt_length
                if each.finish_reason is None:
                    self.scheduler.add(each)
            elif (sequence := self._sequences.get(each)) is not None and sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                self.scheduler.remove(sequence)

    def _carry_out(self, plan: Plan) -> None:
        traffic, begun = self.group.traffic, time.perf_counter()
        waited, sent, received = traffic.seconds, traffic.sent, traffic.received
        biases = [(i, *each) for i, s in enumerate(plan.sequences) for each in s.params.logit_bias.items()]
        rows = self._rows(plan)
        answers = self._order(Step(plan.batch, rows, Want.CANDIDATES, np.array(biases, BIAS), *_masks(plan)))
        plan.commit()
        gathers, drafted = self._full_gathers, sum(draft >= 0 for draft in plan.drafts)
        outputs, accepted = self._take(plan, answers)
        self.scheduler.settle(plan)
        self._output_tokens += outputs
        self.last_step = step = StepStats(
            tokens=plan.batch.tokens - (drafted - accepted),
            seconds=time.perf_counter() - begun,
            sync_seconds=traffic.seconds - waited,
            sent=traffic.sent - sent,
            received=traffic.received - received,
            drafted=drafted,
            accepted=accepted,
            prompt=plan.prompt,
            full_gathers=self._full_gathers - gathers,
        )
        self.scheduler.budget.observe(plan.prompt, plan.generating, step.seconds)
        if self._drafter is not None and not plan.is_prefill:
            self.scheduler.draft_cost.observe(drafted, step.seconds)

    def _rows(self, plan: Plan) -> np.ndarray:
        """Return what is wanted of each logit row."""
        size, told = self.context.vocab_size, {s: s.told for s in plan.scored}
        rows = [row_of(s.params, s.prompt_length, size) for s in plan.sequences]
        for s in plan.scored:
            told[s] += 1
            rows.append(score_row(s.params.prompt_logprobs or 0, s.tokens[told[s]], size))
        return np.array([*rows, *[POOLED_ROW] * len(plan.pooled)], ROW)

    def _take(self, plan: Plan, answers: list[np.ndarray]) -> tuple[int, int]:
        """Take a step's answers; return how many tokens the sequences took, and how many drafts were right."""
        candidates, chosen = merge(answers), len(plan.sequences)
        for s, each in zip(plan.scored, candidates[chosen:], strict=True):
            s.tell(logprobs_of(each, -1, s.params.prompt_logprobs or 0))
        for s, hidden in zip(plan.pooled, self.runner.pooled if plan.pooled else (), strict=True):
            s.pool(hidden)
        for s, _ in plan.fed:
            s.finish_reading()
        return self._take_tokens(plan, candidates[:chosen])

    def _take_tokens(self, plan: Plan, found: list[Candidates]) -> tuple[int, int]:
        """Choose each row's token; return how many the sequences took, and how many drafts were right.

        Drafts change no distribution: a token is drawn as without them, and the row after a draft counts only where
        the draft is what was drawn.
        """
        taken, accepted, counts, previous = 0, 0, True, -1
        for i, (s, draft, candidates) in enumerate(zip(plan.sequences, plan.drafts, found, strict=True)):
            if previous < 0 or counts:
                token, used = self._choose(s, candidates, i)
                s.append(token, None if s.params.logprobs is None else logprobs_of(used, token, s.params.logprobs))
                taken, accepted = taken + 1, accepted + (token == draft)
                s.computed += token == draft
                s.accepted += token == draft
                counts = token == draft and s.finish_reason is None
            previous = draft
        return taken, accepted

    def _choose(self, s: Sequence, candidates: Candidates, index: int) -> tuple[int, Candidates]:
        """Return a row's token, and the candidates it was chosen from."""
        value = 0.0 if s.params.temperature == 0 else float(s.rng.random())
        token = choose(candidates, s.params, value)
        if token is None:
            self._full_gathers += 1
            self.group.send_command(Command.FULL_LOGITS, np.int32(index).tobytes())
            parts = self.runner.full_logits(index)
            assert parts is not None
            candidates = whole(np.concatenate(parts), s.params.temperature)
            token = choose(candidates, s.params, value)
            assert token is not None
        return token, candidates

    def _order(self, step: Step) -> list[np.ndarray]:
        self.group.send_command(Command.STEP, step.to_bytes())
        answers = self.runner.step(step)
        assert answers is not None
        return answers

    # ---- a text by itself

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Return all logits (tokens, vocabulary) float32 of a text.

        Raises:
            RequestError: running requests hold the memory that it needs.
        """
        parts = [self._order(Step.of(batch, Want.FULL)) for batch in self.scheduler.batches(token_ids)]
        self.group.watchdog.tell(Phase.IDLE)
        return np.concatenate([np.concatenate(answers, axis=1) for answers in parts])

    def scores(self, token_ids: list[int], read: Callable[[int], object] = int) -> np.ndarray:
        """Return the natural log-probability (tokens - 1,) float64 of each token of a text but the first.

        read: called after each step with the number of tokens that it fed.

        Raises:
            RequestError: running requests hold the memory that it needs.
        """
        scores, targets = [np.zeros(0)], np.array(token_ids, np.int32)
        for batch in self.scheduler.batches(token_ids[:-1]):
            step = Step.of(batch, Want.SCORES)
            step.rows["target"] = targets[batch.positions + 1]
            parts = np.stack(self._order(step))
            scores.append(parts[:, :, 1].max(axis=0) - np.logaddexp.reduce(parts[:, :, 0], axis=0))
            read(batch.tokens)
        self.group.watchdog.tell(Phase.IDLE)
        return np.concatenate(scores)

    # ---- figures

    def times(self, stats: Stats, measure_links: bool = False) -> None:
        """Ask every rank what it did since the last time, and put that into the statistics."""
        self.group.send_command(Command.TIMES, bytes([measure_links]))
        stats.payload, stats.sync = self.group.payload, self.group.choices
        times = self.group.allgather(self.runner.watch.report())
        hosts = self.group.hosts
        stats.ranks = reports(hosts, times, measure_star(self.group.comm, hosts) if measure_links else None)

    def _count(self) -> EngineStats:
        scheduler, pages, near = self.scheduler, self.scheduler.pages, self.scheduler.cache.near
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_total=pages.count,
            pages_used=pages.used,
            pages_cached=pages.cached,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            output_tokens=self._output_tokens,
            preemptions=scheduler.preemptions,
            window_pages_total=near.count,
            window_pages_used=near.used,
            window_pages_cached=near.cached,
            sequences=tuple(
                SequenceStats(s.id, s.slot, s.prompt_length, s.computed, len(s.tokens) - s.prompt_length, s.runs)
                for s in self._sequences.values()
            ),
        )


def _masks(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows of a step are constrained, and their masks."""
    found = [(i, s.request.constraint) for i, s in enumerate(plan.sequences)]
    masked = [(i, constraint.mask()) for i, constraint in found if constraint is not None]
    if not masked:
        return np.zeros(0, np.int32), np.zeros((0, 0), np.uint32)
    return np.array([i for i, _ in masked], np.int32), np.stack([mask for _, mask in masked])
