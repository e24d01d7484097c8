"""Causal depthwise convolutions of a few taps, whose last inputs are a sequence's state (LFM2, Qwen3-Next).

State of a layer: (slots, taps - 1, columns) float32, a slot's last inputs, the oldest first. The tokens of a slot
stand together and in order; a sequence that begins at position 0 begins with zeros, so that a slot needs no clearing.
A token's result is the same, bit for bit, however its sequence is cut into steps and whatever else is in them.

Columns go in blocks of 16: every part of a projection is padded to these, with columns and taps of zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from .compiled import inner
from .layout import ROWS
from .parallel import run_parallel
from .simd import F32, I64, EmitterHere, address, constant, vector


class Runs(NamedTuple):
    """Where the tokens of each sequence stand in a step.

    Attributes:
        begins: (runs + 1,) int64, the first token of each run, and the number of tokens.
        slots: (runs,) int64.
        starts: (runs,) int64, positions of the first tokens.
    """

    begins: np.ndarray
    slots: np.ndarray
    starts: np.ndarray


class ShortConv(NamedTuple):
    """Weights of LFM2's gated short convolution.

    Attributes:
        in_bias: (3 * width,) float32, of the projection, or empty.
        taps: (taps, width) float32, the newest input's last.
        bias: (width,) float32, zeros where the model has none.
    """

    in_bias: np.ndarray
    taps: np.ndarray
    bias: np.ndarray


@inner
def find_runs(slots, positions):
    """Return the runs of consecutive positions of one slot among tokens with these slots and positions (tokens,)."""
    count, n = 0, slots.size
    begins, run_slots, starts = np.empty(n + 1, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    for i in range(n):
        if i == 0 or slots[i] != slots[i - 1] or positions[i] != positions[i - 1] + 1:
            begins[count], run_slots[count], starts[count] = i, slots[i], positions[i]
            count += 1
    begins[count] = n
    return Runs(begins[: count + 1], run_slots[:count], starts[:count])


def emit_silu(e, x):
    """Emit x * sigmoid(x) for a vector of 16 float32."""
    minus = e.b.fsub(constant(F32, ROWS, -0.0), x)
    return e.b.fdiv(x, e.b.fadd(constant(F32, ROWS, 1.0), e.exp(minus)))


def _convolution(silu):
    """Return an intrinsic that writes 16 columns' sum of bias and taps * inputs, or SiLU of it.

    Its arguments are addresses of 16 float32, `stride` and `taps_stride` bytes from one of `count` rows to the next.
    """

    @intrinsic
    def convolution(typingctx, x, stride, taps, taps_stride, count, bias, out):
        def codegen(context, builder, signature, args):
            e, b, ty = EmitterHere(builder), builder, vector(F32, ROWS)
            x, stride, taps, taps_stride, count, bias, out = args

            def body(i, state):
                row = e.load(b.add(x, b.mul(i, stride)), ty, 4)
                tap = e.load(b.add(taps, b.mul(i, taps_stride)), ty, 4)
                return [e.fma(row, tap, state[0])]

            (result,) = e.counted_loop(count, [e.load(bias, ty, 4)], body)
            e.store(emit_silu(e, result) if silu else result, out, 4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return convolution


_convolve = _convolution(silu=False)
_convolve_silu = _convolution(silu=True)


@intrinsic
def _multiply(typingctx, x, y, out):
    """Write the products of 16 floats each at two addresses."""

    def codegen(context, builder, signature, args):
        e, (x, y, out) = EmitterHere(builder), args
        ty = vector(F32, ROWS)
        e.store(builder.fmul(e.load(x, ty, 4), e.load(y, ty, 4)), out, 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _copy(typingctx, source, target, first, last):
    """Copy the columns [first, last), multiples of 16, of one row of float32 to another; both addresses."""

    def codegen(context, builder, signature, args):
        e, b, (source, target, first, last) = EmitterHere(builder), builder, args

        def body(i, state):
            at = b.mul(b.add(first, b.mul(i, I64(ROWS))), I64(4))
            e.store(e.load(b.add(source, at), vector(F32, ROWS), 4), b.add(target, at), 4)
            return state

        e.counted_loop(b.sdiv(b.sub(last, first), I64(ROWS)), [], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@inner
def _blocks(x, stride, taps, bias, silu, out, first, last):
    """Convolve the columns [first, last) of one token, whose oldest input's row begins at address x."""
    taps_at, bias_at, count, row = address(taps), address(bias), taps.shape[0], 4 * taps.shape[1]
    for at in range(4 * first, 4 * last, 4 * ROWS):
        if silu:
            _convolve_silu(x + at, stride, taps_at + at, row, count, bias_at + at, out + at)
        else:
            _convolve(x + at, stride, taps_at + at, row, count, bias_at + at, out + at)


