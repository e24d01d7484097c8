"""Widening the int8 codes of a KV cache to float32 tiles."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .layout import BLOCK, ROWS
from .simd import F16, F32, I8, I32, I64, EmitterHere, vector


def _widen_rows(count, scale_of):
    """Return an intrinsic that widens `count` rows of 16 codes; scale_of(builder, scales, row) are a row's 16 scales.

    Its arguments are addresses: of codes, of 16 scales in float16, of 16 * count float32 to write.
    """

    @intrinsic
    def widened(typingctx, codes, scales, out):
        def codegen(context, builder, signature, args):
            e = EmitterHere(builder)
            codes, scales, out = args
            given = builder.fpext(e.load(scales, vector(F16, ROWS), 2), vector(F32, ROWS))
            for row in range(count):
                wide = builder.sext(e.load(builder.add(codes, I64(ROWS * row)), vector(I8, ROWS), 1), vector(I32, ROWS))
                value = builder.fmul(builder.sitofp(wide, vector(F32, ROWS)), scale_of(builder, given, row))
                e.store(value, builder.add(out, I64(4 * ROWS * row)), 4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return widened


def _one_lane(builder, scales, row):
    undefined = ir.Constant(scales.type, ir.Undefined)
    return builder.shuffle_vector(scales, undefined, ir.Constant(vector(I32, ROWS), [row] * ROWS))


widen_keys = _widen_rows(BLOCK, lambda _builder, scales, _row: scales)  # a row: one dimension of 16 positions
widen_values = _widen_rows(ROWS, _one_lane)  # a row: 16 dimensions of one position
