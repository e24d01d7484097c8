"""One step as the root orders it and every rank carries it out: a batch, and what is wanted of its logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from ..model.batch import Batch


class Command(IntEnum):
    """What the root can ask of the workers."""

    STEP = 1  # payload: a Step
    FULL_LOGITS = 2  # payload: an int32, the row of the last step whose logits are wanted, all of them
    TIMES = 3  # send this rank's times; payload: whether its link with the root is measured then
    DONE = 4  # this call is over
    FAILED = 5  # payload: an error that every rank shall raise


class Want(IntEnum):
    """What a step's rows are for."""

    CANDIDATES = 0
    FULL = 1
    SCORES = 2


# One wanted row: how its logits are prepared, on every rank alike.
# k: candidates wanted, 0 where the hidden state is; temperature: of the log-sum-exp; prompt: the prompt's length;
# target: token to score, or -1; logprobs: whether the log-sum-exp at temperature 1 is wanted, too.
ROW = np.dtype(
    [("k", "<i4"), ("prompt", "<i4"), ("target", "<i4"), ("temperature", "<f8"), ("repeat", "<f4"), ("presence", "<f4"),
     ("frequency", "<f4"), ("logprobs", "<i4")]
)  # fmt: skip
# What is added to the logit of a token in a row.
BIAS = np.dtype([("row", "<i4"), ("token", "<i4"), ("value", "<f4")])


@dataclass(frozen=True)
class Step:
    """A batch and, for each of its logit rows, a `ROW`; `want` holds for all rows. biases: (n,) of `BIAS`.

    masks: of some rows, the tokens that are allowed: (n, words) uint32, a bit a token; masked: (n,) int32, which rows.
    """

    batch: Batch
    rows: np.ndarray
    want: Want
    biases: np.ndarray = field(default_factory=lambda: np.zeros(0, BIAS))
    masked: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    masks: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint32))

    @staticmethod
    def of(batch: Batch, want: Want) -> Step:
        """Return a step with plain rows."""
        return Step(batch, np.zeros(len(batch.logit_rows), ROW), want)

    @property
    def ends(self) -> tuple[int, int]:
        """Where the rows end that choose a token, and where those that score one; the rest want hidden states."""
        chosen = int(np.count_nonzero(self.rows["target"] < 0))
        return chosen, int(np.count_nonzero(self.rows["k"]))

    def to_bytes(self) -> bytes:
        """Return the step as bytes."""
        head = np.array([self.want, len(self.biases), *self.masks.shape], np.int32)
        parts = (self.rows, self.biases, self.masked, self.masks)
        return head.tobytes() + self.batch.to_bytes() + b"".join(part.tobytes() for part in parts)

    @staticmethod
    def from_bytes(data: bytes) -> Step:
        """Return the step that `to_bytes` wrote."""
        want, biases, masked, words = np.frombuffer(data, np.int32, 4).tolist()
        batch, rest = Batch.from_bytes(data[16:])
        parts, at = [], 0
        counts = (len(batch.logit_rows), biases, masked, masked * words)
        kinds: tuple[np.dtype[Any], ...] = (ROW, BIAS, np.dtype(np.int32), np.dtype(np.uint32))
        for kind, count in zip(kinds, counts, strict=True):
            parts.append(np.frombuffer(rest, kind, count, at))
            at += parts[-1].nbytes
        return Step(batch, parts[0], Want(want), parts[1], parts[2], parts[3].reshape(masked, words))
