"""What the rounding of 16 x 32 weights is written in: vectors with a lane for each of a tile's 16 rows.

x is the address of the weights column after column, 16 float32 each.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from .emitter import F16, F32, I8, I32, I64, constant, single, vector
from .layout import BLOCK, ROWS

LANES, WORDS = vector(F32, ROWS), vector(I32, ROWS)
CODES = 2 * ROWS  # bytes before a tile's codes
COLUMN_BYTES = 4 * ROWS


def of(value: float) -> ir.Constant:
    """Return a float32 in all 16 lanes."""
    return constant(F32, ROWS, value)


def words(value: int) -> ir.Constant:
    """Return an int32 in all 16 lanes."""
    return constant(I32, ROWS, value)


def octets(value: int) -> ir.Constant:
    """Return an int8 64 times, as many as a chunk has bytes."""
    return constant(I8, 64, value)


def load_column(e, x, index):
    """Return the 16 weights of a column."""
    return e.load(e.b.add(x, e.b.mul(index, I64(COLUMN_BYTES))), LANES, COLUMN_BYTES)


def store_column(e, x, index, values):
    """Store the 16 weights of a column."""
    e.store(values, e.b.add(x, e.b.mul(index, I64(COLUMN_BYTES))), COLUMN_BYTES)


def each_column(e, x, state, body):
    """Emit state = body(column, *state) for every column; return the last."""
    return e.counted_loop(I64(BLOCK), state, lambda i, s: body(load_column(e, x, i), *s))


def absolute(e, x):
    """Return each lane's size."""
    return e.call(f"llvm.fabs.v{ROWS}f32", LANES, x)


def larger(e, x, y):
    """Return the larger of two lanes; y where one is NaN."""
    return e.b.select(e.b.fcmp_ordered(">", x, y), x, y)


def smaller(e, x, y):
    """Return the smaller of two lanes; y where one is NaN."""
    return e.b.select(e.b.fcmp_ordered("<", x, y), x, y)


def clipped(e, x, low, high):
    """Return values within bounds; NaN becomes the lower."""
    return smaller(e, larger(e, x, of(low)), of(high))


def rounded(e, x):
    """Return the integers nearest to small values, halves to even: adding 1.5 * 2**23 leaves no room for a fraction."""
    return e.b.fsub(e.b.fadd(x, of(12582912.0)), of(12582912.0))


def inverse_of(e, x):
    """Return 1 / x, 0 for 0 and where it would be infinite."""
    b = e.b
    inverse = b.fdiv(of(1.0), x)
    is_finite = b.fcmp_ordered("<", absolute(e, inverse), of(float("inf")))
    return b.select(is_finite, inverse, of(0.0))


def store_halves(e, values, tile):
    """Store 16 scales as float16 where a tile begins."""
    e.store(e.b.fptrunc(values, vector(F16, ROWS)), tile, 1)


def load_halves(e, tile):
    """Return the 16 float16 scales that a tile begins with, as float32."""
    return e.b.fpext(e.load(tile, vector(F16, ROWS), 1), LANES)


def store_codes(e, x, tile, code_of, nibbles=True):
    """Write codes, which code_of(column) gives as int32, to their places."""
    b = e.b

    def chunk(j, state):
        word = words(0)
        for c in range(4):
            for half in range(2 if nibbles else 1):
                column = b.add(b.mul(j, I64(4)), I64(16 * half + c))
                code = code_of(load_column(e, x, column))
                code = code if nibbles else b.and_(code, words(255))
                word = b.or_(word, b.shl(code, words(8 * c + 4 * half)))
        e.store(word, b.add(tile, b.add(I64(CODES), b.mul(j, I64(64)))), 1)
        return state

    e.counted_loop(I64(4 if nibbles else 8), [], chunk)


def largest(e, x):
    """Return each row's value that is largest in size, the first of several."""

    def body(column, largest, signed):
        size = absolute(e, column)
        is_larger = e.b.fcmp_ordered(">", size, largest)
        return e.b.select(is_larger, size, largest), e.b.select(is_larger, column, signed)

    return each_column(e, x, [of(0.0), of(0.0)], body)


def listed(e, values, index):
    """Return one of a list of numbers in every lane."""
    numbers = ir.Constant(ir.ArrayType(F32, len(values)), [single(float(v)) for v in values])
    where = cgutils.global_constant(e.b.module, "numbers", numbers)
    return e.splat(e.load(e.b.add(e.b.ptrtoint(where, I64), e.b.mul(index, I64(4))), F32, 4), ROWS)
