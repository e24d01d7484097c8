"""The bytes in which activations travel between ranks, 32 values at a time, and their sums.

f32  128 bytes: 32 float32.   f16  64 bytes: 32 float16.   q80  34 bytes: a float16 scale and 32 int8 codes.

Sums are fused multiply-adds in the order of the ranks, so that unlike machines get the same bits from the same bytes.
"""

from __future__ import annotations

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

Q80_BYTES, F16_BYTES, F32_BYTES = PAYLOADS["q80"], PAYLOADS["f16"], PAYLOADS["f32"]
_LARGEST_HALF = F32(65504.0)  # of float16; what is beyond is sent as that


def _elements(width: int) -> tuple:
    """Return the type of a payload's values, their bytes, and where they begin in a block."""
    return {Q80_BYTES: (I8, 1, 2), F16_BYTES: (F16, 2, 0), F32_BYTES: (F32, 4, 0)}[width]


def _adder(width: int):
    """Return an intrinsic that adds 32 values of a payload to 32 float32; both by their addresses."""
    element, size, start = _elements(width)

    @intrinsic
    def add(typingctx, total, payload):
        def codegen(context, builder, signature, args):
            e, b, floats = EmitterHere(builder), builder, vector(F32, ROWS)
            if element == I8:
                scale = e.splat(b.fpext(e.load(args[1], F16, 1), F32), ROWS)
            for half in range(BLOCK // ROWS):
                value = e.load(b.add(args[1], I64(start + half * ROWS * size)), vector(element, ROWS), 1)
                where = b.add(args[0], I64(half * ROWS * 4))
                before = e.load(where, floats, 4)
                if element == I8:
                    after = e.fma(b.sitofp(value, floats), scale, before)
                else:
                    after = b.fadd(before, b.fpext(value, floats) if element == F16 else value)
                e.store(after, where, 4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return add


def _encoder(width: int):
    """Return an intrinsic that writes 32 float32 values as a payload; both by their addresses."""
    element, size, start = _elements(width)

    def halves(e, address):
        return [e.load(e.b.add(address, I64(4 * ROWS * half)), vector(F32, ROWS), 4) for half in (0, 1)]

    def codes(e, values, payload):
        """Scale to int8: the largest in size becomes 127, halves go to the even code."""
        b, floats = e.b, vector(F32, ROWS)
        sizes = [e.call(f"llvm.fabs.v{ROWS}f32", floats, value) for value in values]
        most = e.call(f"llvm.maxnum.v{ROWS}f32", floats, *sizes)
        largest = e.call(f"llvm.vector.reduce.fmax.v{ROWS}f32", F32, most)
        scale = b.fdiv(largest, F32(127.0))
        scale = b.fptrunc(b.select(b.fcmp_ordered("<", scale, _LARGEST_HALF), scale, _LARGEST_HALF), F16)
        e.store(scale, payload, 1)
        scale = b.fpext(scale, F32)
        some = b.fcmp_ordered(">", scale, F32(0.0))
        inverse = e.splat(b.select(some, b.fdiv(F32(1.0), scale), F32(0.0)), ROWS)
        for value in values:
            value = e.call(f"llvm.rint.v{ROWS}f32", floats, b.fmul(value, inverse))
            yield b.trunc(b.fptosi(_within(e, value, 127.0), vector(I32, ROWS)), vector(I8, ROWS))

    @intrinsic
    def encode_block(typingctx, values, payload):
        def codegen(context, builder, signature, args):
            e, b = EmitterHere(builder), builder
            found = halves(e, args[0])
            if element == I8:
                found = codes(e, found, args[1])
            elif element == F16:
                found = [b.fptrunc(_within(e, value, 65504.0), vector(F16, ROWS)) for value in found]
            for half, value in enumerate(found):
                e.store(value, b.add(args[1], I64(start + half * ROWS * size)), 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return encode_block


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


_add_q80, _add_f16, _add_f32 = (_adder(width) for width in (Q80_BYTES, F16_BYTES, F32_BYTES))
_encode_q80, _encode_f16, _encode_f32 = (_encoder(width) for width in (Q80_BYTES, F16_BYTES, F32_BYTES))


@inner
def add_blocks(total, payload, blocks, width):
    """Add a payload of so many blocks to float32 values; both by their addresses."""
    for b in range(blocks):
        at = total + b * 4 * BLOCK
        if width == Q80_BYTES:
            _add_q80(at, payload + b * Q80_BYTES)
        elif width == F16_BYTES:
            _add_f16(at, payload + b * F16_BYTES)
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
        else:
            _encode_f32(at, payload + b * F32_BYTES)


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
def decode_sum(payloads, x):
    """Write the sum over ranks of payloads (ranks, blocks, bytes), in rank order, into x (blocks, 32) float32."""
    size = payloads.shape[1] * payloads.shape[2]
    sum_blocks(address(x), address(payloads), payloads.shape[0], size, x.shape[0], payloads.shape[2])
