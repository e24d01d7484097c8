"""How 16 x 32 weights become the codes of a tile and back, as vector code: a lane for each of the 16 rows.

x is the address of the weights column after column, 16 float32 each. Sums run over the columns in order, and products
are rounded before they are added, so that every processor finds the same codes.
"""

from __future__ import annotations

import itertools

from llvmlite import ir
from numba.core import cgutils

from .emitter import (
    F16,
    F32,
    I8,
    I32,
    I64,
    Emitter,
    constant,
    single,
    vector,
)
from .layout import BLOCK, FORMATS, ROWS

LANES, WORDS = vector(F32, ROWS), vector(I32, ROWS)
CODES = 2 * ROWS  # bytes before a tile's codes
_STEP = 4 * ROWS  # bytes of a column


def emit_pack(e: Emitter, name: str, x: ir.Value, tile: ir.Value, row_scales: ir.Value) -> None:
    """Emit the writing of one tile; row_scales: address of 16 float32, for formats that have them."""
    fmt = FORMATS[name]
    _PACK.get(name, _pack_floats)(e, fmt, x, tile, row_scales)


def emit_unpack(e: Emitter, name: str, x: ir.Value, tile: ir.Value, row_scales: ir.Value) -> None:
    """Emit the reading of one tile, into x."""
    fmt = FORMATS[name]
    if not fmt.quantised_activations:
        _unpack_floats(e, fmt, x, tile)
        return
    value_of = {"q40": _value_of_q40, "q4m": _value_of_q4m}.get(fmt.kernel, _value_of_signed)
    value = value_of(e, fmt, tile, row_scales)

    def chunk(j, state):
        words = e.load(e.b.add(tile, e.b.add(I64(CODES), e.b.mul(j, I64(64)))), vector(I8, 64), 1)
        halves = [words] if fmt.kernel == "q80" else [e.b.and_(words, _bytes(15)), e.b.lshr(words, _bytes(4))]
        for half, codes in enumerate(halves):
            if fmt.table:
                codes = e.lookup(ir.Constant(vector(I8, 16), [t & 255 for t in fmt.table]), codes)
            codes = e.b.bitcast(codes, WORDS)
            for c in range(4):
                one = e.b.ashr(e.b.shl(codes, _words(24 - 8 * c)), _words(24))
                column = e.b.add(e.b.mul(j, I64(4)), I64(16 * half + c))
                _store(e, x, column, value(e.b.sitofp(one, LANES)))
        return state

    e.counted_loop(I64(8 if fmt.kernel == "q80" else 4), [], chunk)


# ---- vocabulary


def _lanes(value: float) -> ir.Constant:
    return constant(F32, ROWS, value)


def _words(value: int) -> ir.Constant:
    return constant(I32, ROWS, value)


def _bytes(value: int) -> ir.Constant:
    return constant(I8, 64, value)


def _column(e, x, index):
    return e.load(e.b.add(x, e.b.mul(index, I64(_STEP))), LANES, _STEP)


def _store(e, x, index, values):
    e.store(values, e.b.add(x, e.b.mul(index, I64(_STEP))), _STEP)


def _each_column(e, x, state, body):
    """Emit state = body(column, *state) for every column; return the last."""
    return e.counted_loop(I64(BLOCK), state, lambda i, s: body(_column(e, x, i), *s))


def _abs(e, x):
    return e.call(f"llvm.fabs.v{ROWS}f32", LANES, x)


def _larger(e, x, y):
    return e.b.select(e.b.fcmp_ordered(">", x, y), x, y)


def _smaller(e, x, y):
    return e.b.select(e.b.fcmp_ordered("<", x, y), x, y)


def _clipped(e, x, low, high):
    """Return values within bounds; NaN becomes the lower."""
    return _smaller(e, _larger(e, x, _lanes(low)), _lanes(high))


def _rounded(e, x):
    """Return the integers nearest to small values, halves to even: adding 1.5 * 2**23 leaves no room for a fraction."""
    return e.b.fsub(e.b.fadd(x, _lanes(12582912.0)), _lanes(12582912.0))


