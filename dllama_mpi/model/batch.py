"""What one forward pass is fed: a flat list of tokens, each with a position and a sequence slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Tokens of one step; prefill chunks, decode steps and several sequences mix freely.

    Tokens of one slot stand in the order of their positions, and all earlier positions of the slot are in the KV
    cache or in this batch before them.

    Attributes:
        token_ids, positions, slots: (tokens,) int32.
        lengths: (tokens,) int32, the length of the token's sequence when it was fed, see `Rope`.
        logit_rows: (rows,) int32, the tokens whose logits are wanted.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray
    logit_rows: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    def to_bytes(self) -> bytes:
        """Return the batch as bytes, a few for each token."""
        head = np.array([self.tokens, len(self.logit_rows)], np.int32)
        parts = (head, self.token_ids, self.positions, self.slots, self.lengths, self.logit_rows)
        return np.concatenate(parts, dtype=np.int32).tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> tuple[Batch, bytes]:
        """Return the batch at the start of `data`, and the bytes after it."""
        tokens, rows = np.frombuffer(data, np.int32, 2).tolist()
        end = 2 + 4 * tokens + rows
        body = np.frombuffer(data, np.int32, end)
        ids, positions, slots, lengths = body[2 : 2 + 4 * tokens].reshape(4, tokens)
        return Batch(ids, positions, slots, lengths, body[2 + 4 * tokens :]), data[4 * end :]
