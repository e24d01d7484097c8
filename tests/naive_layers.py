"""Naive twins of what a layer computes between its matrix products: norms, activations, rope and attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.naive_formats import BLOCK, padded
from tests.naive_numbers import Doubles, F, Floats, Ints, fma


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    exact = x.astype(np.float64)
    exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True) + eps)
    return (exact * weight).astype(np.float32)


def rms_norm_in_order(row: Floats, weight: Floats, eps: float) -> Floats:
    """Return the RMSNorm of a row as the program computes it where every rank must get the same bits.

    Squares are summed in 32 lanes by fused multiply-adds, then lanes i and i + 16, i and i + 8, and so on.
    """
    lanes = np.zeros(BLOCK, np.float32)
    for block in padded(row[None], 1, BLOCK).reshape(-1, BLOCK):
        lanes = fma(block, block, lanes)
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    scale = F(1) / np.sqrt(lanes[0] / F(len(row)) + F(eps))
    return row * scale * weight


def silu_mul(gate: Floats, up: Floats) -> Floats:
    """Return silu(gate) * up."""
    g = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        return (g / (1 + np.exp(-g)) * up).astype(np.float32)


def gelu_tanh_mul(gate: Floats, up: Floats) -> Floats:
    """Return the tanh approximation of GELU (arXiv:1606.08415) of gate, times up."""
    g = gate.astype(np.float64)
    # 1 + tanh(u) as 2 / (1 + exp(-2 u)), which keeps its digits where it is small.
    with np.errstate(over="ignore"):
        return (g / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * up).astype(np.float32)


def rope_angles(config: dict[str, Any], dim: int, positions: Ints, length: int) -> tuple[Doubles, float]:
    """Return the angles (tokens, dim / 2) of positions in a sequence of `length`, and what cos and sin are scaled by.

    After transformers' modeling_rope_utils.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta, factor = given.get("rope_theta", config.get("rope_theta", 10000.0)), given.get("factor", 1.0)
    trained: Any = given.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    scale, exponents = 1.0, np.arange(0, dim, 2) / dim
    if kind == "dynamic":
        longest = max(length, config["max_position_embeddings"])
        theta *= (factor * longest / config["max_position_embeddings"] - (factor - 1)) ** (dim / (dim - 2))
    turns = float(theta) ** -exponents  # radians a position
    if kind == "linear":
        turns = turns / factor
    elif kind == "llama3":
        wavelengths = 2 * math.pi / turns
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        kept = np.clip((trained / wavelengths - low) / (high - low), 0, 1)
        turns = (1 - kept) * turns / factor + kept * turns
    elif kind == "yarn":
        turns, scale = _yarn(given, float(theta), turns, trained, dim)
    return positions[:, None] * turns, scale


def _yarn(given: dict[str, Any], theta: float, turns: Doubles, trained: int, dim: int) -> tuple[Doubles, float]:
    factor = given["factor"]

    def dimension(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    low, high = dimension(given.get("beta_fast", 32)), dimension(given.get("beta_slow", 1))
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    scale = given.get("attention_factor")
    if scale is None:
        scale = mscale(1)
        if given.get("mscale") and given.get("mscale_all_dim"):
            scale = mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return slow * turns / factor + (1 - slow) * turns, float(scale)


def rotate(heads: Floats, angles: Doubles, factor: float = 1.0) -> Floats:
    """Rotate heads (tokens, n, head_dim) by angles (tokens, dims / 2): element i turns with i + dims / 2.

    Elements from `dims` on stay as they are.
    """
    dims = 2 * angles.shape[1]
    cos, sin = factor * np.cos(angles)[:, None], factor * np.sin(angles)[:, None]
    first, second = np.split(heads[:, :, :dims].astype(np.float64), 2, axis=2)
    turned: list[npt.NDArray[Any]] = [first * cos - second * sin, second * cos + first * sin, heads[:, :, dims:]]
    return np.concatenate(turned, axis=2).astype(np.float32)


class Scores(NamedTuple):
    """How scores of attention become weights.

    Attributes:
        scale: of the scores; None: 1 / sqrt(head_dim). softcap: s: scores become s * tanh(score / s); 0 for none.
        sinks: (heads,) logits that take part in the softmax and have no value, or None.
    """

    scale: float | None = None
    softcap: float = 0.0
    sinks: Floats | None = None


PLAIN_SCORES = Scores()


def attention(q: Floats, k: Floats, v: Floats, positions: Ints, window: int, how: Scores = PLAIN_SCORES) -> Floats:
    """Return the attention (tokens, heads, head_dim) of one sequence.

    q: (tokens, heads, head_dim); k, v: (kv_heads, positions, head_dim), each KV head read by heads / kv_heads query
    heads in turn; positions: (tokens,); window: positions a token sees, itself included, or 0 for all before it.
    """
    tokens, heads, dim = q.shape
    group = heads // len(k)
    out = np.zeros((tokens, heads, dim), np.float32)
    for t in range(tokens):
        stop = int(positions[t]) + 1
        start = max(0, stop - window) if window else 0
        for h in range(heads):
            keys, values = (a[h // group, start:stop].astype(np.float64) for a in (k, v))
            scores = keys @ q[t, h].astype(np.float64) * (dim**-0.5 if how.scale is None else how.scale)
            if how.softcap:
                scores = how.softcap * np.tanh(scores / how.softcap)
            sink = -np.inf if how.sinks is None else float(how.sinks[h])
            top = max(scores.max(), sink)
            weights = np.exp(scores - top)
            out[t, h] = weights @ values / (weights.sum() + np.exp(sink - top))
    return out