def _inverse(e, x):
    """Return 1 / x, 0 for 0 and where it would be infinite."""
    b = e.b
    inverse = b.fdiv(_lanes(1.0), x)
    is_finite = b.fcmp_ordered("<", _abs(e, inverse), _lanes(float("inf")))
    return b.select(is_finite, inverse, _lanes(0.0))


def _store_halves(e, values, tile):
    e.store(e.b.fptrunc(values, vector(F16, ROWS)), tile, 1)


def _halves(e, tile):
    return e.b.fpext(e.load(tile, vector(F16, ROWS), 1), LANES)


def _store_codes(e, x, tile, code_of, nibbles=True):
    """Write codes, which code_of(column) gives as int32, to their places."""
    b = e.b

    def chunk(j, state):
        word = _words(0)
        for c in range(4):
            for half in range(2 if nibbles else 1):
                column = b.add(b.mul(j, I64(4)), I64(16 * half + c))
                code = code_of(_column(e, x, column))
                code = code if nibbles else b.and_(code, _words(255))
                word = b.or_(word, b.shl(code, _words(8 * c + 4 * half)))
        e.store(word, b.add(tile, b.add(I64(CODES), b.mul(j, I64(64)))), 1)
        return state

    e.counted_loop(I64(4 if nibbles else 8), [], chunk)


# ---- f16 and f32


def _pack_floats(e, fmt, x, tile, _row_scales):
    element, size = (F16, 2) if fmt.kernel == "f16" else (F32, 4)

    def column(i, state):
        values = _column(e, x, i)
        values = e.b.fptrunc(values, vector(element, ROWS)) if element == F16 else values
        e.store(values, e.b.add(tile, e.b.mul(i, I64(size * ROWS))), 1)
        return state

    e.counted_loop(I64(BLOCK), [], column)


def _unpack_floats(e, fmt, x, tile):
    element, size = (F16, 2) if fmt.kernel == "f16" else (F32, 4)

    def column(i, state):
        values = e.load(e.b.add(tile, e.b.mul(i, I64(size * ROWS))), vector(element, ROWS), 1)
        _store(e, x, i, e.b.fpext(values, LANES) if element == F16 else values)
        return state

    e.counted_loop(I64(BLOCK), [], column)


# ---- q40 and q80: one scale, from the largest in size


def _largest(e, x):
    """Return each row's value that is largest in size, the first of several."""

    def body(column, largest, signed):
        size = _abs(e, column)
        is_larger = e.b.fcmp_ordered(">", size, largest)
        return e.b.select(is_larger, size, largest), e.b.select(is_larger, column, signed)

    return _each_column(e, x, [_lanes(0.0), _lanes(0.0)], body)


def _pack_q40(e, _fmt, x, tile, _row_scales):
    """The largest in size becomes code 0 (ggml's Q4_0)."""
    b = e.b
    scale = b.fdiv(_largest(e, x)[1], _lanes(-8.0))
    inverse = _inverse(e, scale)
    _store_halves(e, scale, tile)

    def code_of(column):
        shifted = b.fadd(b.fmul(column, inverse), _lanes(8.5))
        return b.fptosi(_clipped(e, shifted, 0.0, 15.0), WORDS)

    _store_codes(e, x, tile, code_of)


def _pack_q80(e, _fmt, x, tile, _row_scales):
    """The largest in size becomes 127; halves are rounded away from zero (ggml's Q8_0)."""
    b = e.b
    scale = b.fdiv(_largest(e, x)[0], _lanes(127.0))
    inverse = _inverse(e, scale)
    _store_halves(e, scale, tile)

    def code_of(column):
        value = b.fmul(column, inverse)
        half = b.select(b.fcmp_ordered(">=", value, _lanes(0.0)), _lanes(0.5), _lanes(-0.5))
        return b.fptosi(_clipped(e, b.fadd(value, half), -127.0, 127.0), WORDS)

    _store_codes(e, x, tile, code_of, nibbles=False)


def _value_of_q40(e, _fmt, tile, _row_scales):
    scale = _halves(e, tile)
    return lambda code: e.b.fmul(scale, e.b.fsub(code, _lanes(8.0)))


