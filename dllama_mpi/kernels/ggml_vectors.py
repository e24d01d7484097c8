"""What the reading of GGUF's blocks is written in: 16 columns of a row as a vector, four codes as a word."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .emitter import F16, F32, I8, I32, I64, constant, vector
from .layout import BLOCK, ROWS
from .simd import EmitterHere

_BYTES, _WORDS, _FLOATS = vector(I8, 16), vector(I32, 16), vector(F32, 16)


@intrinsic
def word_at(typingctx, address):
    """Return the four bytes at an address as uint32, the first one lowest."""

    def codegen(context, builder, signature, args):
        return EmitterHere(builder).load(args[0], I32, 1)

    return types.uint32(types.int64), codegen


@intrinsic
def put_word(typingctx, word, address):
    """Store four bytes."""

    def codegen(context, builder, signature, args):
        EmitterHere(builder).store(args[0], args[1], 1)
        return context.get_dummy_value()

    return types.void(types.uint32, types.int64), codegen


@intrinsic
def join_nibbles(typingctx, source, shift, target):
    """Store the nibbles `shift` bits up in 32 bytes, byte k's with byte 16 + k's above it, as words 64 bytes apart."""

    def codegen(context, builder, signature, args):
        e, b = EmitterHere(builder), builder
        source, shift, target = args
        low, high = (_bits(e, b.add(source, I64(at)), shift, I64(15)) for at in (0, 16))
        joined = b.or_(low, b.shl(high, e.splat(I8(4), 16)))
        words = b.bitcast(joined, vector(I32, 4))
        for j in range(4):
            e.store(b.extract_element(words, I32(j)), b.add(target, I64(64 * j)), 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _bits(e, place, shift, mask):
    """Return 16 bytes at an address, shifted to the right and masked."""
    b = e.b
    shifted = b.lshr(e.load(place, _BYTES, 1), e.splat(b.trunc(shift, I8), 16))
    return b.and_(shifted, e.splat(b.trunc(mask, I8), 16))


@intrinsic
def write_codes(typingctx, out, low, high, offset, step, minimum):
    """Write step * (code - offset) - minimum of 16 columns as float32 to an address.

    low, high: (address of 16 bytes, how far they are shifted to the right, mask); a code is low + high, the latter
    shifted back to the left by a fourth number.
    """

    def codegen(context, builder, signature, args):
        e, b = EmitterHere(builder), builder
        out, low, high, offset, step, minimum = args
        place, shift, mask = (b.extract_value(low, i) for i in range(3))
        codes = _bits(e, place, shift, mask)
        place, shift, mask, back = (b.extract_value(high, i) for i in range(4))
        above = b.shl(_bits(e, place, shift, mask), e.splat(b.trunc(back, I8), 16))
        whole = b.sub(b.zext(b.or_(codes, above), _WORDS), e.splat(b.trunc(offset, I32), 16))
        values = b.fmul(e.splat(step, 16), b.sitofp(whole, _FLOATS))
        e.store(b.fsub(values, e.splat(minimum, 16)), out, 4)
        return context.get_dummy_value()

    whole, single = types.int64, types.float32
    three, four = types.UniTuple(whole, 3), types.UniTuple(whole, 4)
    return types.void(whole, three, four, whole, single, single), codegen


@intrinsic
def write_octets(typingctx, out, place, step):
    """Write step * code of 16 int8 as float32 to an address."""

    def codegen(context, builder, signature, args):
        e, b = EmitterHere(builder), builder
        codes = b.sitofp(b.sext(e.load(args[1], _BYTES, 1), _WORDS), _FLOATS)
        e.store(b.fmul(e.splat(args[2], 16), codes), args[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def pack_q80_row(typingctx, values, tile, row):
    """Quantise 32 float32 at an address into a row of a q80 tile, to the bits that `rounding` gives."""

    def codegen(context, builder, signature, args):
        _emit_q80(EmitterHere(builder), *args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _emit_q80(e, values, tile, row):
    b = e.b
    halves = [e.load(b.add(values, I64(64 * i)), _FLOATS, 4) for i in range(2)]
    sizes = [e.call("llvm.fabs.v16f32", _FLOATS, half) for half in halves]
    largest, count = b.select(b.fcmp_ordered(">", *sizes), *sizes), 16
    while count > 1:
        count //= 2
        parts = [e.pick(largest, range(first, first + count)) for first in (0, count)]
        largest = b.select(b.fcmp_ordered(">", *parts), *parts)
    scale = b.fdiv(b.extract_element(largest, I32(0)), ir.Constant(F32, 127.0))
    inverse = b.fdiv(ir.Constant(F32, 1.0), scale)
    is_finite = b.fcmp_ordered("<", inverse, ir.Constant(F32, float("inf")))
    inverse = e.splat(b.select(is_finite, inverse, ir.Constant(F32, 0.0)), 16)
    e.store(b.fptrunc(scale, F16), b.add(tile, b.mul(row, I64(2))), 1)
    first = b.add(b.add(tile, I64(2 * ROWS)), b.mul(row, I64(4)))
    for i, half in enumerate(halves):
        value = b.fmul(half, inverse)
        away = b.select(
            b.fcmp_ordered(">=", value, constant(F32, 16, 0.0)), constant(F32, 16, 0.5), constant(F32, 16, -0.5)
        )
        value = b.fadd(value, away)
        value = b.select(b.fcmp_ordered(">", value, constant(F32, 16, -127.0)), value, constant(F32, 16, -127.0))
        value = b.select(b.fcmp_ordered("<", value, constant(F32, 16, 127.0)), value, constant(F32, 16, 127.0))
        words = b.bitcast(b.trunc(b.fptosi(value, _WORDS), _BYTES), vector(I32, 4))
        for j in range(BLOCK // 8):
            e.store(b.extract_element(words, I32(j)), b.add(first, I64(64 * (4 * i + j))), 1)
