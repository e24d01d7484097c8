"""Places for the states of delta nets and convolutions: of running sequences, and checkpoints of texts to go on from.

A state cannot go back. So a text that begins like another goes on from a checkpoint: a copy of the state at some
position, the end of a page or of a text. Places are few; the checkpoint that was used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """What a state has taken: pages with this key (see `pages`), then these tokens."""

    key: bytes
    rest: tuple[int, ...] = ()


class Slots:
    """Gives each running sequence a slot of its own; the others may keep checkpoints."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))[::-1]
        self._kept: OrderedDict[int, Checkpoint] = OrderedDict()  # oldest first
        self._by_key: dict[bytes, dict[int, Checkpoint]] = {}

    @property
    def available(self) -> int:
        """Slots that can be taken."""
        return len(self._free) + len(self._kept)

    @property
    def has_free(self) -> bool:
        """Whether a slot can be taken without a checkpoint being lost."""
        return bool(self._free)

    def take_over(self, slot: int) -> int:
        """Return a slot with a checkpoint, which a sequence goes on from and which is no checkpoint any more."""
        self.free(slot)
        self._free.remove(slot)
        return slot

    def take(self) -> int:
        """Return a slot; there must be one available."""
        if not self._free:
            self.free(next(iter(self._kept)))
        return self._free.pop()

    def free(self, slot: int) -> None:
        """Give back a slot whose state is of no use."""
        found = self._kept.pop(slot, None)
        if found is not None:
            del self._by_key[found.key][slot]
            if not self._by_key[found.key]:
                del self._by_key[found.key]
        self._free.append(slot)

    def keep(self, slot: int, what: Checkpoint) -> None:
        """Give back a slot, and remember its state; of the same state one is kept."""
        for other in [s for s, kept in self._by_key.get(what.key, {}).items() if kept == what]:
            self.free(other)
        self._kept[slot] = what
        self._by_key.setdefault(what.key, {})[slot] = what

    def has(self, what: Checkpoint) -> bool:
        """Return whether there is such a checkpoint."""
        return what in self._by_key.get(what.key, {}).values()

    def best(self, key: bytes, tokens: list[int]) -> tuple[int, int]:
        """Return the slot of the longest checkpoint of `key` and tokens that these begin with, and their number.

        (-1, -1) if there is none.
        """
        found, most = -1, -1
        for slot, kept in self._by_key.get(key, {}).items():
            count = len(kept.rest)
            if count > most and kept.rest == tuple(tokens[:count]):
                found, most = slot, count
        if found >= 0:
            self._kept.move_to_end(found)
        return found, most

    def forget(self) -> None:
        """Forget all checkpoints."""
        for slot in list(self._kept):
            self.free(slot)
