"""Activation functions of gated feed-forward layers, and the soft cap of scores, as vector code.

The class of an activation chooses its code at compile time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from .emitter import single
from .layout import ROWS
from .simd import F32, I64, EmitterHere, constant, vector


class Silu(NamedTuple):
    """gate * sigmoid(gate) * up (SwiGLU, arXiv:2002.05202)."""

    limit: float = 0.0
    alpha: float = 1.0


class GeluTanh(NamedTuple):
    """GELU by its tanh approximation (arXiv:1606.08415) of the gate, times up."""

    limit: float = 0.0
    alpha: float = 1.0


class ClampedSwiGLU(NamedTuple):
    """g * sigmoid(alpha * g) * (u + 1) with g = min(gate, limit), u = up within +-limit (gpt-oss)."""

    limit: float = 7.0
    alpha: float = 1.702


ACTIVATIONS = {"silu": Silu, "gelu_tanh": GeluTanh, "clamped_swiglu": ClampedSwiGLU}


def _sigmoid(e, x):
    """Emit 1 / (1 + e**-x)."""
    one = constant(F32, ROWS, 1.0)
    return e.b.fdiv(one, e.b.fadd(one, e.exp(e.b.fsub(constant(F32, ROWS, -0.0), x))))


def _silu(e, gate, up, limit, alpha):
    one = constant(F32, ROWS, 1.0)
    minus = e.b.fsub(constant(F32, ROWS, -0.0), gate)
    return e.b.fmul(e.b.fdiv(gate, e.b.fadd(one, e.exp(minus))), up)


def _gelu_tanh(e, gate, up, limit, alpha):
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u; u = sqrt(2 / pi) * (x + 0.044715 x**3).
    cube = e.b.fmul(e.b.fmul(gate, gate), gate)
    inner = e.fma(cube, constant(F32, ROWS, single(0.044715)), gate)
    twice = e.b.fmul(inner, constant(F32, ROWS, single(math.sqrt(8 / math.pi))))
    return e.b.fmul(e.b.fmul(gate, _sigmoid(e, twice)), up)


def _clamped_swiglu(e, gate, up, limit, alpha):
    high = e.splat(limit, ROWS)
    low = e.b.fsub(constant(F32, ROWS, -0.0), high)
    gate = e.b.select(e.b.fcmp_ordered(">", gate, high), high, gate)
    up = e.b.select(e.b.fcmp_ordered(">", up, high), high, up)
    up = e.b.select(e.b.fcmp_ordered("<", up, low), low, up)
    sigmoid = _sigmoid(e, e.b.fmul(gate, e.splat(alpha, ROWS)))
    return e.b.fmul(e.b.fmul(gate, sigmoid), e.b.fadd(up, constant(F32, ROWS, 1.0)))


def _in_place(operation):
    """Return an intrinsic that replaces 32 floats at `gate` by operation(gate, up); both addresses."""

    @intrinsic
    def activated(typingctx, gate, up, limit, alpha):
        def codegen(context, builder, signature, args):
            e = EmitterHere(builder)
            for half in range(2):
                where, other = (builder.add(at, I64(64 * half)) for at in args[:2])
                x, y = e.load(where, vector(F32, ROWS), 4), e.load(other, vector(F32, ROWS), 4)
                e.store(operation(e, x, y, *args[2:]), where, 4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.float32), codegen

    return activated


_CODE = {Silu: _in_place(_silu), GeluTanh: _in_place(_gelu_tanh), ClampedSwiGLU: _in_place(_clamped_swiglu)}


def activate(activation, gate, up):
    """Replace 32 floats at address `gate` by what the activation makes of them and of 32 floats at address `up`."""
    raise NotImplementedError  # compiled code only


@overload(activate)
def _activate(activation, gate, up):
    code = _CODE[activation.instance_class]

    def activated(activation, gate, up):
        code(gate, up, np.float32(activation.limit), np.float32(activation.alpha))

    return activated


@intrinsic
def soft_cap(typingctx, at, n, cap):
    """Replace n floats at an address, a multiple of 16, by cap * tanh(x / cap)."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)
        b, (where, n, cap) = builder, args
        factor, caps = e.splat(b.fdiv(F32(2.0), cap), ROWS), e.splat(cap, ROWS)
        one, two = constant(F32, ROWS, 1.0), constant(F32, ROWS, 2.0)

        def body(i, state):
            here = b.add(where, b.mul(i, I64(4 * ROWS)))
            grown = e.exp(b.fmul(e.load(here, vector(F32, ROWS), 4), factor))
            tanh = b.fsub(one, b.fdiv(two, b.fadd(grown, one)))
            e.store(b.fmul(caps, tanh), here, 4)
            return state

        e.counted_loop(b.sdiv(n, I64(ROWS)), [], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def sigmoids(typingctx, at, n):
    """Replace n floats at an address, a multiple of 16, by their sigmoid; the same bits on every processor."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)

        def body(i, state):
            here = builder.add(args[0], builder.mul(i, I64(4 * ROWS)))
            e.store(_sigmoid(e, e.load(here, vector(F32, ROWS), 4)), here, 4)
            return state

        e.counted_loop(builder.sdiv(args[1], I64(ROWS)), [], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def multiply_by_sigmoids(typingctx, at, gates, n):
    """Replace n floats at an address, a multiple of 16, by x * sigmoid(gate) of as many gates at another."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)

        def body(i, state):
            offset = builder.mul(i, I64(4 * ROWS))
            here = builder.add(args[0], offset)
            gate = e.load(builder.add(args[1], offset), vector(F32, ROWS), 4)
            e.store(builder.fmul(e.load(here, vector(F32, ROWS), 4), _sigmoid(e, gate)), here, 4)
            return state

        e.counted_loop(builder.sdiv(args[2], I64(ROWS)), [], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
