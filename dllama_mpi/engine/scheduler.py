"""Which tokens go into the next step: continuous batching over pages of memory, prefill in chunks beside decoding.

Sequences are admitted in the order of their ranks, when there are pages for all their tokens. A running sequence that
needs a page when there is none gets that of the youngest, which waits and begins anew later: its tokens are fed again,
as far as their pages are gone.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import RequestError
from ..kernels.layout import PAGE
from ..model.batch import Batch
from ..startup.options import MAX_STEP_MS
from .budget import Budget
from .cache import Cache, Copies, Start
from .lookup import MOST_DRAFTS, DraftCost
from .pages import Pages, common
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
        window: positions that layers with a window see; 0: the model has none, or they have no pages of their own.
        window_pages: of these layers.
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
    window: int = 0
    window_pages: int = 0


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
        near = Pages(limits.window_pages, limits.shares, limits.page)
        self.cache = Cache(self.pages, near, limits.window, limits.chunk)
        self.slots = Slots(limits.slots or limits.sequences)
        self.budget = Budget(limits.chunk, limits.max_step_ms / 1e3, limits.responsive)
        self.draft_cost = DraftCost()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.cached_tokens = 0
        self._fed = 0  # prompt tokens in all steps

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
        self.waiting, self.cache.copies = [], Copies()
        self.forget()

    def forget(self) -> None:
        """Forget what finished sequences have left."""
        self.cache.forget()
        self.slots.forget()

    def settle(self, plan: Plan) -> None:
        """Note what the pages hold, once the step's tokens have been taken."""
        for s, _ in plan.fed:
            s.computed = min(s.computed, len(s.tokens))
            self.cache.record(s)

    def _release(self, s: Sequence) -> None:
        """Take all that a running sequence holds."""
        self.running.remove(s)
        if self.limits.slots and self.limits.shares and s.recorded:
            at = s.recorded // self.pages.size
            rest = tuple(s.tokens[at * self.pages.size : s.recorded])
            self.slots.keep(s.slot, Checkpoint(self.cache.key(s, at), rest))
        else:
            self.slots.free(s.slot)
        self.cache.release(s)
        s.slot = -1

    def batches(self, token_ids: list[int]) -> Iterator[Batch]:
        """Yield the batches that feed a text by itself, all of its logits wanted, in memory that is free for now.

        Raises:
            RequestError: running sequences hold that memory.
        """
        loan = self.cache.lend(len(token_ids)) if len(self.running) < self.limits.sequences else None
        if loan is None:
            raise RequestError("running requests hold the memory that this needs; try again later")
        slot = self.slots.take()
        try:
            for start in range(0, len(token_ids), self.limits.chunk):
                part = token_ids[start : start + self.limits.chunk]
                positions, n = range(start, start + len(part)), len(part)
                columns = (part, positions, [slot] * n, [len(token_ids)] * n)
                yield self.cache.batch(columns, range(n), {slot: loan.hold(start, start + n)})
        finally:
            loan.end()
            self.slots.free(slot)

    # ---- what is there already

    def _find(self, s: Sequence) -> Start:
        """Return what is there of a waiting sequence's tokens; the last must be fed, for its logits."""
        if not self.limits.shares or s.reads_all:
            return Start([], -1, 0, [])
        if self.limits.slots:
            return self._find_state(s, self.cache.full(s))
        return self.cache.find(s, LEAST_COPIED)

    def _find_state(self, s: Sequence, pages: list[int]) -> Start:
        """Return the furthest state from which a sequence can go on; note where its own should be kept.

        That is where it turns off from what others have computed, and at the last full page of its tokens.
        """
        size, most = self.pages.size, len(s.tokens) - 1
        found = Start([], -1, 0, [])
        for at in range(len(pages), -1, -1):
            first = at * size
            slot, count = self.slots.best(self.cache.key(s, at), s.tokens[first : min(first + size, most)])
            if slot < 0 or first + count == 0:
                continue
            source, near_source, held = self.cache.part(s, at, first + count)
            near = self.cache.seen(s, at, first + count)
            if held >= count and near is not None:
                found = Start(pages[:at], source, first + count, near, near_source, slot)
                break
        s.saves = frozenset(p for p in (len(pages) * size, most // size * size) if p > found.held)
        return found

    # ---- admission

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.sequences:
            s = self.waiting[0]
            start = self._find(s)
            if not self.cache.fits(s, start, self.running):
                return
            self.waiting.pop(0)
            self._begin(s, start)

    def _begin(self, s: Sequence, start: Start) -> None:
        """Give a sequence its slot, and what is there of its tokens."""
        if start.slot >= 0 and not self.slots.has_free:
            s.slot = self.slots.take_over(start.slot)
        else:
            s.slot = self.slots.take()
            if start.slot >= 0:
                self.cache.copies.states.append((start.slot, s.slot))
        self.cache.begin(s, start)
        s.joined = self._fed
        self._count_cached(s, s.computed)
        insort(self.running, s, key=lambda r: r.rank)

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
        held = {s.slot: (s.pages, s.near) for s, _ in packing.fed}
        rows = [*packing.rows, *(row for row, _ in (*packing.scored, *packing.pooled))]
        batch = self.cache.batch(packing.columns, rows, held)
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
            self._adopt(s, 0)
            if any(self._is_ahead(other, s, packing) for other in self.running):
                return 0
            self._adopt(s, LEAST_COPIED)
        most = min([s.left, budget, *(p - s.computed for p in s.saves if p > s.computed)])
        count = self._room(s, s.computed + most, packing) - s.computed
        if count <= 0:
            return 0
        packing.add(s, count, [])
        return count

    def _draft(self, s: Sequence, most: int) -> list[int]:
        if s.lookup is None:
            return []
        here = self.cache.room(s) - len(s.tokens)  # a page is not taken for drafts
        most = min(MOST_DRAFTS, most, here, s.limit - len(s.tokens) - 1)  # one more token comes in any case
        # The step serves all running sequences: to each it costs its part of the whole.
        return s.lookup.propose(s.tokens, most, self.draft_cost.share * len(self.running)) if most > 0 else []

    def _save(self, s: Sequence) -> None:
        """Keep a copy of a sequence's state as it is."""
        what = Checkpoint(self.cache.key(s, s.computed // self.pages.size))
        s.saves -= {s.computed}
        if not self.slots.has(what):
            slot = self.slots.take()
            self.cache.copies.states.append((s.slot, slot))
            self.slots.keep(slot, what)

    def _adopt(self, s: Sequence, part: int) -> None:
        """Go on behind what others have computed since: whole pages, or part of one if that has so many tokens."""
        before = s.computed
        if part:
            self.cache.adopt_part(s, part)
        else:
            self.cache.adopt_pages(s)
        self._count_cached(s, s.computed - before)

    def _count_cached(self, s: Sequence, tokens: int) -> None:
        if not s.preempted:
            s.cached += tokens
            self.cached_tokens += tokens

    def _is_ahead(self, other: Sequence, s: Sequence, packing: Packing) -> bool:
        """Return whether another sequence is computing what this one needs next."""
        size, at = self.pages.size, s.computed // self.pages.size
        leads = other.computed > s.computed or (other.computed == s.computed and other in packing.granted)
        if other is s or not leads or other.computed // size != at:
            return False
        if self.cache.key(other, at) != self.cache.key(s, at):
            return False
        first, last = at * size, min((at + 1) * size, len(s.tokens) - 1)
        end = first + common(s.tokens[first:last], other.tokens[first : first + size])
        return (end == first + size or end - s.computed >= LEAST_COPIED) and other.computed < end

    # ---- memory

    def _room(self, s: Sequence, positions: int, packing: Packing) -> int:
        """Take pages for a sequence's first positions, as far as there are any; return for how many there are."""
        while self.cache.room(s) < positions:
            if not self.cache.can_grow(s) and not self._preempt(s, packing):
                break
            self.cache.grow(s)
        return min(positions, self.cache.room(s))

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
        return victim is not s and (self.cache.can_grow(s) or self._preempt(s, packing))