def _value_of_signed(e, fmt, tile, row_scales):
    scale = _halves(e, tile)
    if fmt.has_row_scales:
        scale = e.b.fmul(scale, e.load(row_scales, LANES, 4))
    return lambda code: e.b.fmul(scale, code)


# ---- table formats: a nibble stands for one of 16 values


def _nearest(e, table, x):
    """Return the codes of the values of an ascending table that are nearest to x, and these values."""
    b = e.b
    codes, values = _words(0), _lanes(table[0])
    for below, above in itertools.pairwise(table):
        is_above = b.fcmp_ordered(">", x, _lanes((below + above) / 2))
        codes = b.add(codes, b.zext(is_above, WORDS))
        values = b.fadd(values, b.select(is_above, _lanes(above - below), _lanes(0.0)))
    return codes, values


# What the value that is largest in size may become: each end of the table, and somewhat less and more.
_TARGETS = [float(-127 * f / 100) for f in range(82, 111, 5)] + [float(113 * f / 100) for f in range(90, 121, 6)]


def _pack_iq4nl(e, fmt, x, tile, _row_scales):
    """Try several scales; each gives codes, and these the scale of least squared error (as ggml's IQ4_NL does)."""
    b = e.b
    inverse = _inverse(e, _largest(e, x)[1])

    def attempt(k, state):
        gain, scale = state
        factor = b.fmul(inverse, _listed(e, _TARGETS, k))

        def add(column, product, square):
            value = _nearest(e, fmt.table, b.fmul(column, factor))[1]
            return b.fadd(product, b.fmul(column, value)), b.fadd(square, b.fmul(value, value))

        product, square = _each_column(e, x, [_lanes(0.0), _lanes(0.0)], add)
        fit = b.fdiv(product, square)
        new = b.fmul(product, fit)
        is_better = b.fcmp_ordered(">", new, gain)
        return [b.select(is_better, new, gain), b.select(is_better, fit, scale)]

    scale = e.counted_loop(I64(len(_TARGETS)), [_lanes(0.0), _lanes(0.0)], attempt)[1]
    _store_halves(e, scale, tile)
    inverse = _inverse(e, _halves(e, tile))
    _store_codes(e, x, tile, lambda column: _nearest(e, fmt.table, b.fmul(column, inverse))[0])


def _pack_mxfp4(e, _fmt, x, tile, row_scales):
    """Scale by the power of two that the OCP Microscaling specification (1.0, section 6.3) tells; round to even."""
    b = e.b
    row_scale = e.load(row_scales, LANES, 4)
    exponents = [b.lshr(b.bitcast(v, WORDS), _words(23)) for v in (_largest(e, x)[0], row_scale)]
    relative = b.sub(b.sub(exponents[0], exponents[1]), _words(3))  # E2M1 reaches 2 * 2**2, and the table has doubles
    relative = b.select(b.icmp_signed("<", relative, _words(-24)), _words(-24), relative)
    relative = b.select(b.icmp_signed(">", relative, _words(15)), _words(15), relative)
    scale = b.bitcast(b.shl(b.add(relative, _words(127)), _words(23)), LANES)
    _store_halves(e, scale, tile)
    inverse = _inverse(e, b.fmul(scale, row_scale))

    def code_of(column):
        value = b.fmul(column, inverse)
        size, code = _abs(e, value), b.select(b.fcmp_ordered("<", value, _lanes(0.0)), _words(8), _words(0))
        # The middle between two doubles of E2M1 goes to the even code.
        for middle, is_beyond in (
            (0.5, ">"),
            (1.5, ">="),
            (2.5, ">"),
            (3.5, ">="),
            (5.0, ">"),
            (7.0, ">="),
            (10.0, ">"),
        ):
            code = b.add(code, b.zext(b.fcmp_ordered(is_beyond, size, _lanes(middle)), WORDS))
        return code

    _store_codes(e, x, tile, code_of)


def _listed(e, values, index):
    """Return one of a list of numbers in every lane."""
    numbers = ir.Constant(ir.ArrayType(F32, len(values)), [single(float(v)) for v in values])
    where = cgutils.global_constant(e.b.module, "numbers", numbers)
    return e.splat(e.load(e.b.add(e.b.ptrtoint(where, I64), e.b.mul(index, I64(4))), F32, 4), ROWS)


