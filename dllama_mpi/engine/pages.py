"""Pages of the KV cache: which holds what, who uses it, which is given away next.

A page holds `PAGE` positions of every layer, or of those with or without a window (see `cache`). What stands in it is
known by its tokens and by the pages before it: each full page has a key, a hash over its tokens and the key of the page
before, so that texts that begin alike find each other's pages, also while they run. A page that nobody uses keeps what
it holds until another is wanted; the one that was used longest ago goes first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from ..kernels.layout import PAGE

ROOT = b""  # the key before a text's first page


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of a full page with these tokens, after pages with the key `before`."""
    return blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of two texts' common beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # comparing slices is quick
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


@dataclass
class _Content:
    before: bytes
    tokens: list[int] = field(default_factory=list)
    key: bytes | None = None  # once it is full, unless another page holds the same


class Pages:
    """Gives pages to sequences, and remembers what they hold.

    Attributes:
        count: their number. size: positions of each. shares: whether a text may use what another has computed.
    """

    def __init__(self, count: int, shares: bool = True, size: int = PAGE) -> None:
        self.count, self.shares, self.size = count, shares, size
        self._users = [0] * count
        self._free = list(range(count))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()  # used by nobody, but they hold something; oldest first
        self._passing: OrderedDict[int, None] = OrderedDict()  # the same, of less use: these go before the others
        self._content: dict[int, _Content] = {}
        self._full: dict[bytes, int] = {}
        self._after: dict[bytes, dict[int, None]] = {}  # the pages that follow a key, in the order they were begun

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + self.cached

    @property
    def cached(self) -> int:
        """Pages that nobody uses, but that hold something."""
        return len(self._idle) + len(self._passing)

    @property
    def used(self) -> int:
        """Pages that sequences use."""
        return self.count - self.available

    def needed(self, positions: int) -> int:
        """Return how many pages so many positions take."""
        return -(-positions // self.size)

    def is_idle(self, page: int) -> bool:
        """Return whether a page is used by nobody."""
        return not self._users[page]

    # ---- using pages

    def take(self, before: bytes) -> int:
        """Return a page for a sequence that goes on after pages with the key `before`; there must be one available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = (self._passing or self._idle).popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        if self.shares:
            self._content[page] = _Content(before)
            self._after.setdefault(before, {})[page] = None
        return page

    def share(self, page: int) -> int:
        """Return a page that one more sequence uses from now on."""
        self._users[page] += 1
        self._idle.pop(page, None)
        self._passing.pop(page, None)
        return page

    def release(self, pages: Sequence[int], passing: bool = False) -> None:
        """Give back a sequence's pages, in the order of its positions: the last go before those that begin alike.

        passing: whether it is unlikely that they are of use again.
        """
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            content = self._content.get(page)
            if content is not None and content.tokens and (content.key or len(content.tokens) < self.size):
                (self._passing if passing else self._idle)[page] = None
            else:
                self._forget(page)
                self._free.append(page)

    def _forget(self, page: int) -> None:
        content = self._content.pop(page, None)
        if content is None:
            return
        if content.key is not None:
            del self._full[content.key]
        del self._after[content.before][page]
        if not self._after[content.before]:
            del self._after[content.before]

    def forget(self) -> None:
        """Forget what pages hold that nobody uses."""
        for pages in (self._idle, self._passing):
            for page in pages:
                self._forget(page)
            self._free += pages
            pages.clear()

    # ---- what they hold

    def record(self, page: int, tokens: Sequence[int]) -> int:
        """Note that these tokens have been added to a page; return the page to use from now on.

        That is another if one holds the same by now, so that it is held once.
        """
        content = self._content.get(page)
        if content is None:
            return page
        content.tokens += tokens
        if len(content.tokens) < self.size:
            return page
        key = chain(content.before, content.tokens)
        other = self._full.setdefault(key, page)
        if other == page:
            content.key = key
            return page
        self.share(other)
        self.release([page])
        return other

    def full(self, key: bytes) -> int | None:
        """Return the page with this key, or None."""
        return self._full.get(key)

    def best(self, before: bytes, tokens: Sequence[int]) -> tuple[int, int]:
        """Return the page after `before` that holds most of these tokens, and how many; (-1, 0) if none holds any."""
        found, most = -1, 0
        for page in self._after.get(before, ()):
            held = self._content[page].tokens
            if tokens and held and held[0] == tokens[0] and (count := common(held, tokens)) > most:
                found, most = page, count
        return found, most

    def check(self) -> None:
        """Raise an AssertionError if the books do not balance; for tests."""
        idle, free = {*self._idle, *self._passing}, set(self._free)
        assert len(idle) == self.cached
        assert len(free) == len(self._free)
        assert not idle & free
        assert {page for page in range(self.count) if not self._users[page]} == idle | free
        assert min(self._users, default=0) >= 0
        assert not free & set(self._content)
        assert {page for pages in self._after.values() for page in pages} == set(self._content)
        for key, page in self._full.items():
            content = self._content[page]
            assert content.key == key == chain(content.before, content.tokens)
