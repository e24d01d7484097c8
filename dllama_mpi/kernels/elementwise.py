"""Kernels between the matrix products: RMSNorm, rotary embedding, residuals, Q80 activations.

What decides about the residual, which every rank holds, is done in one order on every instruction set: unlike machines
get the same bits from the same bytes, and so choose the same experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from .compiled import inner
from .layout import BLOCK, PAGE, ROWS
from .parallel import run_parallel
from .runtime import FASTMATH
from .sampling import reduce_lanes
from .simd import F16, F32, I8, I16, I64, EmitterHere, address, constant, narrow, vector, widen


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


@inner(fastmath=FASTMATH)
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


@inner
def _quantise_share(x, tokens, thread, threads):
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        quantise_row(x.values[t], x.codes[t], x.scales[t], x.offsets[t])


@inner
def quantise(x, tokens, threads):
    """Write the Q80 form of the first tokens of `Activations`, if they have one."""
    if x.codes.size == 0:
        return
    run_parallel(_quantise_share, (x, tokens), np.int64(1) if tokens == 1 else threads)


# ---- RMSNorm (arXiv:1910.07467)


@intrinsic
def _sum_of_squares(typingctx, at, n):
    """Return the sum of squares of n floats at an address; n is a multiple of 32."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)

        def body(i, state):
            here = e.b.add(args[0], e.b.mul(i, I64(4 * BLOCK)))
            values = [e.load(e.b.add(here, I64(4 * ROWS * half)), vector(F32, ROWS), 4) for half in (0, 1)]
            return [e.fma(v, v, total) for v, total in zip(values, state, strict=True)]

        zero = constant(F32, ROWS, 0.0)
        totals = e.counted_loop(e.b.sdiv(args[1], I64(BLOCK)), [zero, zero], body)
        return reduce_lanes(e, e.b.fadd(*totals), e.b.fadd)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def _scale_and_multiply(typingctx, at, weights, out, n, scale):
    """Write x * scale * weight for n floats at addresses; n is a multiple of 32."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)
        at, weights, out, n, scale = args
        factor = e.splat(scale, ROWS)

        def body(i, state):
            offset = e.b.mul(i, I64(4 * ROWS))
            x, w = (e.load(e.b.add(a, offset), vector(F32, ROWS), 4) for a in (at, weights))
            e.store(e.b.fmul(e.b.fmul(x, factor), w), e.b.add(out, offset), 4)
            return state

        e.counted_loop(e.b.sdiv(n, I64(ROWS)), [], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32), codegen


@inner
def normalise_row(x, weight, size, eps, out):
    """Write the RMSNorm of `size` values of a contiguous float32 row; padding to 32s, and the weight's, is zero."""
    mean = _sum_of_squares(address(x), x.size) / np.float32(size)
    scale = np.float32(1) / np.float32(math.sqrt(mean + eps))
    _scale_and_multiply(address(x), address(weight), address(out), x.size, scale)


@inner(fastmath=FASTMATH)
def rms_norm_row(x, weight, eps, size, out):
    """Write the RMSNorm of one head's row, or of any other that one rank alone looks at."""
    square = np.float32(0)
    for i in range(size):
        square += x[i] * x[i]
    scale = np.float32(1) / np.float32(math.sqrt(square / np.float32(size) + eps))
    for i in range(size):
        out[i] = x[i] * scale * weight[i]


@inner(fastmath=FASTMATH)
def _rotate(head, cos, sin):
    half = cos.size
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@inner
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


@inner
def _store(key, value, keys, key_scales, values, value_scales, position):
    """Put one head's key and value (head_dim,) float32 at a position of a page."""
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


class Preparation(NamedTuple):
    """What happens to a layer's queries, keys and values between their projection and the attention.

    Attributes:
        bias: (n,) float32 of the projections side by side, or empty. q_norm, k_norm: (head_dim,) RMSNorm weights of
            each head, or empty. eps: of these norms. norm_last: whether they come after the rotation.
        clip: what queries, keys and values are limited to in size before the rotation; 0 for no limit.
        k_start, v_start: columns where keys and values begin.
    """

    bias: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    eps: float
    norm_last: int
    clip: float
    k_start: int
    v_start: int


@inner
def _clip(head, limit):
    if limit > 0:
        for i in range(head.size):
            head[i] = max(-limit, min(limit, head[i]))


@inner
def _finish_head(head, norm, p, cos, sin):
    """Normalise and rotate one head (head_dim,) in place; cos and sin: (rotated dimensions / 2,)."""
    if norm.size > 0 and p.norm_last == 0:
        rms_norm_row(head, norm, p.eps, head.size, head)
    _clip(head, np.float32(p.clip))
    _rotate(head, cos, sin)
    if norm.size > 0 and p.norm_last != 0:
        rms_norm_row(head, norm, p.eps, head.size, head)


@inner
def _rope_and_store_share(qkv, heads, p, step, rope, cache, thread, threads):
    tokens, dim = step.positions.size, heads.dim
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        row, position = qkv[t], step.positions[t]
        page = step.tables[step.slots[t], position // PAGE]
        cos, sin = step.cos[rope, step.first + t], step.sin[rope, step.first + t]
        for i in range(p.bias.size):
            row[i] += p.bias[i]
        for h in range(heads.last - heads.first):
            _finish_head(row[h * dim : (h + 1) * dim], p.q_norm, p, cos, sin)
        for h in range(cache.keys.shape[1]):
            key = row[p.k_start + h * dim : p.k_start + (h + 1) * dim]
            value = row[p.v_start + h * dim : p.v_start + (h + 1) * dim]
            _finish_head(key, p.k_norm, p, cos, sin)
            _clip(value, np.float32(p.clip))
            _store(
                key,
                value,
                cache.keys[page, h],
                cache.key_scales[page, h],
                cache.values[page, h],
                cache.value_scales[page, h],
                position % PAGE,
            )


@inner
def rope_and_store(qkv, heads, preparation, step, rope, cache, threads):
    """Finish queries and keys in place and put keys and values into the cache.

    qkv: (>= tokens, n) float32, the rank's q heads from column 0, k and v heads from where `Preparation` says.
    heads, cache: see `kernels.attention`. step: slots, positions (tokens,) int32; tables (slots, n) int32, each slot's
    pages; cos, sin (ropes, all tokens, rotated dimensions / 2) float32, the rotary embedding in half-split order
    (arXiv:2104.09864), these tokens' from `first` on.
    rope: which of them.
    """
    run_parallel(
        _rope_and_store_share,
        (qkv, heads, preparation, step, rope, cache),
        np.int64(1) if step.positions.size == 1 else threads,
    )