# ---- q4m: s and m of a block so that D * (s * code - 8 * m) is near, D being the row's

_FACTORS, _PHASES = (0.86, 0.92, 0.98, 1.04, 1.1), (-0.25, 0.0, 0.25, 0.5)
_CANDIDATES = [(factor, phase) for factor in _FACTORS for phase in _PHASES]
_NEIGHBOURS = [(s, m) for s in (-1, 0, 1) for m in (-1, 0, 1) if s or m]


class _Search:
    """The search for s and m. Weights are in units of D; s and m are whole, in float32."""

    def __init__(self, e: Emitter, x: ir.Value, total: ir.Value) -> None:
        self.e, self.x, self.total = e, x, total  # total: the sum of a row's weights

    def sums(self, step: ir.Value, base: ir.Value) -> list[ir.Value]:
        """Return the sums of codes, their squares and their products with weights, for values base + step * code."""
        b = self.e.b
        inverse = b.fdiv(_lanes(1.0), step)
        shift = b.fmul(b.fsub(_lanes(0.0), base), inverse)

        def add(column, codes, squares, products):
            code = self.code(column, inverse, shift)
            return b.fadd(codes, code), b.fadd(squares, b.fmul(code, code)), b.fadd(products, b.fmul(code, column))

        return _each_column(self.e, self.x, [_lanes(0.0)] * 3, add)

    def code(self, column: ir.Value, inverse: ir.Value, shift: ir.Value) -> ir.Value:
        """Return the codes of weights."""
        b = self.e.b
        return _rounded(self.e, _clipped(self.e, b.fadd(b.fmul(column, inverse), shift), 0.0, 15.0))

    def fitted(self, step: ir.Value, sums: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Return the s and m nearest to the step and base of least squared error for given codes."""
        e, b = self.e, self.e.b
        codes, squares, products = sums
        spread = b.fsub(b.fmul(_lanes(32.0), squares), b.fmul(codes, codes))
        slope = b.fsub(b.fmul(_lanes(32.0), products), b.fmul(self.total, codes))
        step = b.select(b.fcmp_ordered(">", spread, _lanes(0.0)), b.fdiv(slope, spread), step)
        base = b.fmul(b.fsub(self.total, b.fmul(step, codes)), _lanes(1 / 32))
        s, m = _rounded(e, step), _rounded(e, b.fmul(base, _lanes(-1 / 8)))
        return _clipped(e, s, 1.0, 255.0), _clipped(e, m, 0.0, 255.0)

    def error(self, s: ir.Value, m: ir.Value, sums: list[ir.Value]) -> ir.Value:
        """Return the squared error of codes less the sum of the weights' squares."""
        b = self.e.b
        codes, squares, products = sums
        first = b.fsub(b.fmul(s, squares), b.fmul(b.fmul(_lanes(16.0), m), codes))
        first = b.fmul(s, b.fsub(first, b.fmul(_lanes(2.0), products)))
        second = b.fmul(m, b.fadd(b.fmul(_lanes(2048.0), m), b.fmul(_lanes(16.0), self.total)))
        return b.fadd(first, second)

    def better(self, state: list[ir.Value], s: ir.Value, m: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Return error, s and m of a state or, where they are better, the new ones."""
        error = self.error(s, m, sums)
        is_better = self.e.b.fcmp_ordered("<", error, state[0])
        return [self.e.b.select(is_better, *pair) for pair in zip((error, s, m), state, strict=True)]


def _pack_q4m(e, _fmt, x, tile, row_scales):
    """Fit s and m to the codes of a lattice of steps and bases, then try their neighbours, each with codes of its own.

    Finds on average within 1 % of the least squared error of all s and m.
    """
    b = e.b
    inverse = _inverse(e, e.load(row_scales, LANES, 4))

    def scaled(i, state):
        low, high, total = state
        column = b.fmul(_column(e, x, i), inverse)
        _store(e, x, i, column)
        return _smaller(e, column, low), _larger(e, column, high), b.fadd(total, column)

    low, high, total = e.counted_loop(I64(BLOCK), [_lanes(0.0), _lanes(float("-inf")), _lanes(0.0)], scaled)
    search = _Search(e, x, total)
    widest = b.fmul(b.fsub(high, low), _lanes(single(1 / 15)))

    def candidate(k, state):
        step = _larger(e, b.fmul(widest, _listed(e, [f for f, _ in _CANDIDATES], k)), _lanes(0.5))
        base = b.fadd(low, b.fmul(step, _listed(e, [p for _, p in _CANDIDATES], k)))
        sums = search.sums(step, base)
        return search.better(state, *search.fitted(step, sums), sums)

    state = [_lanes(float("inf")), _lanes(1.0), _lanes(0.0)]
    state = e.counted_loop(I64(len(_CANDIDATES)), state, candidate)

    def again(_k, state):
        sums = search.sums(state[1], b.fmul(state[2], _lanes(-8.0)))
        return search.better(state, *search.fitted(state[1], sums), sums)

    state = e.counted_loop(I64(1), state, again)
    s0, m0 = state[1:]

    def neighbour(k, state):
        s = _clipped(e, b.fadd(s0, _listed(e, [s for s, _ in _NEIGHBOURS], k)), 1.0, 255.0)
        m = _clipped(e, b.fadd(m0, _listed(e, [m for _, m in _NEIGHBOURS], k)), 0.0, 255.0)
        return search.better(state, s, m, search.sums(s, b.fmul(m, _lanes(-8.0))))

    s, m = e.counted_loop(I64(len(_NEIGHBOURS)), state, neighbour)[1:]
    for values, start in ((s, 0), (m, ROWS)):
        e.store(b.trunc(b.fptosi(values, WORDS), vector(I8, ROWS)), b.add(tile, I64(start)), 1)
    inverse = b.fdiv(_lanes(1.0), s)
    shift = b.fmul(b.fmul(m, _lanes(8.0)), inverse)
    _store_codes(e, x, tile, lambda column: b.fptosi(search.code(column, inverse, shift), WORDS))


def _value_of_q4m(e, _fmt, tile, row_scales):
    b = e.b
    s, m = (b.sitofp(b.zext(e.load(b.add(tile, I64(start)), vector(I8, ROWS), 1), WORDS), LANES) for start in (0, ROWS))
    base, scale = b.fmul(m, _lanes(-8.0)), e.load(row_scales, LANES, 4)
    return lambda code: b.fmul(scale, b.fadd(b.fmul(s, code), base))


_PACK = {"q40": _pack_q40, "q80": _pack_q80, "iq4nl": _pack_iq4nl, "mxfp4": _pack_mxfp4, "q4m": _pack_q4m}


# ---- rows of tiles


def emit_row(e: Emitter, name: str, packing: bool, args: tuple[ir.Value, ...]) -> None:
    """Emit the packing or unpacking of one row of tiles.

    args, int64: address of 16 rows of float32, bytes from one to the next; address of the first tile, tiles; address of
    16 row scales or 0.
    """
    x, stride, tiles, count, row_scales = args
    b = e.b
    with b.goto_entry_block():
        scratch = b.alloca(ir.ArrayType(LANES, BLOCK))
        scratch.align = _STEP
    columns = b.ptrtoint(scratch, I64)

    def turned(block, to_columns):
        def row(r, state):
            start = b.add(b.add(x, b.mul(r, stride)), b.mul(block, I64(4 * BLOCK)))

            def column(i, state):
                ends = b.add(start, b.mul(i, I64(4))), b.add(columns, b.add(b.mul(i, I64(_STEP)), b.mul(r, I64(4))))
                source, target = ends if to_columns else ends[::-1]
                e.store(e.load(source, F32, 4), target, 4)
                return state

            return e.counted_loop(I64(BLOCK), state, column)

        e.counted_loop(I64(ROWS), [], row)

    def one(block, state):
        tile = b.add(tiles, b.mul(block, I64(FORMATS[name].tile_bytes)))
        if packing:
            turned(block, True)
            emit_pack(e, name, columns, tile, row_scales)
        else:
            emit_unpack(e, name, columns, tile, row_scales)
            turned(block, False)
        return state

    e.counted_loop(count, [], one)
