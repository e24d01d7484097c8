"""Attention of one rank's heads as a mixer: projections, norms, rotation, the cache, the output projection."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..kernels.activation import multiply_by_sigmoids
from ..kernels.attention import Heads, attention
from ..kernels.compiled import call, inner
from ..kernels.elementwise import Preparation, quantise, rope_and_store
from ..kernels.layout import BLOCK, ROWS
from ..kernels.matrix import Activations
from ..kernels.simd import address
from ..parallel.collective.exchange import Ahead, finish_exchange, start_exchange
from ..parallel.collective.link import EXACT
from ..parallel.collective.payload import add_blocks
from .linear import SideBySide, multiply, project


class Attention(NamedTuple):
    """q, k, v (and a gate) column-parallel by heads, o row-parallel over the same heads. One all-reduce.

    Attributes:
        qkv: q, k, v and, if the output is gated, its gate. o: matrix. Fields (layers, FIELDS) each.
        heads: see `kernels.attention.Heads`.
        bias: (layers, n) float32 of the projections side by side, n 0 for none.
        q_norm, k_norm: (layers, n) RMSNorm weights: of each head, or `whole` of all heads at once; n 0 for none.
        norm_last: whether they come after the rotation. eps: of these norms. clip: see `Preparation`.
        q_size, k_size: values of all ranks that whole norms go over; k_first: the rank's first KV head that no rank
            before it has.
        k_start, v_start, gate_start: columns of the projections.
        sinks: (layers, the rank's heads) float32, n 0 for none. windows, ropes: (layers,) int64.
    """

    qkv: SideBySide
    o: tuple
    heads: Heads
    bias: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    whole: int
    norm_last: int
    clip: float
    eps: float
    q_size: int
    k_size: int
    k_first: int
    k_start: int
    v_start: int
    gate_start: int
    sinks: np.ndarray
    windows: np.ndarray
    ropes: np.ndarray


class AttentionScratch(NamedTuple):
    """Buffers: the projections side by side (tokens, n) float32, and the input of o."""

    projected: np.ndarray
    attended: Activations


class Exchange(NamedTuple):
    """What a mixer needs to sum over ranks itself: the link, the part of the step, and (tokens, n) float32 to send."""

    link: np.ndarray
    part: int
    sums: np.ndarray


@inner
def _sum_of_squares(row):
    total = np.float32(0)
    for value in row:
        total += value * value
    return total


@inner
def _normalise_whole(w, layer, projected, tokens, exchange):
    """Replace queries and keys by their RMSNorms over all heads of all ranks. One small all-reduce, in float32."""
    q_norm, k_norm, dim = w.q_norm[layer], w.k_norm[layer], w.heads.dim
    sums = exchange.sums.reshape(-1)
    for t in range(tokens):
        for i in range(w.bias.shape[1]):
            projected[t, i] += w.bias[layer, i]
        for i in range(BLOCK):
            sums[BLOCK * t + i] = 0
        sums[BLOCK * t] = _sum_of_squares(projected[t, : q_norm.size])
        first, last = w.k_start + w.k_first * dim, w.k_start + k_norm.size
        sums[BLOCK * t + 1] = _sum_of_squares(projected[t, first:last])
    source, total = np.zeros(4, np.int64), np.empty(BLOCK, np.float32)
    start_exchange(exchange.link, address(sums), tokens, exchange.part, EXACT, source, Ahead(0, 0))
    finish_exchange(exchange.link, source)
    for t in range(tokens):
        for i in range(BLOCK):
            total[i] = 0
        for k in range(source[1]):
            add_blocks(address(total), source[0] + k * source[2] + t * source[3], 1, source[3])
        q_scale = np.float32(1 / math.sqrt(total[0] / w.q_size + w.eps))
        k_scale = np.float32(1 / math.sqrt(total[1] / w.k_size + w.eps))
        for i in range(q_norm.size):
            projected[t, i] *= q_scale * q_norm[i]
        for i in range(k_norm.size):
            projected[t, w.k_start + i] *= k_scale * k_norm[i]


@inner
def _gate(attended, column, projected, gate_start, n, tokens):
    """Multiply n outputs from a column on by the sigmoids of their gates."""
    whole = n // ROWS * ROWS
    for t in range(tokens):
        out, gates = attended[t, column : column + n], projected[t, gate_start : gate_start + n]
        multiply_by_sigmoids(address(out), address(gates), np.int64(whole))
        for i in range(whole, n):
            out[i] *= np.float32(1) / (np.float32(1) + np.float32(math.exp(-gates[i])))


@inner
def attend(w, layer, x, step, cache, scratch, exchange, out, threads):
    """Write this rank's term of a layer's attention into out (tokens, hidden), and fill the KV cache.

    x: the normalised input. step: see `model.forward.Step`, with the layer's tables. cache: the layer's, see `KVLayer`.
    """
    tokens, projected, attended, heads = out.shape[0], scratch.projected, scratch.attended, w.heads
    call(project, (w.qkv, layer, x, projected, tokens, threads))
    if w.whole != 0:
        call(_normalise_whole, (w, layer, projected, tokens, exchange))
        bias, q_norm, k_norm = w.bias[layer, :0], w.q_norm[layer, :0], w.k_norm[layer, :0]
    else:
        bias, q_norm, k_norm = w.bias[layer], w.q_norm[layer], w.k_norm[layer]
    prepared = Preparation(bias, q_norm, k_norm, w.eps, w.norm_last, w.clip, w.k_start, w.v_start)
    call(rope_and_store, (projected, heads, prepared, step, w.ropes[layer], cache, threads))
    call(attention, (heads, w.windows[layer], w.sinks[layer], projected, cache, step, attended.values, threads))
    if w.gate_start > 0:
        n = (heads.last - heads.first) * heads.dim
        _gate(attended.values, heads.out_start, projected, w.gate_start, n, tokens)
    quantise(attended, tokens, threads)
    call(multiply, (w.o, layer, attended, out, tokens, threads))
