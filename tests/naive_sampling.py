"""Naive twins of choosing a token: candidates, penalties and the distribution."""

from __future__ import annotations

import math

import numpy as np

from tests.naive_numbers import Doubles, Floats


def top_k(logits: Floats, k: int) -> tuple[list[int], list[float]]:
    """Return the k largest logits' indices and values, best first, ties by lower index."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]
    return order, [float(logits[i]) for i in order]


def penalised(
    logits: Floats, history: list[int], prompt: int, repeat: float, presence: float, frequency: float
) -> Doubles:
    """Return logits (vocab,) after the penalties for the tokens of a history whose first `prompt` are the prompt's."""
    out = logits.astype(np.float64)
    for token in set(history):
        out[token] = out[token] / repeat if out[token] > 0 else out[token] * repeat
    for token in set(history[prompt:]):
        out[token] -= presence + frequency * history[prompt:].count(token)
    return out


def distribution(
    logits: Floats, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[tuple[int, float]]:
    """Return the tokens that may be chosen with their probabilities, best first, ties by lower id."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return [(order[0], 1.0)]
    order = order[:top_k] if top_k else order
    weights = [math.exp((float(logits[i]) - float(logits[order[0]])) / temperature) for i in order]
    probabilities = [w / math.fsum(weights) for w in weights]
    kept, reached = [], 0.0
    for token, p in zip(order, probabilities, strict=True):
        if (top_p < 1 and reached >= top_p) or p < min_p * probabilities[0]:
            break
        kept.append((token, p))
        reached += p
    mass = math.fsum(p for _, p in kept)
    return [(token, p / mass) for token, p in kept]


def choose(choices: list[tuple[int, float]], value: float) -> int:
    """Return the token at which the sum of a distribution's probabilities passes a value from [0, 1)."""
    reached = 0.0
    for token, p in choices:
        reached += p
        if reached > value:
            return token
    return choices[-1][0]
