"""Which tokens go into the next step: continuous batching with prefill in chunks, drafts to be checked."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from ..model.batch import Batch
from .lookup import MOST_DRAFTS, DraftCost
from .request import Sequence


@dataclass(frozen=True)
class Plan:
    """A step's batch, the sequences whose logits it wants (one a logit row), and whether it feeds prompts.

    Attributes:
        fed: how many tokens of which sequence the batch holds, drafts left out.
        drafts: for each logit row the token drafted to follow, which the next row's token is; -1 for none.
    """

    batch: Batch
    sequences: list[Sequence]
    is_prefill: bool
    fed: tuple[tuple[Sequence, int], ...] = ()
    drafts: tuple[int, ...] = ()

    def commit(self) -> None:
        """Count the batch's tokens as computed, once the step has been carried out; drafts are not counted yet."""
        for sequence, count in self.fed:
            sequence.computed += count


class Scheduler:
    """Gives waiting sequences a slot and packs steps of up to `chunk` prompt tokens and, for each running sequence,
    one token and up to `MOST_DRAFTS` drafts.

    Attributes:
        reuse: whether a sequence may start from what its slot's last one left in the KV cache. rewinds: whether what a
            slot remembers can go back to any position; a state (`ModelConfig.has_state`) stands behind its last one.
        draft_cost: of a drafted token.
    """

    def __init__(self, slots: int, chunk: int, rewinds: bool = True) -> None:
        self.chunk, self.reuse, self.rewinds = chunk, False, rewinds
        self.draft_cost = DraftCost()
        self._cached: list[list[int]] = [[] for _ in range(slots)]  # the tokens that each slot's KV cache holds
        self._free = list(range(slots))[::-1]
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def cancel(self) -> None:
        """End every sequence before its next step. Safe in a signal handler: it only marks them."""
        for sequence in [*self._running, *self._waiting]:
            sequence.finish_reason = sequence.finish_reason or "abort"

    def clear(self) -> None:
        """Drop every sequence."""
        for sequence in self._running:
            self._release(sequence)
        self._running, self._waiting = [], deque()

    def forget(self, slot: int) -> None:
        """Count a slot's KV cache as empty: something else was written there."""
        self._cached[slot] = []

    def _release(self, sequence: Sequence) -> None:
        self._cached[sequence.slot] = sequence.tokens[: sequence.computed]
        self._free.append(sequence.slot)

    def _admit(self, sequence: Sequence) -> None:
        useful = {slot: self._useful(slot, sequence.tokens) if self.reuse else 0 for slot in self._free}
        sequence.slot = max(self._free, key=lambda slot: useful[slot])
        sequence.computed = useful[sequence.slot]
        self._free.remove(sequence.slot)
        self._running.append(sequence)

    def _useful(self, slot: int, tokens: list[int]) -> int:
        """Return how many of these tokens need not be fed to a slot; the last one must be, for its logits."""
        cached = self._cached[slot]
        common = min(_common(cached, tokens), len(tokens) - 1)
        return common if self.rewinds or common == len(cached) else 0

    def next_plan(self) -> Plan | None:
        """Return the next step, or None when nothing is left to do."""
        for sequence in [s for s in self._running if s.finish_reason is not None]:
            self._running.remove(sequence)
            self._release(sequence)
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            if sequence.finish_reason is None:
                self._admit(sequence)
        if not self._running:
            return None
        return self._pack()

    def _pack(self) -> Plan:
        room, is_prefill = self.chunk, False
        columns: list[list[int]] = [[], [], [], []]
        rows: list[int] = []
        wanted: list[Sequence] = []
        expected: list[int] = []
        fed: list[tuple[Sequence, int]] = []
        for sequence in self._running:
            left = len(sequence.tokens) - sequence.computed
            prompt = sequence.computed < sequence.prompt_length
            count = min(left, room) if prompt else left
            if count == 0:
                continue
            if prompt:
                room, is_prefill = room - count, True
            drafts = [] if prompt else self._draft(sequence)
            positions = range(sequence.computed, sequence.computed + count + len(drafts))
            columns[0] += [*sequence.tokens[positions.start : positions.start + count], *drafts]
            columns[1] += positions
            columns[2] += [sequence.slot] * len(positions)
            columns[3] += [max(sequence.prompt_length, p + 1) for p in positions]
            fed.append((sequence, count))
            if count == left:
                rows += range(len(columns[0]) - 1 - len(drafts), len(columns[0]))
                wanted += [sequence] * (1 + len(drafts))
                expected += [*drafts, -1]
        ids, where, slots, lengths = (np.array(c, np.int32) for c in columns)
        batch = Batch(ids, where, slots, lengths, np.array(rows, np.int32))
        return Plan(batch, wanted, is_prefill, tuple(fed), tuple(expected))

    def _draft(self, sequence: Sequence) -> list[int]:
        if sequence.lookup is None:
            return []
        most = min(MOST_DRAFTS, sequence.limit - len(sequence.tokens) - 1)  # one more token comes in any case
        # The step serves all running sequences: to each it costs its part of the whole.
        return sequence.lookup.propose(sequence.tokens, most, self.draft_cost.share * len(self._running))


def _common(first: list[int], second: list[int]) -> int:
    """Return the length of two lists' common beginning."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
