"""One step as the root orders it and every rank carries it out: a batch, and what is wanted of its logits."""

from __future__ import annotations

from dataclasses import dataclass
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
# k: candidates wanted; temperature: of the log-sum-exp; prompt: the prompt's length; target: token to score.
ROW = np.dtype(
    [("k", "<i4"), ("prompt", "<i4"), ("target", "<i4"), ("temperature", "<f8"), ("repeat", "<f4"), ("presence", "<f4"),
     ("frequency", "<f4")]
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A batch and, for each of its logit rows, a `ROW`; `want` holds for all rows."""

    batch: Batch
    rows: np.ndarray
    want: Want

    def to_bytes(self) -> bytes:
        """Return the step as bytes."""
        return np.int32(self.want).tobytes() + self.batch.to_bytes() + self.rows.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> Step:
        """Return the step that `to_bytes` wrote."""
        batch, rest = Batch.from_bytes(data[4:])
        return Step(batch, np.frombuffer(rest, ROW), Want(int(np.frombuffer(data, np.int32, 1)[0])))
