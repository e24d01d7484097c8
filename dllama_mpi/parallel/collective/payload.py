"""The bytes in which activations travel between ranks, 32 values at a time, and their sums.

f32  128 bytes: 32 float32.   f16  64 bytes: 32 float16.   q80  34 bytes: a float16 scale and 32 int8 codes.
q40  18 bytes: a float16 scale and 32 codes of 4 bits, the first 16 in the lower halves of the bytes, less 8, of the
values' Walsh-Hadamard transform, which spreads what is much larger than the rest over all of them (arXiv:2404.00456).

What a payload leaves out of its values can be kept, and added to the next values that are sent: error feedback
(arXiv:1901.09847). As all of them are added to the same residual, its errors then do not pile up.

Sums are fused multiply-adds in the order of the ranks, so that unlike machines get the same bits from the same bytes.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...kernels.compiled import entry, inner
from ...kernels.layout import BLOCK, ROWS
from ...kernels.simd import (
    F16,
    F32,
    I8,
    I32,
    I64,
    EmitterHere,
    address,
    constant,
    vector,
)
from .table import PAYLOADS

Q40_BYTES, Q80_BYTES, F16_BYTES, F32_BYTES = (PAYLOADS[name] for name in ("q40", "q80", "f16", "f32"))
_LARGEST_HALF = F32(65504.0)  # of float16; what is beyond is sent as that
_FLOATS = vector(F32, ROWS)
_HALVES = range(BLOCK // ROWS)  # of a block, in vectors of 16


def _elements(width: int) -> tuple:
    """Return the type of a payload's values, their bytes, and where they begin in a block."""
    return {Q80_BYTES: (I8, 1, 2), F16_BYTES: (F16, 2, 0), F32_BYTES: (F32, 4, 0)}[width]


def _floats(e, address):
    """Return 32 float32 at an address, as two vectors."""
    return [e.load(e.b.add(address, I64(4 * ROWS * half)), _FLOATS, 4) for half in _HALVES]


def _store(e, values, address):
    """Write two vectors to an address."""
    for half, value in enumerate(values):
        size = value.type.count * {F32: 4, F16: 2, I8: 1}[value.type.element]
        e.store(value, e.b.add(address, I64(half * size)), 1)


def _rotated(e, values):
    """Return the Walsh-Hadamard transform of 32 values, times the root of 32."""
    low, high = values
    values = [e.b.fadd(low, high), e.b.fsub(low, high)]
    for distance in (8, 4, 2, 1):
        signs = ir.Constant(_FLOATS, [-1.0 if lane & distance else 1.0 for lane in range(ROWS)])
        order = [lane ^ distance for lane in range(ROWS)]
        values = [e.fma(value, signs, e.pick(value, order)) for value in values]
    return values


def _stored(e, payload, width):
    """Return what a payload holds: two vectors, and the scale that they still need, or None."""
    b = e.b
    if width == Q40_BYTES:
        scale = b.fmul(b.fpext(e.load(payload, F16, 1), F32), F32(1 / math.sqrt(BLOCK)))
        both = e.load(b.add(payload, I64(2)), vector(I8, ROWS), 1)
        nibbles = b.and_(both, constant(I8, ROWS, 15)), b.lshr(both, constant(I8, ROWS, 4))
        codes = [b.sitofp(b.sub(each, constant(I8, ROWS, 8)), _FLOATS) for each in nibbles]
        return _rotated(e, [b.fmul(code, e.splat(scale, ROWS)) for code in codes]), None
    element, size, start = _elements(width)
    found = [e.load(b.add(payload, I64(start + h * ROWS * size)), vector(element, ROWS), 1) for h in _HALVES]
    if element == I8:
        return [b.sitofp(code, _FLOATS) for code in found], e.splat(b.fpext(e.load(payload, F16, 1), F32), ROWS)
    return [b.fpext(value, _FLOATS) if element == F16 else value for value in found], None


def _adder(width: int):
    """Return an intrinsic that adds 32 values of a payload to 32 float32; both by their addresses."""

    @intrinsic
    def add(typingctx, total, payload):
        def codegen(context, builder, signature, args):
            e = EmitterHere(builder)
            values, scale = _stored(e, args[1], width)
            before = _floats(e, args[0])
            if scale is not None:
                after = [e.fma(value, scale, old) for value, old in zip(values, before, strict=True)]
            else:
                after = [builder.fadd(old, value) for value, old in zip(values, before, strict=True)]
            _store(e, after, args[0])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return add


