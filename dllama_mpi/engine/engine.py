"""The root's engine: requests become steps, steps become tokens. It knows nothing of text or terminals."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from ..parallel.connection import Phase
from ..parallel.group import TensorParallelGroup
from ..parallel.star import measure_star
from .candidates import Candidates, merge, whole
from .rank_report import reports
from .request import Sequence
from .runner import Runner
from .sampler import choose, wanted
from .scheduler import Plan, Scheduler
from .stats import Stats, StepStats
from .step import ROW, Command, Step, Want


class Engine:
    """Runs on rank 0 and orders the workers about; every other rank is in `worker.serve` meanwhile."""

    def __init__(self, runner: Runner, group: TensorParallelGroup, vocab_size: int, scheduler: Scheduler) -> None:
        self.runner, self.group, self.vocab_size, self.scheduler = runner, group, vocab_size, scheduler
        self.measures_links = False  # at the end of each call

    def run(self, sequences: list[Sequence], stats: Stats) -> Iterator[tuple[Sequence, int, str]]:
        """Generate until all sequences are finished; yield (sequence, token, finished text) for each token.

        A sequence whose finish_reason is set from outside is dropped at the next step.
        """
        for sequence in sequences:
            self.scheduler.add(sequence)
        stats.prompt_tokens += sum(s.prompt_length for s in sequences)
        stats.speculates = stats.speculates or any(s.lookup is not None for s in sequences)
        started = time.perf_counter()
        try:
            while (plan := self.scheduler.next_plan()) is not None:
                for sequence, token, piece in self._step(plan, stats):
                    if stats.first_token_seconds is None:
                        stats.first_token_seconds = time.perf_counter() - started
                    stats.output_tokens += 1
                    yield sequence, token, piece
        finally:
            self.scheduler.clear()
            self.group.watchdog.tell(Phase.IDLE)

    def _step(self, plan: Plan, stats: Stats) -> list[tuple[Sequence, int, str]]:
        traffic, begun = self.group.traffic, time.perf_counter()
        waited, sent, received = traffic.seconds, traffic.sent, traffic.received
        rows = np.zeros(len(plan.sequences), ROW)
        for row, sequence in zip(rows, plan.sequences, strict=True):
            p = sequence.params
            row["k"], row["prompt"] = wanted(p, self.vocab_size), sequence.prompt_length
            row["temperature"], row["repeat"] = p.temperature, p.repeat_penalty
            row["presence"], row["frequency"] = p.presence_penalty, p.frequency_penalty
        answers = self._order(Step(plan.batch, rows, Want.CANDIDATES))
        plan.commit()
        drafted = sum(draft >= 0 for draft in plan.drafts)
        taken, accepted = self._take(plan, answers, stats)
        step = StepStats(
            tokens=plan.batch.tokens - (drafted - accepted),
            seconds=time.perf_counter() - begun,
            sync_seconds=traffic.seconds - waited,
            sent=traffic.sent - sent,
            received=traffic.received - received,
            drafted=drafted,
            accepted=accepted,
        )
        (stats.prefill if plan.is_prefill else stats.decode).append(step)
        if stats.speculates and not plan.is_prefill:
            self.scheduler.draft_cost.observe(drafted, step.seconds)
        return taken

    def _take(self, plan: Plan, answers: list[np.ndarray], stats: Stats) -> tuple[list[tuple[Sequence, int, str]], int]:
        """Choose each row's token; return what the sequences took, with its text, and how many drafts were right.

        Drafts change no distribution: a token is drawn as without them, and the row after a draft counts only where
        the draft is what was drawn.
        """
        taken, accepted, counts, previous = [], 0, True, -1
        rows = zip(plan.sequences, plan.drafts, merge(answers), strict=True) if plan.sequences else ()
        for i, (sequence, draft, candidates) in enumerate(rows):
            if previous < 0 or counts:
                token = self._choose(sequence, candidates, i, stats)
                taken.append((sequence, token, sequence.append(token)))
                accepted += token == draft
                sequence.computed += token == draft
                counts = token == draft and sequence.finish_reason is None
            previous = draft
        return taken, accepted

    def _choose(self, sequence: Sequence, candidates: Candidates, index: int, stats: Stats) -> int:
        greedy = sequence.params.temperature == 0
        value = 0.0 if greedy else float(sequence.rng.random())
        token = choose(candidates, sequence.params, value)
        if token is None:
            stats.full_gathers += 1
            self.group.send_command(Command.FULL_LOGITS, np.int32(index).tobytes())
            parts = self.runner.full_logits(index)
            assert parts is not None
            token = choose(whole(np.concatenate(parts), sequence.params.temperature), sequence.params, value)
            assert token is not None
        return token

    def logits(self, plan: Plan) -> np.ndarray:
        """Return all logits (rows, vocabulary) float32 of a batch."""
        answers = self._order(Step(plan.batch, np.zeros(len(plan.batch.logit_rows), ROW), Want.FULL))
        return np.concatenate(answers, axis=1)

    def scores(self, plan: Plan, targets: np.ndarray) -> np.ndarray:
        """Return the natural log-probability (rows,) float64 of a target token for each logit row of a batch."""
        rows = np.zeros(len(targets), ROW)
        rows["target"] = targets
        parts = np.stack(self._order(Step(plan.batch, rows, Want.SCORES)))
        scores: np.ndarray = parts[:, :, 1].max(axis=0) - np.logaddexp.reduce(parts[:, :, 0], axis=0)
        return scores

    def _order(self, step: Step) -> list[np.ndarray]:
        self.group.send_command(Command.STEP, step.to_bytes())
        answers = self.runner.step(step)
        assert answers is not None
        return answers

    def times(self, stats: Stats) -> None:
        """Ask every rank what it did since the last time, and put that into the statistics."""
        self.group.send_command(Command.TIMES, bytes([self.measures_links]))
        stats.payload, stats.sync = self.group.payload, self.group.choices
        times = self.group.allgather(self.runner.watch.report())
        hosts = self.group.hosts
        stats.ranks = reports(hosts, times, measure_star(self.group.comm, hosts) if self.measures_links else None)
