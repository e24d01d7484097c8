"""The gated delta rule (arXiv:2412.06464), as Qwen3-Next and Qwen3.5 have it, token by token.

A value head's state S (key_dim, value_dim) is a memory that maps keys to values. Each token lets it fade, corrects
what it holds for the token's key, and reads it with the token's query:

S *= exp(g);  S += k (outer) beta * (v - k^T S);  o = q^T S

Columns of S depend on one another in nothing, so a work item is 16 of them, which stay in the first cache while the
tokens of a sequence go by; the same code serves prefill and decoding, and a token's result is the same, bit for bit,
however its sequence is cut into steps and whatever else is in them. As an array of float32:

memory  (slots, value_heads, value_dim to 16s / 16, key_dim, 16)

Queries, keys and values pass through a short convolution before, see `kernels.short_conv`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from .compiled import inner
from .layout import ROWS
from .parallel import run_parallel
from .runtime import FASTMATH
from .short_conv import convolve_run, emit_silu
from .simd import F32, I64, EmitterHere, address, constant, vector

_UNROLL = 4  # rows of the state at once, each with sums of its own
_NORM_EPS = np.float32(1e-6)  # of queries and keys


class DeltaNet(NamedTuple):
    """Weights of a layer for this rank's value heads.

    Attributes:
        taps: (taps, columns of q, k and v) float32, the newest input's last, in the projection's columns.
        bias: (columns of q, k and v,) float32, zeros where the model has none.
        rate: (value_heads,) float32, -exp(A_log).
        dt_bias: (value_heads,) float32.
        norm: (value_dim,) float32, of the RMSNorm of a head's output.
        eps: float32, of the same.
    """

    taps: np.ndarray
    bias: np.ndarray
    rate: np.ndarray
    dt_bias: np.ndarray
    norm: np.ndarray
    eps: np.float32


class DeltaNetShape(NamedTuple):
    """Sizes, and where parts begin in the projection's columns; q begins at 0, all begin at multiples of 16.

    Attributes:
        key_dim, value_dim: of a head.
        group: value heads a key head.
        first_head: this rank's first value head in the whole model; its first key head is that divided by `group`.
        k, v, z, b, a: the columns where parts begin.
    """

    key_dim: int
    value_dim: int
    group: int
    first_head: int
    k: int
    v: int
    z: int
    b: int
    a: int


class DeltaNetState(NamedTuple):
    """State of a layer; which it is of each slot, see `kernels.short_conv` and the module.

    Attributes:
        conv: (slots, taps - 1, columns of q, k and v) float32.
        memory: (slots, value_heads, value_dim to 16s / 16, key_dim, 16) float32.
    """

    conv: np.ndarray
    memory: np.ndarray


def _emit_rows(e, count, state, body):
    """Emit body(first row, offset, number in the unrolled loop, state) -> state for `count` rows."""
    b = e.b

    def several(i, state):
        for j in range(_UNROLL):
            state = body(b.mul(i, I64(_UNROLL)), j, state)
        return state

    whole = b.sdiv(count, I64(_UNROLL))
    state = e.counted_loop(whole, state, several)
    begin = b.mul(whole, I64(_UNROLL))
    return e.counted_loop(b.sub(count, begin), state, lambda i, state: body(b.add(begin, i), 0, state))


@intrinsic
def _token(typingctx, memory, key_dim, k, q, v, out, decay, k_scale, q_scale, beta):
    """Take one token into 16 columns of a state (key_dim, 16) and write their output; see the module.

    The first six arguments but key_dim are addresses. k_scale, q_scale: what k and q are to be multiplied with.
    """

    def codegen(context, builder, signature, args):
        e, b, ty = EmitterHere(builder), builder, vector(F32, ROWS)
        memory, key_dim, k, q, v, out = args[:6]
        decay, k_scale, q_scale, beta = (e.splat(value, ROWS) for value in args[6:])
        nothing = [constant(F32, ROWS, 0.0)] * _UNROLL

        def row(base, index, step):
            return b.add(base, b.mul(index, I64(step)))

        def replaced(sums, j, value):
            return [*sums[:j], value, *sums[j + 1 :]]

        def total(sums):
            return b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))

        def element(base, i, j):
            return e.splat(e.load(b.add(row(base, i, 4), I64(4 * j)), F32, 4), ROWS)

        def recall(i, j, sums):
            s = e.load(b.add(row(memory, i, 4 * ROWS), I64(4 * ROWS * j)), ty, 4)
            return replaced(sums, j, e.fma(element(k, i, j), s, sums[j]))

        held = b.fmul(total(_emit_rows(e, key_dim, nothing, recall)), b.fmul(decay, k_scale))
        change = b.fmul(b.fmul(beta, k_scale), b.fsub(e.load(v, ty, 4), held))

        following = b.sub(b.mul(key_dim, I64(4 * ROWS)), I64(e.ahead))  # the next 16 columns, which come next

        def update(i, j, sums):
            at = b.add(row(memory, i, 4 * ROWS), I64(4 * ROWS * j))
            e.prefetch(b.add(at, following), 4 * ROWS)
            s = e.fma(element(k, i, j), change, b.fmul(e.load(at, ty, 4), decay))
            e.store(s, at, 4)
            return replaced(sums, j, e.fma(element(q, i, j), s, sums[j]))

        e.store(b.fmul(total(_emit_rows(e, key_dim, nothing, update)), q_scale), out, 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, *[types.float32] * 4), codegen


@intrinsic
def _silu(typingctx, at):
    """Replace 16 floats at an address by their SiLU."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)
        e.store(emit_silu(e, e.load(args[0], vector(F32, ROWS), 4)), args[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@inner
def _prepare(weights, shape, projected, state, runs, thread, threads):
    """Do one thread's columns of the convolution and of the gate's SiLU, in place."""
    taps = weights.taps
    blocks, gates = shape.z // ROWS, (shape.b - shape.z) // ROWS
    first, last = ROWS * (blocks * thread // threads), ROWS * (blocks * (thread + 1) // threads)
    head = np.empty((2 * taps.shape[0] - 2, taps.shape[1]), np.float32)
    for run in range(runs.slots.size):
        x = projected[runs.begins[run] : runs.begins[run + 1]]
        convolve_run(
            x[:, : shape.z], taps, weights.bias, True, state.conv[runs.slots[run]], runs.starts[run], first, last, head
        )
        for t in range(x.shape[0]):
            gate = address(x[t]) + 4 * shape.z
            for block in range(gates * thread // threads, gates * (thread + 1) // threads):
                _silu(gate + 4 * ROWS * block)


@inner(fastmath=FASTMATH)
def _inverse_norm(x):
    square = np.float32(0)
    for i in range(x.size):
        square += x[i] * x[i]
    return np.float32(1) / np.float32(math.sqrt(square + _NORM_EPS))


@inner
def _factors(weights, shape, x, head, key, factors):
    """Write decay, scales of k and q, and beta of a run's tokens x for a value head into factors (tokens, 4)."""
    width, one = shape.key_dim, np.float32(1)
    scale = one / np.float32(math.sqrt(np.float32(width)))
    for t in range(x.shape[0]):
        a = x[t, shape.a + head] + weights.dt_bias[head]
        softplus = a if a > np.float32(20) else math.log1p(math.exp(a))
        factors[t, 0] = math.exp(weights.rate[head] * softplus)
        factors[t, 1] = _inverse_norm(x[t, shape.k + key * width : shape.k + (key + 1) * width])
        factors[t, 2] = _inverse_norm(x[t, key * width : (key + 1) * width]) * scale
        factors[t, 3] = one / (one + math.exp(-x[t, shape.b + head]))


@inner
def _recur(shape, x, head, key, block, memory, factors, out, column):
    """Pass a run's tokens x through 16 columns of a value head's state; output goes to out from `column` on."""
    width = min(ROWS, shape.value_dim - ROWS * block)
    v_at, out_at = 4 * (shape.v + head * shape.value_dim + ROWS * block), 4 * (column + ROWS * block)
    values = np.zeros(2 * ROWS, np.float32)  # columns that a narrow block has not
    for t in range(x.shape[0]):
        row = address(x[t])
        v, o = row + v_at, address(out[t]) + out_at
        if width < ROWS:
            for c in range(width):
                values[c] = x[t, v_at // 4 + c]
            v, o = address(values), address(values) + 4 * ROWS
        _token(
            address(memory),
            shape.key_dim,
            row + 4 * (shape.k + key * shape.key_dim),
            row + 4 * key * shape.key_dim,
            v,
            o,
            factors[t, 0],
            factors[t, 1],
            factors[t, 2],
            factors[t, 3],
        )
        if width < ROWS:
            for c in range(width):
                out[t, out_at // 4 + c] = values[ROWS + c]


@inner(fastmath=FASTMATH)
def _gate(weights, shape, x, head, out, column):
    """Normalise a value head's output and multiply it with the gate, for a run's tokens."""
    width = shape.value_dim
    for t in range(x.shape[0]):
        square = np.float32(0)
        for i in range(width):
            square += out[t, column + i] * out[t, column + i]
        scale = np.float32(1) / np.float32(math.sqrt(square / np.float32(width) + weights.eps))
        for i in range(width):
            out[t, column + i] *= scale * weights.norm[i] * x[t, shape.z + head * width + i]


@inner
def _take(weights, shape, projected, state, runs, out, out_start, thread, threads):
    """Do one thread's blocks of columns of all runs, and the gates of heads that are wholly its own."""
    blocks, memory = state.memory.shape[2], state.memory
    items = weights.rate.size * blocks
    first, last = items * thread // threads, items * (thread + 1) // threads
    factors = np.empty((projected.shape[0], 4), np.float32)
    for run in range(runs.slots.size):
        begin, end, slot = runs.begins[run], runs.begins[run + 1], runs.slots[run]
        x, y = projected[begin:end], out[begin:end]
        for item in range(first, last):
            head, block = item // blocks, item % blocks
            key = (shape.first_head + head) // shape.group - shape.first_head // shape.group
            column = out_start + head * shape.value_dim
            if item == first or block == 0:
                _factors(weights, shape, x, head, key, factors)
            if runs.starts[run] == 0:
                memory[slot, head, block] = 0
            _recur(shape, x, head, key, block, memory[slot, head, block], factors, y, column)
            if block == blocks - 1 and head * blocks >= first:
                _gate(weights, shape, x, head, y, column)


@inner
def delta_net_mix(weights, shape, projected, state, runs, out, out_start, threads):
    """Write the gated delta rule's output, normalised and gated, for each token and value head, and update the state.

    weights: `DeltaNet`; shape: `DeltaNetShape`; state: `DeltaNetState`; runs: `short_conv.Runs` of these tokens.
    projected: (tokens, n) float32, contiguous, the parts q, k, v, z, b and a, overwritten. out: (tokens, >= out_start
    + value_heads * value_dim) float32, written from column out_start on. The rank's value heads are independent of
    all others: no communication.

    transformers, models/qwen3_next/modeling_qwen3_next.py: torch_recurrent_gated_delta_rule, Qwen3NextRMSNormGated.
    """
    tokens, blocks = projected.shape[0], state.memory.shape[2]
    run_parallel(_prepare, (weights, shape, projected, state, runs), np.int64(1) if tokens == 1 else threads)
    run_parallel(_take, (weights, shape, projected, state, runs, out, out_start), threads)
    items, done = weights.rate.size * blocks, -1
    for thread in range(1, threads):  # heads that were cut between threads
        cut = items * thread // threads
        head = cut // blocks
        if cut % blocks > 0 and head != done:
            _gate(weights, shape, projected, head, out, out_start + head * shape.value_dim)
            done = head
