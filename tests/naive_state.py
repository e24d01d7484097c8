"""Slow, obviously right numpy twins of the kernels with recurrent state: short convolutions and the delta rule.

Everything is float64 and whole sequences at once; nothing here shares code with the package.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def silu(x: Doubles) -> Doubles:
    """Return x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def short_conv(x: Doubles, taps: Doubles, bias: Doubles) -> Doubles:
    """Return the causal depthwise convolution of a whole sequence x (tokens, channels) with taps (channels, taps)."""
    count = taps.shape[1]
    padded = np.concatenate([np.zeros((count - 1, x.shape[1])), x])
    return np.stack([(padded[t : t + count].T * taps).sum(axis=1) + bias for t in range(len(x))])


def gated_short_conv(b: Doubles, c: Doubles, x: Doubles, taps: Doubles, bias: Doubles) -> Doubles:
    """Return LFM2's mixer between its projections: C * conv(B * x), all (tokens, channels)."""
    return c * short_conv(b * x, taps, bias)


def normalised(x: Doubles) -> Doubles:
    """Return vectors (..., n) divided by their length."""
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)


def delta_rule(q: Doubles, k: Doubles, v: Doubles, decay: Doubles, beta: Doubles) -> tuple[Doubles, Doubles]:
    """Return the gated delta rule's output (tokens, value_dim) of one head, and its state (key_dim, value_dim).

    q, k: (tokens, key_dim), v: (tokens, value_dim), decay, beta: (tokens,).
    """
    state, outputs = np.zeros((k.shape[1], v.shape[1])), []
    for t in range(len(q)):
        key, query = normalised(k[t]), normalised(q[t]) / np.sqrt(k.shape[1])
        state = decay[t] * state
        state = state + np.outer(key, beta[t] * (v[t] - key @ state))
        outputs.append(query @ state)
    return np.stack(outputs), state


def gated_norm(x: Doubles, z: Doubles, weight: Doubles, eps: float) -> Doubles:
    """Return the RMSNorm of heads x (..., value_dim), times SiLU of their gates z."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight * silu(z)


def delta_net(
    parts: dict[str, Doubles], taps: Doubles, bias: Doubles, a_log: Doubles, dt_bias: Doubles, norm: Doubles, eps: float
) -> tuple[Doubles, Doubles]:
    """Return what a gated delta net computes between its projections for a sequence, and its states.

    parts: q, k (tokens, key_heads, key_dim), v, z (tokens, value_heads, value_dim), b, a (tokens, value_heads).
    taps: (channels, taps), bias: (channels,), channels being all q, all k, all v. Returns (tokens, value_heads *
    value_dim) and (value_heads, key_dim, value_dim).
    """
    tokens, key_heads, key_dim = parts["q"].shape
    value_heads, value_dim = parts["v"].shape[1:]
    mixed = np.concatenate([parts[name].reshape(tokens, -1) for name in "qkv"], axis=1)
    mixed = silu(short_conv(mixed, taps, bias))
    q, k, v = np.split(mixed, [key_heads * key_dim, 2 * key_heads * key_dim], axis=1)
    q, k = (x.reshape(tokens, key_heads, key_dim) for x in (q, k))
    v = v.reshape(tokens, value_heads, value_dim)
    decay = np.exp(-np.exp(a_log) * np.log1p(np.exp(parts["a"] + dt_bias)))
    beta = 1 / (1 + np.exp(-parts["b"]))
    outputs, states = [], []
    for head in range(value_heads):
        key_head = head // (value_heads // key_heads)
        output, state = delta_rule(q[:, key_head], k[:, key_head], v[:, head], decay[:, head], beta[:, head])
        outputs.append(gated_norm(output, parts["z"][:, head], norm, eps))
        states.append(state)
    return np.concatenate(outputs, axis=1), np.stack(states)
