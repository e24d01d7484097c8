"""What one forward pass is fed: a flat list of tokens, each with a position and a sequence's slot and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_NONE = np.zeros((0, 2), np.int32)


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
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray
    logit_rows: np.ndarray
    owners: np.ndarray
    ends: np.ndarray
    pages: np.ndarray
    page_copies: np.ndarray = field(default_factory=lambda: _NONE)
    state_copies: np.ndarray = field(default_factory=lambda: _NONE)

    @staticmethod
    def of(
        columns: Sequence[Sequence[int] | np.ndarray],
        logit_rows: Sequence[int] | np.ndarray,
        tables: Mapping[int, Sequence[int]],
        page_copies: Sequence[tuple[int, int]] = (),
        state_copies: Sequence[tuple[int, int]] = (),
    ) -> Batch:
        """Return a batch. columns: token_ids, positions, slots, lengths. tables: each slot's pages."""
        token_ids, positions, slots, lengths = (np.asarray(c, np.int32) for c in columns)
        return Batch(
            token_ids,
            positions,
            slots,
            lengths,
            np.asarray(logit_rows, np.int32),
            np.array(list(tables), np.int32),
            np.cumsum([len(table) for table in tables.values()], dtype=np.int32),
            np.array([page for table in tables.values() for page in table], np.int32),
            np.array(page_copies, np.int32).reshape(-1, 2),
            np.array(state_copies, np.int32).reshape(-1, 2),
        )

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    def tables(self) -> np.ndarray:
        """Return the tables as an array (slots, n) int32, zeros where there is none."""
        starts = np.concatenate([self.ends[:0], [0], self.ends[:-1]])
        longest = int((self.ends - starts[: len(self.ends)]).max(initial=0))
        tables = np.zeros((int(self.owners.max(initial=-1)) + 1, longest), np.int32)
        for owner, start, end in zip(self.owners, starts, self.ends, strict=False):
            tables[owner, : end - start] = self.pages[start:end]
        return tables

    def pages_of(self, slot: int) -> np.ndarray:
        """Return the table (n,) int32 of a slot that has tokens in the batch."""
        i = int(np.flatnonzero(self.owners == slot)[0])
        return self.pages[self.ends[i - 1] if i else 0 : self.ends[i]]

    def to_bytes(self) -> bytes:
        """Return the batch as bytes, a few for each token; pages that follow one another take no more than one."""
        breaks = np.flatnonzero(np.diff(self.pages, prepend=-2) != 1)
        counts = np.diff(breaks, append=len(self.pages))
        sizes = [self.tokens, len(self.logit_rows), len(self.owners), len(breaks)]
        sizes += [len(self.page_copies), len(self.state_copies)]
        parts = [np.array(sizes, np.int32), self.token_ids, self.positions, self.slots, self.lengths, self.logit_rows]
        parts += [self.owners, self.ends, self.pages[breaks], counts]
        parts += [self.page_copies.ravel(), self.state_copies.ravel()]
        return np.concatenate(parts, dtype=np.int32, casting="unsafe").tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> tuple[Batch, bytes]:
        """Return the batch at the start of `data`, and the bytes after it."""
        tokens, rows, owners, runs, pages, states = np.frombuffer(data, np.int32, 6).tolist()
        sizes = np.cumsum([6, *[tokens] * 4, rows, owners, owners, runs, runs, 2 * pages, 2 * states])
        parts = np.split(np.frombuffer(data, np.int32, int(sizes[-1])), sizes[:-1])[1:]
        ids, positions, slots, lengths, logit_rows, owners, ends, firsts, counts, page_copies, state_copies = parts
        table = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum(), dtype=np.int32)
        copies = page_copies.reshape(-1, 2), state_copies.reshape(-1, 2)
        batch = Batch(ids, positions, slots, lengths, logit_rows, owners, ends, table.astype(np.int32), *copies)
        return batch, data[4 * int(sizes[-1]) :]
