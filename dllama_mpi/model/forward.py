"""All decoder layers of a step in one compiled call, their all-reduces included.

Each half of a layer is a few parallel regions; between them one token's norms and rotations are done by the calling
thread, because starting a region costs more than they do. A matrix is passed as four integers: the address of its first
tile, the bytes from one row of tiles to the next, rows of tiles, tiles in a row; several stand one after another in one
int64 array.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic, overload

from ..kernels.attention import attention
from ..kernels.elementwise import quantise, quantise_row, rms_norm_row, rope_and_store, rope_and_store_row
from ..kernels.layout import BLOCK, ROWS
from ..kernels.matmul import float_rows, quantised_rows
from ..kernels.simd import (
    F32,
    I64,
    EmitterHere,
    address,
    constant,
    vector,
)
from ..parallel.collective.algorithms import finish_exchange, start_exchange
from ..parallel.collective.link import PARTS
from ..parallel.collective.payload import add_blocks

FIELDS = 4  # integers that describe a matrix


@intrinsic
def _silu_mul(typingctx, gate, up):
    """Replace 32 floats at `gate` by silu(gate) * up; both addresses."""

    def codegen(context, builder, signature, args):
        e, b = EmitterHere(builder), builder
        for half in range(2):
            where, other = (b.add(at, I64(64 * half)) for at in args)
            x, y = e.load(where, vector(F32, ROWS), 4), e.load(other, vector(F32, ROWS), 4)
            one = constant(F32, ROWS, 1.0)
            minus = b.fsub(constant(F32, ROWS, -0.0), x)
            e.store(b.fmul(b.fdiv(x, b.fadd(one, e.exp(minus))), y), where, 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _rows(marker, m, first, last, x, codes, scales, offsets, y, y_stride, tokens):
    """Multiply rows [first, last) of tiles of matrix m with activations; chosen by the marker's format."""
    raise NotImplementedError  # compiled code only


@overload(_rows)
def _choose_rows(marker, m, first, last, x, codes, scales, offsets, y, y_stride, tokens):
    if marker.dtype in (types.uint8, types.int8):

        def quantised(marker, m, first, last, x, codes, scales, offsets, y, y_stride, tokens):
            quantised_rows(marker, m[0], m[1], first, last, m[3], address(codes), address(scales), address(offsets), y,
                           y_stride, tokens)  # fmt: skip

        return quantised

    def floats(marker, m, first, last, x, codes, scales, offsets, y, y_stride, tokens):
        float_rows(marker, m[0], m[1], first, last, m[3], address(x), 4 * x.shape[1], y, y_stride, tokens)

    return floats


@njit(cache=True, nogil=True, inline="never")
def _share(marker, matrices, x, codes, scales, offsets, out, tokens, thread, threads):
    """Do one thread's part of the products of several matrices whose outputs stand side by side."""
    count, total = matrices.size // FIELDS, 0
    for i in range(count):
        total += matrices[FIELDS * i + 2]
    begin, end, base = total * thread // threads, total * (thread + 1) // threads, 0
    for i in range(count):
        m = matrices[FIELDS * i : FIELDS * (i + 1)]
        first, last = max(begin, base) - base, min(end, base + m[2]) - base
        if first < last:
            y = address(out) + 4 * ROWS * base
            _rows(marker, m, first, last, x, codes, scales, offsets, y, 4 * out.shape[1], tokens)
        base += m[2]


@njit(cache=True, nogil=True, parallel=True)
def products(marker, matrices, x, codes, scales, offsets, out, tokens, threads):
    """Multiply the first `tokens` rows of activations with several matrices, outputs side by side in out.

    marker: the weights' format. matrices: see the module. x (tokens, cols) float32, codes, scales, offsets: its Q80
    form, unused for f16 and f32 weights. out: (>= tokens, >= 16 * all rows of tiles) float32, contiguous.
    """
    if threads == 1:
        _share(marker, matrices, x, codes, scales, offsets, out, tokens, np.int64(0), np.int64(1))
        return
    for thread in prange(threads):
        _share(marker, matrices, x, codes, scales, offsets, out, tokens, np.int64(thread), threads)