def _rest_of(width: int):
    """Return an intrinsic that writes what a payload leaves out of 32 float32; all by their addresses."""

    @intrinsic
    def rest(typingctx, values, payload, out):
        def codegen(context, builder, signature, args):
            e = EmitterHere(builder)
            stored, scale = _stored(e, args[1], width)
            if scale is not None:
                stored = [builder.fmul(value, scale) for value in stored]
            pairs = zip(_floats(e, args[0]), stored, strict=True)
            _store(e, [builder.fsub(value, sent) for value, sent in pairs], args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return rest


def _encoder(width: int):
    """Return an intrinsic that writes 32 float32 values as a payload; both by their addresses."""

    @intrinsic
    def encode_block(typingctx, values, payload):
        def codegen(context, builder, signature, args):
            e, found = EmitterHere(builder), _floats(EmitterHere(builder), args[0])
            if width == Q40_BYTES:
                _write_nibbles(e, found, args[1])
            elif width == Q80_BYTES:
                _write_bytes(e, found, args[1])
            elif width == F16_BYTES:
                _store(e, [builder.fptrunc(_within(e, value, 65504.0), vector(F16, ROWS)) for value in found], args[1])
            else:
                _store(e, found, args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return encode_block


def _write_bytes(e, values, payload):
    """Write a scale and int8: the largest in size becomes 127, halves go to the even code."""
    b = e.b
    sizes = [e.call(f"llvm.fabs.v{ROWS}f32", _FLOATS, value) for value in values]
    largest = _extreme(e, "max", sizes)
    scale = b.fdiv(largest, F32(127.0))
    inverse = _write_scale(e, b.select(b.fcmp_ordered("<", scale, _LARGEST_HALF), scale, _LARGEST_HALF), payload)
    codes = [e.call(f"llvm.rint.v{ROWS}f32", _FLOATS, b.fmul(value, inverse)) for value in values]
    codes = [b.fptosi(_within(e, code, 127.0), vector(I32, ROWS)) for code in codes]
    _store(e, [b.trunc(code, vector(I8, ROWS)) for code in codes], b.add(payload, I64(2)))


def _write_nibbles(e, values, payload):
    """Write a scale and nibbles: the largest of the transformed in size becomes -8, halves go to the even code."""
    b = e.b
    values = [b.fmul(value, constant(F32, ROWS, 1 / math.sqrt(BLOCK))) for value in _rotated(e, values)]
    most, least = _extreme(e, "max", values), _extreme(e, "min", values)
    largest = b.select(b.fcmp_ordered(">", b.fneg(least), most), least, most)
    scale = b.fmul(largest, F32(-0.125))
    for limit, comparison in ((_LARGEST_HALF, "<"), (F32(-65504.0), ">")):
        scale = b.select(b.fcmp_ordered(comparison, scale, limit), scale, limit)
    inverse, codes = _write_scale(e, scale, payload), []
    for value in values:
        code = e.call(f"llvm.rint.v{ROWS}f32", _FLOATS, b.fmul(value, inverse))
        code = b.fadd(_within(e, code, 8.0), constant(F32, ROWS, 8.0))
        code = e.call(f"llvm.minnum.v{ROWS}f32", _FLOATS, code, constant(F32, ROWS, 15.0))
        codes.append(b.trunc(b.fptosi(code, vector(I32, ROWS)), vector(I8, ROWS)))
    both = b.or_(codes[0], b.shl(codes[1], constant(I8, ROWS, 4)))
    e.store(both, b.add(payload, I64(2)), 1)


def _extreme(e, which, values):
    """Return the largest (max) or smallest (min) of two vectors' values."""
    most = e.call(f"llvm.{which}num.v{ROWS}f32", _FLOATS, *values)
    return e.call(f"llvm.vector.reduce.f{which}.v{ROWS}f32", F32, most)


def _write_scale(e, scale, payload):
    """Write a float16 scale; return its inverse, as it was rounded, in all lanes; 0 for 0."""
    b = e.b
    scale = b.fptrunc(scale, F16)
    e.store(scale, payload, 1)
    scale = b.fpext(scale, F32)
    some = b.fcmp_ordered("!=", scale, F32(0.0))
    return e.splat(b.select(some, b.fdiv(F32(1.0), scale), F32(0.0)), ROWS)


def _within(e, values, limit):
    """Return float32 values bounded by a limit in size."""
    for name, bound in (("minnum", limit), ("maxnum", -limit)):
        values = e.call(f"llvm.{name}.v{ROWS}f32", values.type, values, constant(F32, ROWS, bound))
    return values


@intrinsic
def _clear(typingctx, values):
    """Write 32 float32 zeros at an address."""

    def codegen(context, builder, signature, args):
        e = EmitterHere(builder)
        for half in (0, 1):
            e.store(constant(F32, ROWS, 0.0), builder.add(args[0], I64(4 * ROWS * half)), 4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


_WIDTHS = (Q40_BYTES, Q80_BYTES, F16_BYTES, F32_BYTES)
_add_q40, _add_q80, _add_f16, _add_f32 = (_adder(width) for width in _WIDTHS)
_rest_q40, _rest_q80 = _rest_of(Q40_BYTES), _rest_of(Q80_BYTES)
_encode_q40, _encode_q80, _encode_f16, _encode_f32 = (_encoder(width) for width in _WIDTHS)


@inner
def add_blocks(total, payload, blocks, width):
    """Add a payload of so many blocks to float32 values; both by their addresses."""
    for b in range(blocks):
        at = total + b * 4 * BLOCK
        if width == Q80_BYTES:
            _add_q80(at, payload + b * Q80_BYTES)
        elif width == F16_BYTES:
            _add_f16(at, payload + b * F16_BYTES)
        elif width == Q40_BYTES:
            _add_q40(at, payload + b * Q40_BYTES)
        else:
            _add_f32(at, payload + b * F32_BYTES)


@inner
def encode_blocks(values, payload, blocks, width):
    """Write so many blocks of float32 values as a payload; both by their addresses."""
    for b in range(blocks):
        at = values + b * 4 * BLOCK
        if width == Q80_BYTES:
            _encode_q80(at, payload + b * Q80_BYTES)
        elif width == F16_BYTES:
            _encode_f16(at, payload + b * F16_BYTES)
        elif width == Q40_BYTES:
            _encode_q40(at, payload + b * Q40_BYTES)
        else:
            _encode_f32(at, payload + b * F32_BYTES)


@inner
def rest_of_blocks(values, payload, rest, blocks, width):
    """Write what a payload, q80 or q40, leaves out of so many blocks of values; all by their addresses."""
    for b in range(blocks):
        at = b * 4 * BLOCK
        if width == Q80_BYTES:
            _rest_q80(values + at, payload + b * Q80_BYTES, rest + at)
        else:
            _rest_q40(values + at, payload + b * Q40_BYTES, rest + at)


@inner
def encode_with_rest(values, payload, rest, blocks, width):
    """Add to so many blocks of values what was left out before, write them as a payload, and keep its rest.

    rest: address of float32 values like them, or 0 to do nothing but write.
    """
    if rest != 0:
        add_blocks(values, rest, blocks, F32_BYTES)
    encode_blocks(values, payload, blocks, width)
    if rest != 0:
        rest_of_blocks(values, payload, rest, blocks, width)


@inner
def sum_blocks(total, payloads, count, stride, blocks, width):
    """Write the sum of `count` payloads, `stride` bytes apart, in that order, as float32 values."""
    for b in range(blocks):
        _clear(total + b * 4 * BLOCK)
    for k in range(count):
        add_blocks(total, payloads + k * stride, blocks, width)


@entry
def encode(x, payload):
    """Write float32 values x (blocks, 32) as a payload (blocks, bytes) uint8."""
    encode_blocks(address(x), address(payload), x.shape[0], payload.shape[1])


@entry
def encode_keeping(x, payload, rest):
    """Do the same with x + rest, both (blocks, 32) float32; x becomes that, rest what is left out of it."""
    encode_with_rest(address(x), address(payload), address(rest), x.shape[0], payload.shape[1])


@entry
def decode_sum(payloads, x):
    """Write the sum over ranks of payloads (ranks, blocks, bytes), in rank order, into x (blocks, 32) float32."""
    size = payloads.shape[1] * payloads.shape[2]
    sum_blocks(address(x), address(payloads), payloads.shape[0], size, x.shape[0], payloads.shape[2])
