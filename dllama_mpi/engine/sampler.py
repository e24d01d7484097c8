"""Choosing a token from a row's candidates: greedy, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..log import warn
from .candidates import Candidates
from .request import SamplingParams, TokenLogprobs

WANTED = 64  # candidates a rank sends for sampling without top-k: enough for most rows' top-p


def wanted(params: SamplingParams, vocab_size: int) -> int:
    """Return how many candidates each rank should send for these parameters."""
    k = 1 if params.temperature == 0 else params.top_k or WANTED
    return min(max(k, params.logprobs or 0), vocab_size)


def row_of(params: SamplingParams, prompt_length: int, vocab_size: int) -> tuple[Any, ...]:
    """Return what every rank must know of these parameters to prepare a row of logits, as a `ROW`."""
    p = params
    penalties = p.repeat_penalty, p.presence_penalty, p.frequency_penalty
    return wanted(p, vocab_size), prompt_length, -1, p.temperature, *penalties, p.logprobs is not None


def score_row(count: int, target: int, vocab_size: int) -> tuple[Any, ...]:
    """Return a `ROW` for the log-probabilities of a token and of the `count` best."""
    return min(max(count, 1), vocab_size), 0, target, 0.0, 1.0, 0.0, 0.0, True


POOLED_ROW: tuple[Any, ...] = (0, 0, 0, 0.0, 1.0, 0.0, 0.0, False)


def logprobs_of(candidates: Candidates, token: int, count: int) -> TokenLogprobs:
    """Return the natural log-probabilities of a token, the target or among the candidates, and of the `count` best."""
    with np.errstate(invalid="ignore"):  # infinite ones
        values = candidates.logits - candidates.log_sum_plain
    own = candidates.target_logit - candidates.log_sum_plain
    if own == -np.inf:
        own = float(values[candidates.ids == token][0])
    return TokenLogprobs(own, tuple(zip(candidates.ids[:count].tolist(), values[:count].tolist(), strict=True)))


@functools.cache
def _warn_of_logits() -> None:
    """Say once that logits are no distribution, so that the first token is taken."""
    warn("logits are not finite: the model's weights are damaged, get them again; or a penalty is too near 0")


def choose(candidates: Candidates, params: SamplingParams, rng_value: float) -> int | None:
    """Return the chosen token, or None if the candidates do not cover what decides it.

    rng_value: uniform in [0, 1). The choice inverts the cumulative distribution of the kept tokens, best first, so
    that it is the same from few candidates or from the whole vocabulary.
    """
    ids, scaled = candidates.ids, candidates.logits
    is_finite = np.isfinite(scaled[0]) and (params.temperature == 0 or np.isfinite(candidates.log_sum))
    if not is_finite:
        _warn_of_logits()
    if params.temperature == 0 or not is_finite:
        return int(ids[0])
    scaled, total = scaled / params.temperature, candidates.log_sum
    complete = candidates.floor == -np.inf  # nothing that could be chosen is missing from the list
    if params.top_k:
        ids, scaled, complete = ids[: params.top_k], scaled[: params.top_k], True
        total = float(np.logaddexp.reduce(scaled))
    elif not complete:  # a token no better than the floor may have an equal elsewhere
        certain = int(np.searchsorted(-candidates.logits, -candidates.floor, "left"))
        ids, scaled = ids[:certain], scaled[:certain]
    probabilities = np.exp(scaled - total)
    if params.top_p < 1:
        reached = np.cumsum(probabilities)
        keep = int(np.searchsorted(reached, params.top_p, "left")) + 1
        if keep > len(ids) and not complete:
            return None
        ids, probabilities, complete = ids[:keep], probabilities[:keep], True
    if params.min_p > 0:
        keep = int(np.searchsorted(-probabilities, -params.min_p * probabilities[:1].max(initial=0), "right"))
        least = params.min_p * float(probabilities[:1].max(initial=0))
        if keep == len(ids) and not complete and np.exp(candidates.floor / params.temperature - total) >= least:
            return None
        ids, probabilities, complete = ids[:keep], probabilities[:keep], True
    mass = float(probabilities.sum())
    if not complete and rng_value >= mass:
        return None
    return _draw(ids, probabilities, rng_value * (mass if complete else 1.0))


def _draw(ids: np.ndarray, probabilities: np.ndarray, point: float) -> int:
    index = int(np.searchsorted(np.cumsum(probabilities), point, "right"))
    return int(ids[min(index, len(ids) - 1)])