@inner
def convolve_run(x, taps, bias, silu, state, start, first, last, head):
    """Convolve the columns [first, last) of one run's tokens in place, and bring its state to its end.

    x: (tokens, >= columns) float32, rows contiguous; taps (taps, columns), bias (columns,); silu: whether it follows;
    state: (taps - 1, columns); start: position of the first token. first, last: multiples of 16. head: scratch
    (2 * taps - 2, columns).
    """
    past, tokens = taps.shape[0] - 1, x.shape[0]
    row, stride, width = address(x), x.strides[0], 4 * taps.shape[1]
    kept, here = address(state), address(head)
    if start == 0:
        head[:past] = 0
    else:
        for i in range(past):
            _copy(kept + i * width, here + i * width, first, last)
    near = min(past, tokens)
    for i in range(near):
        _copy(row + i * stride, here + (past + i) * width, first, last)
    for i in range(past):
        t = tokens - past + i
        _copy(row + t * stride if t >= 0 else here + (past + t) * width, kept + i * width, first, last)
    # Backwards, so that what stands before a token is still input.
    for t in range(tokens - 1, past - 1, -1):
        _blocks(row + (t - past) * stride, stride, taps, bias, silu, row + t * stride, first, last)
    for t in range(near):
        _blocks(here + t * width, width, taps, bias, silu, row + t * stride, first, last)


@inner
def _take(weights, projected, states, runs, out, out_start, thread, threads):
    """Do one thread's part of the columns; see `short_conv_mix`."""
    taps, bias, in_bias = weights.taps, weights.bias, weights.in_bias
    width = taps.shape[1]
    blocks = width // ROWS
    first, last = ROWS * (blocks * thread // threads), ROWS * (blocks * (thread + 1) // threads)
    head = np.empty((2 * taps.shape[0] - 2, width), np.float32)
    for run in range(runs.slots.size):
        x = projected[runs.begins[run] : runs.begins[run + 1]]
        for t in range(x.shape[0]):
            if in_bias.size > 0:
                for part in range(0, 3 * width, width):
                    for c in range(part + first, part + last):
                        x[t, c] += in_bias[c]
            row = address(x[t])
            for at in range(row + 4 * first, row + 4 * last, 4 * ROWS):
                _multiply(at, at + 8 * width, at + 8 * width)
        convolve_run(x[:, 2 * width :], taps, bias, False, states[runs.slots[run]], runs.starts[run], first, last, head)
        for t in range(x.shape[0]):
            row, to = address(x[t]) + 4 * width, address(out[runs.begins[run] + t]) + 4 * out_start
            for at in range(4 * first, 4 * last, 4 * ROWS):
                _multiply(row + at, row + 4 * width + at, to + at)


@inner
def short_conv_mix(weights, projected, states, runs, out, out_start, threads):
    """Write C * conv(B * x) into out, where B, C and x stand side by side in a projection, and update the states.

    weights: `ShortConv`, for this rank's channels padded to `width`, a multiple of 16. projected: (tokens,
    >= 3 * width) float32, contiguous, overwritten. states: (slots, taps - 1, width) float32, see the module; runs: of
    these tokens. out: (tokens, >= out_start + width) float32, written from out_start, a multiple of 16, on.

    The gated short convolution of LFM2 (transformers, models/lfm2/modeling_lfm2.py).
    """
    run_parallel(
        _take,
        (weights, projected, states, runs, out, out_start),
        np.int64(1) if runs.begins[runs.slots.size] == 1 else threads,
    )