@njit(cache=True, nogil=True, inline="never")
def _gate_up_share(marker, matrices, biases, x, codes, scales, offsets, inner, i_codes, i_scales, i_offsets, up, tokens,
                   thread, threads):  # fmt: skip
    gate_m, up_m = matrices[:FIELDS], matrices[FIELDS : 2 * FIELDS]
    blocks, stride = inner.shape[1] // BLOCK, 4 * inner.shape[1]
    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        first, last = 2 * block, min(2 * block + 2, gate_m[2])
        _rows(marker, gate_m, first, last, x, codes, scales, offsets, address(inner), stride, tokens)
        _rows(marker, up_m, first, last, x, codes, scales, offsets, address(up), stride, tokens)
        for t in range(tokens):
            if biases.size > 0:
                for i in range(BLOCK * block, min(BLOCK * block + BLOCK, biases.shape[1])):
                    inner[t, i] += biases[0, i]
                    up[t, i] += biases[1, i]
            at = 4 * BLOCK * block + t * stride
            _silu_mul(address(inner) + at, address(up) + at)
            if i_codes.size > 0:
                part = slice(BLOCK * block, BLOCK * block + BLOCK)
                quantise_row(inner[t, part], i_codes[t, part], i_scales[t, block : block + 1],
                             i_offsets[t, block : block + 1])  # fmt: skip


@njit(cache=True, nogil=True, parallel=True)
def _gate_up(marker, matrices, biases, x, codes, scales, offsets, inner, i_codes, i_scales, i_offsets, up, tokens,
             threads):  # fmt: skip
    if threads == 1:
        _gate_up_share(marker, matrices, biases, x, codes, scales, offsets, inner, i_codes, i_scales, i_offsets, up,
                       tokens, np.int64(0), np.int64(1))  # fmt: skip
        return
    for thread in prange(threads):
        _gate_up_share(marker, matrices, biases, x, codes, scales, offsets, inner, i_codes, i_scales, i_offsets, up,
                       tokens, np.int64(thread), threads)  # fmt: skip


@njit(cache=True, nogil=True, inline="never")
def _add_and_normalise_row(x, token, source, bias, norm, eps, out, codes, scales, offsets):
    """Add what an exchange brought and a bias to one token's residual; write its RMSNorm unless norm is empty."""
    blocks = x.size // BLOCK
    for k in range(source[1]):
        add_blocks(address(x), source[0] + k * source[2] + token * blocks * source[3], blocks, source[3])
    for i in range(bias.size):
        x[i] += bias[i]
    if norm.size > 0:
        rms_norm_row(x, norm, eps, norm.size, out)
        if codes.size > 0:
            quantise_row(out, codes[0], scales[0], offsets[0])


@njit(cache=True, nogil=True, parallel=True)
def _add_and_normalise_rows(residual, source, bias, norm, eps, x, codes, scales, offsets, quantised):
    for t in prange(residual.shape[0]):
        own = slice(t * quantised, t * quantised + quantised)  # of arrays without rows: nothing
        _add_and_normalise_row(residual[t], np.int64(t), source, bias, norm, eps, x[t], codes[own], scales[own],
                               offsets[own])  # fmt: skip


@njit(cache=True, nogil=True)
def add_and_normalise(residual, source, bias, norm, eps, x, codes, scales, offsets):
    """Add a source (see `kernels.exchange`) and a bias to the residual (tokens, hidden to 32s) float32, in place.

    bias: (hidden,) or empty. norm: weights of an RMSNorm (arXiv:1910.07467) whose result goes to x (>= tokens, ...),
    quantised to codes, scales and offsets as well unless these are empty, or empty for none.
    """
    quantised = 1 if codes.size > 0 else 0
    if residual.shape[0] > 1:
        _add_and_normalise_rows(residual, source, bias, norm, eps, x, codes, scales, offsets, quantised)
    else:
        _add_and_normalise_row(residual[0], np.int64(0), source, bias, norm, eps, x[0], codes, scales, offsets)


@njit(cache=True, nogil=True)
def _attention_half(marker, kv_marker, matrices, residual, x, codes, scales, offsets, qkv, bias, q_norm,
                    k_norm, eps, cos, sin, head_dim, first_head, last_head, group, keys, key_scales, values,
                    value_scales, slots, positions, window, scale, attended, a_codes, a_scales, a_offsets, out_start,
                    partial, threads):  # fmt: skip
    """Write this rank's term of the attention's output into partial (tokens, hidden), and fill the KV cache.

    matrices: q, k, v, o. x, codes, scales, offsets: the normalised input; qkv, attended...: scratch of the products'
    widths. The other arguments are those of `rope_and_store` and `attention`.
    """
    tokens = residual.shape[0]
    products(marker, matrices[: 3 * FIELDS], x, codes, scales, offsets, qkv, tokens, threads)
    k_start = ROWS * matrices[2]
    v_start = k_start + ROWS * matrices[FIELDS + 2]
    heads = last_head - first_head
    if tokens > 1:
        rope_and_store(qkv[:tokens], bias, q_norm, k_norm, eps, cos, sin, head_dim, heads, k_start, v_start, keys,
                       key_scales, values, value_scales, slots, positions)  # fmt: skip
    else:
        rope_and_store_row(qkv[0], bias, q_norm, k_norm, eps, cos[0], sin[0], head_dim, heads, k_start, v_start,
                           keys[slots[0]], key_scales[slots[0]], values[slots[0]], value_scales[slots[0]],
                           positions[0])  # fmt: skip
    attention(kv_marker, qkv[:tokens], keys, key_scales, values, value_scales, slots, positions, window, scale,
              head_dim, first_head, last_head, group, attended[:tokens], out_start, threads)  # fmt: skip
    if a_codes.size > 0:
        if tokens > 1:
            quantise(attended[:tokens], a_codes, a_scales, a_offsets)
        else:
            quantise_row(attended[0], a_codes[0], a_scales[0], a_offsets[0])
    products(marker, matrices[3 * FIELDS : 4 * FIELDS], attended, a_codes, a_scales, a_offsets, partial, tokens,
             threads)  # fmt: skip


