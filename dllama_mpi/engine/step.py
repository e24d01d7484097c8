"""One step as the root orders it and every rank carries it out: a batch, and what is wanted of its logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

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
# k: candidates wanted; temperature: of the log-sum-exp; prompt: the prompt's length; target: token to score; logprobs:
# whether the log-sum-exp at temperature 1 is wanted, too.
ROW = np.dtype(
    [("k", "<i4"), ("prompt", "<i4"), ("target", "<i4"), ("temperature", "<f8"), ("repeat", "<f4"), ("presence", "<f4"),
     ("frequency", "<f4"), ("logprobs", "<i4")]
)  # fmt: skip
# What is added to the logit of a token in a row.
BIAS = np.dtype([("row", "<i4"), ("token", "<i4"), ("value", "<f4")])


@dataclass(frozen=True)
class Step:
    """A batch and, for each of its logit rows, a `ROW`; `want` holds for all rows. biases: (n,) of `BIAS`."""

    batch: Batch
    rows: np.ndarray
    want: Want
    biases: np.ndarray = field(default_factory=lambda: np.zeros(0, BIAS))

    @staticmethod
    def of(batch: Batch, want: Want) -> Step:
        """Return a step with plain rows."""
        return Step(batch, np.zeros(len(batch.logit_rows), ROW), want)

    def to_bytes(self) -> bytes:
        """Return the step as bytes."""
        return np.int32(self.want).tobytes() + self.batch.to_bytes() + self.rows.tobytes() + self.biases.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> Step:
        """Return the step that `to_bytes` wrote."""
        batch, rest = Batch.from_bytes(data[4:])
        end = len(batch.logit_rows) * ROW.itemsize
        rows, biases = np.frombuffer(rest[:end], ROW), np.frombuffer(rest[end:], BIAS)
        return Step(batch, rows, Want(int(np.frombuffer(data, np.int32, 1)[0])), biases)
