"""What sequences hold of the KV cache: pages of all their positions, and pages of those that a window still sees.

Layers that see all positions keep them all, as do the ids of tokens. Layers that see but a window have pages of their
own, of which a sequence holds those that its next tokens see: pages behind go back, and are remembered until another
takes them. So a text that begins like another goes on behind the longest part of it whose pages are all there, and
whose last ones are there for the window, too. That is likely at a text's end, at the end of a prompt, and where texts
have turned off from each other before: the pages that a window sees from there are remembered longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..kernels.layout import pages_over
from ..model.batch import Batch
from .pages import ROOT, Pages, chain
from .sequence import Near, Sequence


class Start(NamedTuple):
    """Where a sequence can go on.

    Attributes:
        pages: to share. source: one to copy, or -1. held: tokens that these hold.
        near, near_source: the same of layers with a window; only pages that the next token sees.
        slot: of a state, or -1.
    """

    pages: list[int]
    source: int
    held: int
    near: list[int]
    near_source: int = -1
    slot: int = -1


@dataclass
class Copies:
    """Pages and states (slots) to copy before the next step: from, to."""

    pages: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)
    near: list[tuple[int, int]] = field(default_factory=list)


class Cache:
    """Gives sequences their pages.

    Attributes:
        pages: of layers that see all positions. near: of layers with a window; none where they share the others'.
        window: positions that these see, 0 for none. size: positions of a page.
    """

    def __init__(self, pages: Pages, near: Pages, window: int, chunk: int) -> None:
        """Make a cache; chunk: most positions that a sequence is fed at once."""
        self.pages, self.near, self.size = pages, near, pages.size
        self.window = max(2, window) if window else 0  # so that the page of the token before is never behind it
        self.copies = Copies()
        self._most = min(near.count, pages_over(window - 1 + chunk, self.size)) if window else 0

    def check(self, running: Iterable[Sequence]) -> None:
        """Raise an AssertionError if the books do not balance; for tests."""
        held = list(running)
        for pool, tables in ((self.pages, [s.pages for s in held]), (self.near, [s.near.pages for s in held])):
            pool.check()
            assert pool.used == len({page for table in tables for page in table})
        for s in held:
            assert not self.window or s.near.first == self.first(s.computed)

    def key(self, s: Sequence, pages: int) -> bytes:
        """Return the key of a sequence's first pages."""
        while len(s.keys) <= pages:
            at = len(s.keys) - 1
            s.keys.append(chain(s.keys[at], s.tokens[at * self.size : (at + 1) * self.size]))
        return s.keys[pages]

    def first(self, position: int) -> int:
        """Return which page is the first that a window sees from a position."""
        return max(0, position + 1 - self.window) // self.size if self.window else 0

    def forget(self) -> None:
        """Forget what pages hold that nobody uses."""
        self.pages.forget()
        self.near.forget()

    def batch(
        self, columns: Iterable[Iterable[int]], logit_rows: Iterable[int], held: Mapping[int, tuple[list[int], Near]]
    ) -> Batch:
        """Return a batch, with all that is to be copied before; held: each slot's pages."""
        copies, self.copies = self.copies, Copies()
        tables = {slot: pages for slot, (pages, _) in held.items()}
        windows = {slot: (near.first, near.pages) for slot, (_, near) in held.items() if self.window}
        listed = [list(column) for column in columns]
        return Batch.of(listed, list(logit_rows), tables, copies.pages, copies.states, windows, copies.near)

    # ---- what is there already

    def full(self, s: Sequence, at: int = 0) -> list[int]:
        """Return the pages that hold a sequence's tokens, those of its page `at` first, but for the last token's."""
        pages, most = [], len(s.tokens) - 1
        while (at + 1) * self.size <= most and (page := self.pages.full(self.key(s, at + 1))) is not None:
            pages.append(page)
            at += 1
        return pages

    def seen(self, s: Sequence, at: int, held: int) -> list[int] | None:
        """Return the full pages before page `at` that a window sees from position `held`; None if one is missing."""
        found: list[int] = []
        for page in range(at - 1, self.first(held) - 1, -1) if self.window else ():
            near = self.near.full(self.key(s, page + 1))
            if near is None:
                return None
            found.append(near)
        return found[::-1]

    def part(self, s: Sequence, at: int, most: int) -> tuple[int, int, int]:
        """Return the pages to copy that hold most of a sequence's page `at`, up to position `most`, and how much.

        The second is for layers with a window; (-1, -1, 0) if there are none.
        """
        first, key = at * self.size, self.key(s, at)
        tokens = s.tokens[first : min(first + self.size, most)]
        source, count = self.pages.best(key, tokens)
        if not self.window or count == 0:
            return source, -1, count
        near, seen = self.near.best(key, tokens)
        count = min(count, seen)
        return (source, near, count) if count > 0 else (-1, -1, 0)

    def find(self, s: Sequence, least: int) -> Start:
        """Return what is there of a waiting sequence's tokens, but for the last: it must be fed, for its logits.

        least: tokens for which a page is copied.
        """
        pages = self.full(s)
        for at in range(len(pages), -1, -1):
            source, near_source, count = self.part(s, at, len(s.tokens) - 1)
            held = at * self.size + count
            if count >= least and (near := self.seen(s, at, held)) is not None:
                return Start(pages[:at], source, held, near, near_source)
            if (near := self.seen(s, at, at * self.size)) is not None:
                return Start(pages[:at], -1, at * self.size, near)
        raise AssertionError("a text can always begin anew")

    # ---- admission

    def _needed(self, s: Sequence) -> tuple[int, int]:
        """Return the pages that a sequence's tokens take, and one more; and those it holds at most for windows."""
        count = self.pages.needed(min(s.limit, len(s.tokens) + 1))
        return count, min(count, self._most)

    def fits(self, s: Sequence, start: Start, running: Iterable[Sequence]) -> bool:
        """Return whether there is room for all tokens of a sequence, beside what running ones may still take."""
        needed, near = self._needed(s)
        needed, near = needed - len(start.pages), near - len(start.near)
        for other in running:
            most, most_near = self._needed(other)
            needed += max(0, most - len(other.pages))
            near += max(0, most_near - len(other.near.pages))
        idle = sum(self.pages.is_idle(page) for page in start.pages)
        idle_near = sum(self.near.is_idle(page) for page in start.near)
        return self.pages.available - idle >= needed and self.near.available - idle_near >= near

    def begin(self, s: Sequence, start: Start) -> None:
        """Give a sequence what is there of its tokens."""
        s.turn = len(self.full(s)) if self.window else 0
        s.pages = [self.pages.share(page) for page in start.pages]
        s.near = Near(self.first(start.held), [self.near.share(page) for page in start.near])
        s.computed = s.recorded = len(s.pages) * self.size
        if start.source >= 0:
            self.copy(s, start.source, start.near_source, start.held)

    def copy(self, s: Sequence, source: int, near_source: int, count: int) -> None:
        """Copy a page to where a sequence goes on, of which it holds the tokens up to `count`."""
        at = s.computed // self.size
        tokens, key = s.tokens[s.computed : count], self.key(s, at)
        _copy(self.pages, s.pages, at, key, source, tokens, self.copies.pages)
        if self.window:
            _copy(self.near, s.near.pages, at - s.near.first, key, near_source, tokens, self.copies.near)
        self._advance(s, count)

    # ---- while it runs

    def room(self, s: Sequence) -> int:
        """Return for how many of its first positions a sequence has pages."""
        return self.size * (min(len(s.pages), s.near.end) if self.window else len(s.pages))

    def can_grow(self, s: Sequence) -> bool:
        """Return whether there is a page more for a sequence."""
        at = self.room(s) // self.size
        near = not self.window or s.near.end > at or self.near.available > 0
        return near and (len(s.pages) > at or self.pages.available > 0)

    def grow(self, s: Sequence) -> None:
        """Take a page more for a sequence."""
        at = self.room(s) // self.size
        if len(s.pages) == at:
            s.pages.append(self.pages.take(self.key(s, at)))
        if self.window and s.near.end == at:
            s.near.pages.append(self.near.take(self.key(s, at)))

    def record(self, s: Sequence) -> None:
        """Note what a sequence's pages hold by now, and give back those behind its window."""
        while s.recorded < s.computed:
            at, stop = s.recorded // self.size, min(s.computed, (s.recorded // self.size + 1) * self.size)
            tokens = s.tokens[s.recorded : stop]
            s.pages[at] = self.pages.record(s.pages[at], tokens)
            if self.window:
                s.near.pages[at - s.near.first] = self.near.record(s.near.pages[at - s.near.first], tokens)
            s.recorded = stop
        self._leave(s)

    def _advance(self, s: Sequence, count: int) -> None:
        s.computed = s.recorded = count
        self._leave(s)

    def _leave(self, s: Sequence) -> None:
        """Give back the pages behind a sequence's window."""
        count = self.first(s.computed) - s.near.first
        if count > 0:
            self._give_back(s, count)
            s.near = Near(s.near.first + count, s.near.pages[count:])

    def _give_back(self, s: Sequence, count: int) -> None:
        """Give back the first pages that a sequence holds for windows."""
        # From near the end of its prompt, and where it turned off from others, further texts may go on.
        turns = [s.prompt_length // self.size, *[s.turn] * (s.turn > 0)]
        for at, page in enumerate(s.near.pages[:count], s.near.first):
            self.near.release([page], not any(self.first(t * self.size) - 1 <= at <= t for t in turns))

    def adopt_pages(self, s: Sequence) -> None:
        """Go on behind the pages that others have computed of a sequence's tokens since it was admitted."""
        at = s.computed // self.size  # of which it may have computed a part
        pages = self.full(s, at)
        for count in range(len(pages), 0, -1):
            held = (at + count) * self.size
            near = self.seen(s, at + count, held)
            if near is not None:
                shared = [self.pages.share(page) for page in pages[:count]]
                seen = [self.near.share(page) for page in near]
                self.pages.release(s.pages[at:])
                self._give_back(s, len(s.near.pages))
                s.pages[at:], s.near, s.turn = shared, Near(self.first(held), seen), at + count
                s.computed = s.recorded = held
                return

    def adopt_part(self, s: Sequence, least: int) -> None:
        """Go on behind the part of a page that others have computed, if that is `least` tokens further."""
        at = s.computed // self.size
        source, near_source, count = self.part(s, at, len(s.tokens) - 1)
        if at * self.size + count - s.computed >= least and (self.room(s) > at * self.size or self.can_grow(s)):
            self.copy(s, source, near_source, at * self.size + count)

    def release(self, s: Sequence) -> None:
        """Take all that a sequence holds; it is remembered for others."""
        self.pages.release(s.pages)
        self.near.release(s.near.pages)
        s.pages, s.near = [], Near()

    # ---- a text by itself

    def lend(self, positions: int) -> Loan | None:
        """Return memory for a text that is fed by itself, or None if there is too little."""
        count = self.pages.needed(positions)
        if self.pages.available < count or self.near.available < min(count, self._most):
            return None
        return Loan(self, [self.pages.take(ROOT) for _ in range(count)])


class Loan:
    """The pages of a text that is fed by itself, of which nothing is remembered."""

    def __init__(self, cache: Cache, pages: list[int]) -> None:
        self._cache, self.pages, self.near = cache, pages, Near()

    def hold(self, start: int, stop: int) -> tuple[list[int], Near]:
        """Return the pages to feed positions [start, stop) with."""
        cache = self._cache
        count = max(0, cache.first(start) - self.near.first)
        cache.near.release(self.near.pages[:count])
        self.near = Near(self.near.first + count, self.near.pages[count:])
        while cache.window and self.near.end * cache.size < stop:
            self.near.pages.append(cache.near.take(ROOT))
        return self.pages, self.near

    def end(self) -> None:
        """Give all back."""
        self._cache.pages.release(self.pages)
        self._cache.near.release(self.near.pages)


def _copy(
    pool: Pages, held: list[int], at: int, key: bytes, source: int, tokens: list[int], copies: list[tuple[int, int]]
) -> None:
    """Copy a page to a text's page `at`, which goes on with these tokens then."""
    if len(held) == at:
        held.append(pool.take(key))
    if held[at] != source:  # a page that was the last to be had holds it already
        copies.append((source, held[at]))
    held[at] = pool.record(held[at], tokens)