@njit(cache=True, nogil=True)
def decoder_layers(marker, kv_marker, matrices, norms, eps, residual, x, codes, scales, offsets, qkv, qkv_bias, q_norms,
                   k_norms, cos, sin, head_dim, first_head, last_head, group, keys, key_scales, values, value_scales,
                   slots, positions, windows, scale, attended, a_codes, a_scales, a_offsets, out_start, o_bias,
                   gate_up_bias, inner, i_codes, i_scales, i_offsets, up, down_bias, partial, link, parts,
                   threads):  # fmt: skip
    """Pass the residual (tokens, hidden to 32s) float32 through all layers, in place, and fill the KV cache.

    marker, kv_marker: formats of the weights and of the cache. Arrays with a first axis of layers: matrices, those of
    q, k, v, o, gate, up, down; norms (layers, 2, hidden); qkv_bias, q_norms, k_norms, o_bias, gate_up_bias (layers, 2,
    n), down_bias, empty in the last axis where the model has none; windows; keys, values and their scales. x, codes,
    scales, offsets, qkv, attended..., inner..., up: scratch. partial: (2, tokens, hidden to 32s), this rank's terms of
    the two all-reduces of a layer. link: see `kernels.link`. parts: bounds of the parts of the tokens, whose
    exchanges overlap with the other part's computing; the tokens of one sequence stand in order. The rest is as in
    `rope_and_store` and `attention`.
    """
    layers, count = matrices.shape[0], parts.size - 1
    sources = np.zeros((PARTS, 4), np.int64)
    no_norm, no_bias = norms[0, 0, :0], o_bias[0, :0]
    for layer in range(layers):
        m = matrices[layer]
        for p in range(count):
            a, b = parts[p], parts[p + 1]
            rows, source = residual[a:b], sources[p]
            finish_exchange(link, source)
            add_and_normalise(rows, source, down_bias[layer - 1] if layer > 0 else no_bias, norms[layer, 0], eps, x,
                              codes, scales, offsets)  # fmt: skip
            _attention_half(marker, kv_marker, m, rows, x, codes, scales, offsets, qkv, qkv_bias[layer],
                            q_norms[layer], k_norms[layer], eps, cos[a:b], sin[a:b], head_dim, first_head, last_head,
                            group, keys[layer], key_scales[layer], values[layer], value_scales[layer], slots[a:b],
                            positions[a:b], windows[layer], scale, attended, a_codes, a_scales, a_offsets, out_start,
                            partial[0, a:b], threads)  # fmt: skip
            start_exchange(link, address(partial[0, a:b]), (b - a) * partial.shape[2] // BLOCK, p, source,
                           m[4 * FIELDS], m[4 * FIELDS + 1] * m[4 * FIELDS + 2] // threads)  # fmt: skip
        for p in range(count):
            a, b = parts[p], parts[p + 1]
            rows, source = residual[a:b], sources[p]
            finish_exchange(link, source)
            add_and_normalise(rows, source, o_bias[layer], norms[layer, 1], eps, x, codes, scales, offsets)
            _gate_up(marker, m[4 * FIELDS :], gate_up_bias[layer], x, codes, scales, offsets, inner, i_codes, i_scales,
                     i_offsets, up, b - a, threads)  # fmt: skip
            products(marker, m[6 * FIELDS :], inner, i_codes, i_scales, i_offsets, partial[1, a:b], b - a, threads)
            following = matrices[min(layer + 1, layers - 1)]
            start_exchange(link, address(partial[1, a:b]), (b - a) * partial.shape[2] // BLOCK, p, source,
                           following[0], following[1] * following[2] // threads)  # fmt: skip
    for p in range(count):
        finish_exchange(link, sources[p])
        add_and_normalise(residual[parts[p] : parts[p + 1]], sources[p], down_bias[layers - 1], no_norm, eps, x, codes,
                          scales, offsets)  # fmt: skip
