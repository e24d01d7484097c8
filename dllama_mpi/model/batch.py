"""What one forward pass is fed: a flat list of tokens, each with a position and a sequence's slot and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_NONE = np.zeros(0, np.int32)
_NO_COPIES = np.zeros((0, 2), np.int32)


@dataclass(frozen=True)
class Batch:
    """Tokens of one step; prefill chunks, decode steps and several sequences mix freely.

    Tokens of one slot stand in the order of their positions, and all earlier positions of the slot are in the KV
    cache or in this batch before them.

    Attributes:
        token_ids, positions: (tokens,) int32. slots: (tokens,) int32, each sequence's own; its states are there.
        lengths: (tokens,) int32, the length of the token's sequence when it was fed, see `Rope`.
        logit_rows: (rows,) int32, the tokens whose logits are wanted.
        owners: (sequences,) int32, the slots of which there are tokens.
        ends: (sequences,) int32, where their tables end in `pages`.
        pages: (n,) int32, their tables one after the other: which page of the KV cache holds the positions from `PAGE`
            times 0, 1, 2 on.
        page_copies, state_copies: (n, 2) int32, pages and states (slots) to copy before, in this order: from, to.
        window_firsts, window_ends, window_pages, window_copies: the same of the pages of layers with a window, whose
            tables begin at `PAGE` times window_firsts. Without them, those layers go by the others' tables.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray
    logit_rows: np.ndarray
    owners: np.ndarray
    ends: np.ndarray
    pages: np.ndarray
    page_copies: np.ndarray = field(default_factory=lambda: _NO_COPIES)
    state_copies: np.ndarray = field(default_factory=lambda: _NO_COPIES)
    window_firsts: np.ndarray = field(default_factory=lambda: _NONE)
    window_ends: np.ndarray = field(default_factory=lambda: _NONE)
    window_pages: np.ndarray = field(default_factory=lambda: _NONE)
    window_copies: np.ndarray = field(default_factory=lambda: _NO_COPIES)

    @staticmethod
    def of(
        columns: Sequence[Sequence[int] | np.ndarray],
        logit_rows: Sequence[int] | np.ndarray,
        tables: Mapping[int, Sequence[int]],
        page_copies: Sequence[tuple[int, int]] = (),
        state_copies: Sequence[tuple[int, int]] = (),
        windows: Mapping[int, tuple[int, Sequence[int]]] | None = None,
        window_copies: Sequence[tuple[int, int]] = (),
    ) -> Batch:
        """Return a batch.

        columns: token_ids, positions, slots, lengths. tables: each slot's pages. windows: for layers with a window,
        the first of its pages that it has, and these from there on; the slots in the same order.
        """
        token_ids, positions, slots, lengths = (np.asarray(c, np.int32) for c in columns)
        near = list((windows or {}).values())
        return Batch(
            token_ids,
            positions,
            slots,
            lengths,
            np.asarray(logit_rows, np.int32),
            np.array(list(tables), np.int32),
            *_joined(list(tables.values())),
            np.array(page_copies, np.int32).reshape(-1, 2),
            np.array(state_copies, np.int32).reshape(-1, 2),
            np.array([first for first, _ in near], np.int32),
            *_joined([pages for _, pages in near]),
            np.array(window_copies, np.int32).reshape(-1, 2),
        )

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    @property
    def has_windows(self) -> bool:
        """Whether layers with a window have tables of their own."""
        return len(self.window_ends) > 0

    def tables(self) -> np.ndarray:
        """Return the tables as an array (1, slots, n) int32, or (2, slots, n) with those of layers with a window.

        Zeros where there is none.
        """
        longest = int(np.diff(self.ends, prepend=0).max(initial=0))
        tables = np.zeros((1 + self.has_windows, int(self.owners.max(initial=-1)) + 1, longest), np.int32)
        for owner in self.owners.tolist():
            pages = self.pages_of(owner)
            tables[0, owner, : len(pages)] = pages
            if self.has_windows:
                first, pages = self.window_of(owner)
                tables[1, owner, first : first + len(pages)] = pages
        return tables

    def pages_of(self, slot: int) -> np.ndarray:
        """Return the table (n,) int32 of a slot that has tokens in the batch."""
        i = int(np.flatnonzero(self.owners == slot)[0])
        return self.pages[self.ends[i - 1] if i else 0 : self.ends[i]]

    def window_of(self, slot: int) -> tuple[int, np.ndarray]:
        """Return a slot's table for layers with a window: the first page that is there, and the pages (n,) int32."""
        i = int(np.flatnonzero(self.owners == slot)[0])
        return int(self.window_firsts[i]), self.window_pages[self.window_ends[i - 1] if i else 0 : self.window_ends[i]]

    def to_bytes(self) -> bytes:
        """Return the batch as bytes, a few for each token; pages that follow one another take no more than one."""
        runs, near = _runs(self.pages), _runs(self.window_pages)
        parts = [self.token_ids, self.positions, self.slots, self.lengths, self.logit_rows, self.owners, self.ends]
        parts += [*runs, *near, self.window_firsts, self.window_ends]
        parts += [copies.ravel() for copies in (self.page_copies, self.state_copies, self.window_copies)]
        sizes = [self.tokens, len(self.logit_rows), len(self.owners), len(runs[0]), len(near[0])]
        sizes += [len(self.window_ends), *map(len, parts[-3:])]
        return np.concatenate([np.array(sizes), *parts], dtype=np.int32, casting="unsafe").tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> tuple[Batch, bytes]:
        """Return the batch at the start of `data`, and the bytes after it."""
        tokens, rows, held, runs, near, windows, *copied = np.frombuffer(data, np.int32, 9).tolist()
        counts = [*[tokens] * 4, rows, held, held, runs, runs, near, near, windows, windows, *copied]
        sizes = np.cumsum([9, *counts])
        parts = iter(np.split(np.frombuffer(data, np.int32, int(sizes[-1])), sizes[:-1])[1:])
        ids, positions, slots, lengths, logit_rows, owners, ends = (next(parts) for _ in range(7))
        pages, window_pages = _pages(next(parts), next(parts)), _pages(next(parts), next(parts))
        firsts, window_ends = next(parts), next(parts)
        page_copies, state_copies, window_copies = (each.reshape(-1, 2) for each in parts)
        tables = owners, ends, pages, page_copies, state_copies
        near = firsts, window_ends, window_pages, window_copies
        batch = Batch(ids, positions, slots, lengths, logit_rows, *tables, *near)
        return batch, data[4 * int(sizes[-1]) :]


def _joined(tables: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return where tables end, one after the other, and these."""
    ends = np.cumsum([len(table) for table in tables], dtype=np.int32)
    return ends, np.array([page for table in tables for page in table], np.int32)


def _runs(pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first page of each run of pages that follow one another, and the runs' lengths."""
    breaks = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    return pages[breaks], np.diff(breaks, append=len(pages))


def _pages(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return what `_runs` was made of."""
    pages = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum(), dtype=np.int32)
    return pages.astype(np.int32)
