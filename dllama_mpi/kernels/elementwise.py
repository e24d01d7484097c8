"""Kernels between the matrix products: RMSNorm, SiLU, rotary embedding, residuals, Q80 activations."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from .layout import BLOCK, ROWS
from .runtime import FASTMATH
from .simd import F16, I8, I16, narrow, widen


@intrinsic
def _as_element(typingctx, array, value):
    """Return a float32 as an element of a float32 or float16 (uint16 bits) array."""

    def codegen(context, builder, signature, args):
        if signature.return_type == types.float32:
            return args[1]
        if signature.return_type == types.int8:  # codes are not made here
            return builder.fptosi(args[1], I8)
        return builder.bitcast(builder.fptrunc(args[1], F16), I16)

    return array.dtype(array, types.float32), codegen


@njit(cache=True, nogil=True, fastmath=FASTMATH, inline="never")
def quantise_row(x, xq, xs, xc):
    """Quantise a float32 row to Q80: int8 codes, a float32 scale a block of 32, and -8 * the block's sum of codes."""
    for block in range(xs.size):
        start = block * BLOCK
        largest = np.float32(0)
        for i in range(BLOCK):
            largest = max(largest, abs(x[start + i]))
        inverse = np.float32(127) / largest if largest > 0 else np.float32(0)
        total = np.int32(0)
        for i in range(BLOCK):
            code = np.int32(np.rint(x[start + i] * inverse))
            xq[start + i] = np.int8(code)
            total += code
        xs[block] = largest * np.float32(1 / 127)
        xc[block] = np.int32(-8) * total


@njit(cache=True, nogil=True, parallel=True)
def quantise(x, xq, xs, xc):
    """Quantise activations x (tokens, cols) float32 to Q80; cols is a multiple of 32."""
    for t in prange(x.shape[0]):
        quantise_row(x[t], xq[t], xs[t], xc[t])


@njit(cache=True, nogil=True, fastmath=FASTMATH, inline="never")
def rms_norm_row(x, weight, eps, size, out):
    square = np.float32(0)
    for i in range(size):
        square += x[i] * x[i]
    scale = np.float32(1) / np.float32(math.sqrt(square / np.float32(size) + eps))
    for i in range(size):
        out[i] = x[i] * scale * weight[i]


@njit(cache=True, nogil=True, fastmath=FASTMATH, inline="never")
def _rotate(head, cos, sin):
    half = cos.size
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@njit(cache=True, nogil=True, inline="never")
def _codes_of(x, codes):
    """Quantise up to 32 floats to int8 codes; return their scale as float16 bits."""
    largest = np.float32(0)
    for i in range(x.size):
        largest = max(largest, abs(x[i]))
    scale = narrow(largest / np.float32(127))
    inverse = np.float32(1) / widen(scale) if widen(scale) > 0 else np.float32(0)
    for i in range(x.size):
        codes[i] = np.int8(max(np.float32(-127), min(np.float32(127), np.rint(x[i] * inverse))))
    return scale


@njit(cache=True, nogil=True, inline="never")
def _store(key, value, keys, key_scales, values, value_scales, position):
    """Put one head's key and value (head_dim,) float32 at a position of its cache."""
    tile, lane = position // ROWS, position % ROWS
    if key_scales.size == 0:
        for i in range(key.size):
            keys[tile, i, lane] = _as_element(keys, key[i])
            values[i // ROWS, position, i % ROWS] = _as_element(values, value[i])
        return
    codes = np.empty(BLOCK, np.int8)
    for start in range(0, key.size, BLOCK):
        stop = min(start + BLOCK, key.size)
        key_scales[tile, start // BLOCK, lane] = _codes_of(key[start:stop], codes)
        for i in range(start, stop):
            keys[tile, i, lane] = codes[i - start]
        value_scales[start // BLOCK, position] = _codes_of(value[start:stop], codes)
        for i in range(start, stop):
            values[i // ROWS, position, i % ROWS] = codes[i - start]


@njit(cache=True, nogil=True, inline="never")
def rope_and_store_row(row, bias, q_norm, k_norm, eps, cos, sin, head_dim, q_heads, k_start, v_start, keys, key_scales,
                       values, value_scales, position):  # fmt: skip
    """Do one token's part of `rope_and_store`; the cache is its slot's."""
    if bias.size > 0:
        for i in range(bias.size):
            row[i] += bias[i]
    for h in range(q_heads):
        head = row[h * head_dim : (h + 1) * head_dim]
        if q_norm.size > 0:
            rms_norm_row(head, q_norm, eps, head_dim, head)
        _rotate(head, cos, sin)
    for h in range(keys.shape[0]):
        head = row[k_start + h * head_dim : k_start + (h + 1) * head_dim]
        if k_norm.size > 0:
            rms_norm_row(head, k_norm, eps, head_dim, head)
        _rotate(head, cos, sin)
        value = row[v_start + h * head_dim : v_start + (h + 1) * head_dim]
        _store(head, value, keys[h], key_scales[h], values[h], value_scales[h], position)


@njit(cache=True, nogil=True, parallel=True)
def rope_and_store(qkv, bias, q_norm, k_norm, eps, cos, sin, head_dim, q_heads, k_start, v_start, keys, key_scales,
                   values, value_scales, slots, positions):  # fmt: skip
    """Finish queries and keys in place and put keys and values into the cache.

    qkv: (tokens, n) float32, q heads from 0, k heads from k_start, v heads from v_start; bias: (n,) or empty;
    q_norm, k_norm: (head_dim,) RMSNorm weights a head, or empty; cos, sin: (tokens, head_dim / 2) float32, the
    rotary embedding in half-split order (arXiv:2104.09864); keys, values and scales: the cache, see
    `kernels.attention`; slots, positions: (tokens,) int32.
    """
    for t in prange(qkv.shape[0]):
        slot = slots[t]
        rope_and_store_row(qkv[t], bias, q_norm, k_norm, eps, cos[t], sin[t], head_dim, q_heads, k_start, v_start,
                           keys[slot], key_scales[slot], values[slot], value_scales[slot], positions[t])  # fmt: skip
