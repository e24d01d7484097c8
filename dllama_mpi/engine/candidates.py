"""From each rank's logits to one distribution on the root without sending the vocabulary.

A rank sends its best k tokens and the log-sum-exp of all its logits. The merged candidates are exact for every token
at least as good as `floor`, the largest logit that some rank may have left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.sampling import log_sum_exp, top_k

NEVER = -np.inf
_HEAD = 4  # numbers of a row before its candidates


@dataclass(frozen=True)
class Candidates:
    """The best tokens of one row.

    Attributes:
        ids, logits: best first, ties by lower id; logits as float64, penalties applied, temperature not.
        floor: no token outside `ids` has a logit above it; -inf if `ids` is the whole vocabulary.
        log_sum: log-sum-exp of all logits / temperature; -inf when temperature is 0.
        log_sum_plain: the same of the logits as they are, where it was asked for.
        target_logit: of the row's target; -inf if there is none.
    """

    ids: np.ndarray
    logits: np.ndarray
    floor: float
    log_sum: float
    log_sum_plain: float = NEVER
    target_logit: float = NEVER


def penalise(logits: np.ndarray, row: np.void, history: np.ndarray, first_id: int) -> None:
    """Apply a row's penalties to this rank's logits (ids from first_id on), in place.

    history: (tokens,) the sequence so far, prompt first.
    """
    repeat, presence, frequency = float(row["repeat"]), float(row["presence"]), float(row["frequency"])
    if repeat != 1.0:
        ids = np.unique(history) - first_id
        ids = ids[(ids >= 0) & (ids < logits.size)]
        seen = logits[ids]
        with np.errstate(all="ignore"):  # a penalty near 0 makes infinite logits
            logits[ids] = np.where(seen > 0, seen / np.float32(repeat), seen * np.float32(repeat))
    if presence != 0.0 or frequency != 0.0:
        ids, counts = np.unique(history[int(row["prompt"]) :], return_counts=True)
        ids = ids - first_id
        mine = (ids >= 0) & (ids < logits.size)
        logits[ids[mine]] -= (presence + frequency * counts[mine]).astype(np.float32)


def local_best(logits: np.ndarray, rows: np.ndarray, first_id: int, k: int) -> np.ndarray:
    """Return this rank's part of every row's candidates as float64 (rows, 4 + 2 * k).

    logits: (rows, the rank's ids) float32. A row holds the floor, the log-sum-exp at its temperature and at 1, the
    target's logit, k ids and k logits; places that the rank cannot fill hold id -1.
    """
    answer = np.full((len(rows), _HEAD + 2 * k), NEVER)
    count = min(k, logits.shape[1])
    ids, values = np.empty(count, np.int64), np.empty(count, np.float32)
    for out, row, own in zip(answer, rows, logits, strict=True):
        out[_HEAD : _HEAD + k] = -1
        if count:
            top_k(own, ids, values)
            out[_HEAD : _HEAD + count], out[_HEAD + k : _HEAD + k + count] = ids + first_id, values
        out[0] = values[-1] if logits.shape[1] > count else NEVER
        out[1] = log_sum_exp(own, float(row["temperature"])) if row["temperature"] > 0 else NEVER
        out[2] = log_sum_exp(own, 1.0) if row["logprobs"] else NEVER
        if 0 <= (target := int(row["target"]) - first_id) < own.size:
            out[3] = own[target]
    return answer


def merge(parts: list[np.ndarray]) -> list[Candidates]:
    """Return the candidates of every row from all ranks' `local_best`."""
    merged: list[Candidates] = []
    if not parts:
        return merged
    for row in np.stack(parts, axis=1):  # (ranks, 4 + 2k)
        k = (row.shape[1] - _HEAD) // 2
        ids, logits = row[:, _HEAD : _HEAD + k].ravel().astype(np.int64), row[:, _HEAD + k :].ravel()
        ids, logits = ids[ids >= 0], logits[ids >= 0]
        order = np.lexsort((ids, -logits))
        floor = float(row[:, 0].max())
        with np.errstate(invalid="ignore"):  # of logits that are infinite
            log_sum, plain = (float(np.logaddexp.reduce(row[:, i])) for i in (1, 2))
        merged.append(Candidates(ids[order], logits[order], floor, log_sum, plain, float(row[:, 3].max())))
    return merged


def whole(logits: np.ndarray, temperature: float) -> Candidates:
    """Return the candidates of one row of all logits (vocabulary,) float32."""
    order = np.lexsort((np.arange(logits.size), -logits))
    sums = log_sum_exp(logits, temperature or 1.0), log_sum_exp(logits, 1.0)
    return Candidates(order, logits[order].astype(np.float64), NEVER, *sums)
