"""Causal attention over the KV cache with grouped query heads (GQA)."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .runtime import FASTMATH
from .simd import widen


@njit(cache=True, nogil=True, fastmath=FASTMATH, inline="never")
def _attend(queries, keys, values, scale, out):
    """Attend with a group of queries (g, head_dim) over keys and values (n, head_dim); out (g, head_dim) float32."""
    group, head_dim = queries.shape
    n = keys.shape[0]
    scores = np.empty((group, n), np.float32)
    key = np.empty(head_dim, np.float32)
    for p in range(n):
        for i in range(head_dim):
            key[i] = widen(keys[p, i])
        for g in range(group):
            dot = np.float32(0)
            for i in range(head_dim):
                dot += queries[g, i] * key[i]
            scores[g, p] = dot * scale
    for g in range(group):
        largest = scores[g, 0]
        for p in range(1, n):
            largest = max(largest, scores[g, p])
        total = np.float32(0)
        for p in range(n):
            scores[g, p] = np.float32(math.exp(scores[g, p] - largest))
            total += scores[g, p]
        inverse = np.float32(1) / total
        for i in range(head_dim):
            out[g, i] = 0
        for p in range(n):
            weight = scores[g, p] * inverse
            for i in range(head_dim):
                out[g, i] += weight * widen(values[p, i])


@njit(cache=True, nogil=True, parallel=True)
def attention(
    q, k_cache, v_cache, slots, positions, window, scale, first_head, last_head, group, out, out_start, threads
):
    """Attend from each token to the positions of its slot up to its own.

    q: (tokens, >= heads*head_dim) float32, rotated, for the rank's heads [first_head, last_head) of the whole model;
    k_cache, v_cache: (slots, kv_heads, seq, head_dim), this rank's KV heads; group: query heads a KV head;
    window: positions a token sees, itself included, or 0 for all; out: (tokens, >= heads*head_dim) float32, written
    from column out_start on.
    """
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    first_kv = first_head // group
    items = q.shape[0] * kv_heads
    for thread in prange(threads):
        for item in range(thread, items, threads):
            t, kv = item // kv_heads, item % kv_heads
            low = max(first_head, (first_kv + kv) * group) - first_head
            high = min(last_head, (first_kv + kv + 1) * group) - first_head
            stop = positions[t] + 1
            start = max(0, stop - window) if window > 0 else 0
            span = slice(low * head_dim, high * head_dim)
            _attend(
                q[t, span].reshape(high - low, head_dim),
                k_cache[slots[t], kv, start:stop],
                v_cache[slots[t], kv, start:stop],
                scale,
                out[t, out_start + low * head_dim : out_start + high * head_dim].reshape(high - low, head_dim),
            )
