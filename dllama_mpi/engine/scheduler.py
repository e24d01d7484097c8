"""Which tokens go into the next step: continuous batching over pages of memory, prefill in chunks beside decoding.

Sequences are admitted in the order of their ranks, when there are pages for all their tokens. A running sequence that
needs a page when there is none gets that of the youngest, which waits and begins anew later: its tokens are fed again,
as far as their pages are gone.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import RequestError
from ..kernels.layout import PAGE
from ..model.batch import Batch
from ..startup.options import MAX_STEP_MS
from .budget import Budget
from .lookup import MOST_DRAFTS, DraftCost
from .pages import ROOT, Pages, chain, common
from .plan import Packing, Plan
from .sequence import Sequence
from .states import Checkpoint, Slots

LEAST_COPIED = 16  # tokens for which a page is copied, or another sequence waited for
AGING = 0.25  # of the prompt tokens that were fed while one waited, counted against what is left of it


@dataclass(frozen=True)
class Limits:
    """What a scheduler has to give.

    Attributes:
        sequences: at once. pages: of the KV cache. chunk: most prompt tokens a step. drafts: most in a step.
        slots: places for states, checkpoints included; 0: the model has none.
        shares: whether sequences use what others have computed.
        max_step_ms, responsive: see `Options`. page: positions of a page.
    """

    sequences: int
    pages: int
    chunk: int
    drafts: int = 0
    slots: int = 0
    shares: bool = True
    max_step_ms: float = MAX_STEP_MS
    responsive: bool = False
    page: int = PAGE


class _Start(NamedTuple):
    """Where a sequence can begin: pages to share, one to copy (or -1), tokens that these hold, and a state (or -1)."""

    pages: list[int]
    source: int
    held: int
    slot: int = -1


class Scheduler:
    """Admits sequences and packs steps.

    Attributes:
        waiting, running: sequences by rank. preemptions: how many times one had to give up its pages.
        cached_tokens: of all prompts, that need not be fed, since others had computed them.
        draft_cost: of a drafted token. budget: of prompt tokens.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pages = Pages(limits.pages, limits.shares, limits.page)
        self.slots = Slots(limits.slots or limits.sequences)
        self.budget = Budget(limits.chunk, limits.max_step_ms / 1e3, limits.responsive)
        self.draft_cost = DraftCost()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.cached_tokens = 0
        self._fed = 0  # prompt tokens in all steps
        self._page_copies: list[tuple[int, int]] = []
        self._state_copies: list[tuple[int, int]] = []

    # ---- coming and going

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, sequence, key=lambda s: s.rank)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence; its pages are free, or remembered for others."""
        if sequence.runs:
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def reset(self) -> None:
        """Drop every sequence, and forget all that is remembered: a step came to no good end."""
        for sequence in list(self.running):
            sequence.computed = sequence.recorded = 0
            self._release(sequence)
        self.waiting, self._page_copies, self._state_copies = [], [], []
        self.forget()

    def forget(self) -> None:
        """Forget what finished sequences have left."""
        self.pages.forget()
        self.slots.forget()

    def settle(self, plan: Plan) -> None:
        """Note what the pages hold, once the step's tokens have been taken."""
        size = self.pages.size
        for s, _ in plan.fed:
            s.computed = min(s.computed, len(s.tokens))
            while s.recorded < s.computed:
                at, stop = s.recorded // size, min(s.computed, (s.recorded // size + 1) * size)
                s.pages[at] = self.pages.record(s.pages[at], s.tokens[s.recorded : stop])
                s.recorded = stop

    def _release(self, s: Sequence) -> None:
        """Take all that a running sequence holds."""
        self.running.remove(s)
        if self.limits.slots and self.limits.shares and s.recorded:
            at = s.recorded // self.pages.size
            rest = tuple(s.tokens[at * self.pages.size : s.recorded])
            self.slots.keep(s.slot, Checkpoint(self._key(s, at), rest))
        else:
            self.slots.free(s.slot)
        self.pages.release(s.pages)
        s.pages, s.slot = [], -1

    def batches(self, token_ids: list[int]) -> Iterator[Batch]:
        """Yield the batches that feed a text by itself, all of its logits wanted, in memory that is free for now.

        Raises:
            RequestError: running sequences hold that memory.
        """
        count = self.pages.needed(len(token_ids))
        if self.pages.available < count or len(self.running) >= self.limits.sequences:
            raise RequestError("running requests hold the memory that this needs; try again later")
        slot, pages = self.slots.take(), [self.pages.take(ROOT) for _ in range(count)]
        try:
            for start in range(0, len(token_ids), self.limits.chunk):
                part = token_ids[start : start + self.limits.chunk]
                positions, n = range(start, start + len(part)), len(part)
                columns = (part, positions, [slot] * n, [len(token_ids)] * n)
                yield Batch.of(columns, range(n), {slot: pages}, *self._take_copies())
        finally:
            self.pages.release(pages)
            self.slots.free(slot)

    def _take_copies(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        copies = self._page_copies, self._state_copies
        self._page_copies, self._state_copies = [], []
        return copies

    # ---- what is there already

    def _key(self, s: Sequence, pages: int) -> bytes:
        """Return the key of a sequence's first pages."""
        size = self.pages.size
        while len(s.keys) <= pages:
            at = len(s.keys) - 1
            s.keys.append(chain(s.keys[at], s.tokens[at * size : (at + 1) * size]))
        return s.keys[pages]

    def _find(self, s: Sequence) -> _Start:
        """Return what is there of a waiting sequence's tokens; the last must be fed, for its logits."""
        if not self.limits.shares or s.reads_all:
            return _Start([], -1, 0)
        size, most = self.pages.size, len(s.tokens) - 1
        pages: list[int] = []
        while (len(pages) + 1) * size <= most and (page := self.pages.full(self._key(s, len(pages) + 1))) is not None:
            pages.append(page)
        if self.limits.slots:
            return self._find_state(s, pages)
        done = len(pages) * size
        source, count = self.pages.best(self._key(s, len(pages)), s.tokens[done : min(done + size, most)])
        return _Start(pages, source, done + count) if count >= LEAST_COPIED else _Start(pages, -1, done)

    def _find_state(self, s: Sequence, pages: list[int]) -> _Start:
        """Return the furthest state from which a sequence can go on; note where its own should be kept.

        That is where it turns off from what others have computed, and at the last full page of its tokens.
        """
        size, most = self.pages.size, len(s.tokens) - 1
        found = _Start([], -1, 0)
        for at in range(len(pages), -1, -1):
            first = at * size
            slot, count = self.slots.best(self._key(s, at), s.tokens[first : min(first + size, most)])
            source, held = self.pages.best(self._key(s, at), s.tokens[first : first + count]) if count > 0 else (-1, 0)
            if slot >= 0 and held >= count and first + count > 0:
                found = _Start(pages[:at], source, first + count, slot)
                break
        s.saves = frozenset(p for p in (len(pages) * size, most // size * size) if p > found.held)
        return found

    # ---- admission

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.sequences:
            s = self.waiting[0]
            start = self._find(s)
            promised = sum(max(0, self._needed(r) - len(r.pages)) for r in self.running)
            idle = sum(self.pages.is_idle(page) for page in start.pages)
            if self.pages.available - idle - promised < self._needed(s) - len(start.pages):
                return
            self.waiting.pop(0)
            self._begin(s, start)

    def _needed(self, s: Sequence) -> int:
        return self.pages.needed(min(s.limit, len(s.tokens) + 1))

    def _begin(self, s: Sequence, start: _Start) -> None:
        """Give a sequence its slot, and what is there of its tokens."""
        if start.slot >= 0 and not self.slots.has_free:
            s.slot = self.slots.take_over(start.slot)
        else:
            s.slot = self.slots.take()
            if start.slot >= 0:
                self._state_copies.append((start.slot, s.slot))
        s.pages = [self.pages.share(page) for page in start.pages]
        s.computed = s.recorded = len(s.pages) * self.pages.size
        if start.source >= 0:
            self._copy(s, start.source, start.held)
        s.joined = self._fed
        self._count_cached(s, s.computed)
        insort(self.running, s, key=lambda r: r.rank)

    def _copy(self, s: Sequence, source: int, count: int) -> None:
        """Copy a page to where a sequence goes on, of which it holds the tokens up to `count`."""
        at = s.computed // self.pages.size
        if len(s.pages) == at:
            s.pages.append(self.pages.take(self._key(s, at)))
        if s.pages[at] != source:  # a page that was the last to be had holds it already
            self._page_copies.append((source, s.pages[at]))
        s.pages[at] = self.pages.record(s.pages[at], s.tokens[s.computed : count])
        s.computed = s.recorded = count

    # ---- packing

    def next_plan(self) -> Plan | None:
        """Return the next step, or None when nothing is left to do."""
        for _ in range(3 + len(self.running)):
            self._admit()
            if not self.running:
                return None
            packing = self._pack()
            if packing.fed:
                return self._plan(packing)
        raise RuntimeError("no sequence can be fed")

    def _plan(self, packing: Packing) -> Plan:
        self._fed += packing.prompt
        tables = {s.slot: s.pages for s, _ in packing.fed}
        rows = [*packing.rows, *(row for row, _ in (*packing.scored, *packing.pooled))]
        batch = Batch.of(packing.columns, rows, tables, *self._take_copies())
        scored, pooled = (tuple(s for _, s in each) for each in (packing.scored, packing.pooled))
        fed, drafts = tuple(packing.fed), tuple(packing.drafts)
        return Plan(batch, packing.wanted, fed, drafts, packing.prompt, packing.generating, scored, pooled)

    def _pack(self) -> Packing:
        packing = Packing()
        drafts = self.limits.drafts
        for s in [s for s in self.running if not s.is_reading]:
            if s.runs and self._room(s, len(s.tokens), packing) >= len(s.tokens):
                proposed = self._draft(s, drafts)
                drafts -= len(proposed)
                packing.add(s, 1, proposed)
        budget = self.budget.tokens(packing.generating)
        for s in sorted((s for s in self.running if s.is_reading), key=self._urgency):
            if budget > 0 and s.runs:
                budget -= self._read(s, budget, packing)
        return packing

    def _urgency(self, s: Sequence) -> tuple[int, float, int]:
        """Return the order in which prompts are read: the shortest rest first, but nobody waits for ever."""
        return -s.request.priority, s.left - AGING * (self._fed - s.joined), s.id

    def _read(self, s: Sequence, budget: int, packing: Packing) -> int:
        """Feed more of a prompt; return how many tokens."""
        if self.limits.slots:
            if s.computed in s.saves:
                self._save(s)
        elif self.limits.shares and not s.reads_all:
            self._adopt_pages(s)
            if any(self._is_ahead(other, s, packing) for other in self.running):
                return 0
            self._adopt_part(s)
        most = min([s.left, budget, *(p - s.computed for p in s.saves if p > s.computed)])
        count = self._room(s, s.computed + most, packing) - s.computed
        if count <= 0:
            return 0
        packing.add(s, count, [])
        return count

    def _draft(self, s: Sequence, most: int) -> list[int]:
        if s.lookup is None:
            return []
        here = len(s.pages) * self.pages.size - len(s.tokens)  # a page is not taken for drafts
        most = min(MOST_DRAFTS, most, here, s.limit - len(s.tokens) - 1)  # one more token comes in any case
        # The step serves all running sequences: to each it costs its part of the whole.
        return s.lookup.propose(s.tokens, most, self.draft_cost.share * len(self.running)) if most > 0 else []

    def _save(self, s: Sequence) -> None:
        """Keep a copy of a sequence's state as it is."""
        what = Checkpoint(self._key(s, s.computed // self.pages.size))
        s.saves -= {s.computed}
        if not self.slots.has(what):
            slot = self.slots.take()
            self._state_copies.append((s.slot, slot))
            self.slots.keep(slot, what)

    def _adopt_pages(self, s: Sequence) -> None:
        """Go on behind the pages that others have computed of a sequence's tokens since it was admitted."""
        size, most, before = self.pages.size, len(s.tokens) - 1, s.computed
        while s.computed % size == 0 and s.computed + size <= most:
            at = s.computed // size
            page = self.pages.full(self._key(s, at + 1))
            if page is None:
                break
            self.pages.release(s.pages[at:])
            s.pages[at:] = [self.pages.share(page)]
            s.computed = s.recorded = s.computed + size
        self._count_cached(s, s.computed - before)

    def _adopt_part(self, s: Sequence) -> None:
        """Go on behind the part of a page that others have computed."""
        size, most, before = self.pages.size, len(s.tokens) - 1, s.computed
        at, first = s.computed // size, s.computed // size * size
        source, count = self.pages.best(self._key(s, at), s.tokens[first : min(first + size, most)])
        if first + count - s.computed >= LEAST_COPIED and (len(s.pages) > at or self.pages.available):
            self._copy(s, source, first + count)
        self._count_cached(s, s.computed - before)

    def _count_cached(self, s: Sequence, tokens: int) -> None:
        if not s.preempted:
            s.cached += tokens
            self.cached_tokens += tokens

    def _is_ahead(self, other: Sequence, s: Sequence, packing: Packing) -> bool:
        """Return whether another sequence is computing what this one needs next."""
        size, at = self.pages.size, s.computed // self.pages.size
        leads = other.computed > s.computed or (other.computed == s.computed and other in packing.granted)
        if other is s or not leads or other.computed // size != at or self._key(other, at) != self._key(s, at):
            return False
        first, last = at * size, min((at + 1) * size, len(s.tokens) - 1)
        end = first + common(s.tokens[first:last], other.tokens[first : first + size])
        return (end == first + size or end - s.computed >= LEAST_COPIED) and other.computed < end

    # ---- memory

    def _room(self, s: Sequence, positions: int, packing: Packing) -> int:
        """Take pages for a sequence's first positions, as far as there are any; return for how many there are."""
        while len(s.pages) * self.pages.size < positions:
            if not self.pages.available and not self._preempt(s, packing):
                break
            s.pages.append(self.pages.take(self._key(s, len(s.pages))))
        return min(positions, len(s.pages) * self.pages.size)

    def _preempt(self, s: Sequence, packing: Packing) -> bool:
        """Have a sequence give up its pages, younger than the one that needs some; return whether there are any now.

        What is in the step already stays. If the one in need is the youngest, it waits if others go on, or gives way.
        """
        younger = [r for r in self.running if r.rank > s.rank and r not in packing.granted]
        if not younger and packing.granted:
            return False
        victim = younger[-1] if younger else s
        self._release(victim)
        victim.computed = victim.recorded = 0
        victim.preempted += 1
        self.preemptions += 1
        self.add(victim)
        return victim is not s and (self.pages.available > 0 or self._preempt(s, packing))
