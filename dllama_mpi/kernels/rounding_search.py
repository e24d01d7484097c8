"""How 16 x 32 weights become the codes of formats whose scales have to be searched for: tables of values, and q4m."""

from __future__ import annotations

import itertools

from llvmlite import ir

from . import lanes
from .emitter import I8, I64, Emitter, single, vector
from .layout import BLOCK, ROWS

# ---- table formats: a nibble stands for one of 16 values


def _nearest(e, table, x):
    """Return the codes of the values of an ascending table that are nearest to x, and these values."""
    b = e.b
    codes, values = lanes.words(0), lanes.of(table[0])
    for below, above in itertools.pairwise(table):
        is_above = b.fcmp_ordered(">", x, lanes.of((below + above) / 2))
        codes = b.add(codes, b.zext(is_above, lanes.WORDS))
        values = b.fadd(values, b.select(is_above, lanes.of(above - below), lanes.of(0.0)))
    return codes, values


# What the value that is largest in size may become: each end of the table, and somewhat less and more.
_TARGETS = [float(-127 * f / 100) for f in range(82, 111, 5)] + [float(113 * f / 100) for f in range(90, 121, 6)]


def pack_iq4nl(e, fmt, x, tile, _row_scales):
    """Try several scales; each gives codes, and these the scale of least squared error (as ggml's IQ4_NL does)."""
    b = e.b
    inverse = lanes.inverse_of(e, lanes.largest(e, x)[1])

    def attempt(k, state):
        gain, scale = state
        factor = b.fmul(inverse, lanes.listed(e, _TARGETS, k))

        def add(column, product, square):
            value = _nearest(e, fmt.table, b.fmul(column, factor))[1]
            return b.fadd(product, b.fmul(column, value)), b.fadd(square, b.fmul(value, value))

        product, square = lanes.each_column(e, x, [lanes.of(0.0), lanes.of(0.0)], add)
        fit = b.fdiv(product, square)
        new = b.fmul(product, fit)
        is_better = b.fcmp_ordered(">", new, gain)
        return [b.select(is_better, new, gain), b.select(is_better, fit, scale)]

    scale = e.counted_loop(I64(len(_TARGETS)), [lanes.of(0.0), lanes.of(0.0)], attempt)[1]
    lanes.store_halves(e, scale, tile)
    inverse = lanes.inverse_of(e, lanes.load_halves(e, tile))
    lanes.store_codes(e, x, tile, lambda column: _nearest(e, fmt.table, b.fmul(column, inverse))[0])


def pack_mxfp4(e, _fmt, x, tile, row_scales):
    """Scale by the power of two that the OCP Microscaling specification (1.0, section 6.3) tells; round to even."""
    b = e.b
    row_scale = e.load(row_scales, lanes.LANES, 4)
    exponents = [b.lshr(b.bitcast(v, lanes.WORDS), lanes.words(23)) for v in (lanes.largest(e, x)[0], row_scale)]
    relative = b.sub(
        b.sub(exponents[0], exponents[1]), lanes.words(3)
    )  # E2M1 reaches 2 * 2**2, and the table has doubles
    relative = b.select(b.icmp_signed("<", relative, lanes.words(-24)), lanes.words(-24), relative)
    relative = b.select(b.icmp_signed(">", relative, lanes.words(15)), lanes.words(15), relative)
    scale = b.bitcast(b.shl(b.add(relative, lanes.words(127)), lanes.words(23)), lanes.LANES)
    lanes.store_halves(e, scale, tile)
    inverse = lanes.inverse_of(e, b.fmul(scale, row_scale))

    def code_of(column):
        value = b.fmul(column, inverse)
        size, code = (
            lanes.absolute(e, value),
            b.select(b.fcmp_ordered("<", value, lanes.of(0.0)), lanes.words(8), lanes.words(0)),
        )
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
            code = b.add(code, b.zext(b.fcmp_ordered(is_beyond, size, lanes.of(middle)), lanes.WORDS))
        return code

    lanes.store_codes(e, x, tile, code_of)


# ---- q4m: s and m of a block so that D * (s * code - 8 * m) is near, D being the row's

_FACTORS, _PHASES = (0.86, 0.98, 1.1), (-0.25, 0.0, 0.25, 0.5)
_CANDIDATES = [(factor, phase) for factor in _FACTORS for phase in _PHASES]
_NEIGHBOURS = [(s, m) for s in (-1, 0, 1) for m in (-1, 0, 1) if s or m]


class _Search:
    """The search for s and m. Weights are in units of D; s and m are whole, in float32."""

    def __init__(self, e: Emitter, x: ir.Value, total: ir.Value) -> None:
        self.e, self.x, self.total = e, x, total  # total: the sum of a row's weights

    def sums(self, step: ir.Value, base: ir.Value) -> list[ir.Value]:
        """Return the sums of codes, their squares and their products with weights, for values base + step * code."""
        b = self.e.b
        inverse = b.fdiv(lanes.of(1.0), step)
        shift = b.fmul(b.fsub(lanes.of(0.0), base), inverse)

        def add(column, codes, squares, products):
            code = self.code(column, inverse, shift)
            return b.fadd(codes, code), b.fadd(squares, b.fmul(code, code)), b.fadd(products, b.fmul(code, column))

        return lanes.each_column(self.e, self.x, [lanes.of(0.0)] * 3, add)

    def code(self, column: ir.Value, inverse: ir.Value, shift: ir.Value) -> ir.Value:
        """Return the codes of weights."""
        b = self.e.b
        return lanes.rounded(self.e, lanes.clipped(self.e, b.fadd(b.fmul(column, inverse), shift), 0.0, 15.0))

    def fitted(self, step: ir.Value, sums: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Return the s and m nearest to the step and base of least squared error for given codes."""
        e, b = self.e, self.e.b
        codes, squares, products = sums
        spread = b.fsub(b.fmul(lanes.of(32.0), squares), b.fmul(codes, codes))
        slope = b.fsub(b.fmul(lanes.of(32.0), products), b.fmul(self.total, codes))
        step = b.select(b.fcmp_ordered(">", spread, lanes.of(0.0)), b.fdiv(slope, spread), step)
        base = b.fmul(b.fsub(self.total, b.fmul(step, codes)), lanes.of(1 / 32))
        s, m = lanes.rounded(e, step), lanes.rounded(e, b.fmul(base, lanes.of(-1 / 8)))
        return lanes.clipped(e, s, 1.0, 255.0), lanes.clipped(e, m, 0.0, 255.0)

    def error(self, s: ir.Value, m: ir.Value, sums: list[ir.Value]) -> ir.Value:
        """Return the squared error of codes less the sum of the weights' squares."""
        b = self.e.b
        codes, squares, products = sums
        first = b.fsub(b.fmul(s, squares), b.fmul(b.fmul(lanes.of(16.0), m), codes))
        first = b.fmul(s, b.fsub(first, b.fmul(lanes.of(2.0), products)))
        second = b.fmul(m, b.fadd(b.fmul(lanes.of(2048.0), m), b.fmul(lanes.of(16.0), self.total)))
        return b.fadd(first, second)

    def better(self, state: list[ir.Value], s: ir.Value, m: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Return error, s and m of a state or, where they are better, the new ones."""
        error = self.error(s, m, sums)
        is_better = self.e.b.fcmp_ordered("<", error, state[0])
        return [self.e.b.select(is_better, *pair) for pair in zip((error, s, m), state, strict=True)]


def pack_q4m(e, _fmt, x, tile, row_scales):
    """Fit s and m to the codes of a lattice of steps and bases, then try their neighbours, each with codes of its own.

    Finds on average within 2 % of the least squared error of all s and m.
    """
    b = e.b
    inverse = lanes.inverse_of(e, e.load(row_scales, lanes.LANES, 4))

    def scaled(i, state):
        low, high, total = state
        column = b.fmul(lanes.load_column(e, x, i), inverse)
        lanes.store_column(e, x, i, column)
        return lanes.smaller(e, column, low), lanes.larger(e, column, high), b.fadd(total, column)

    low, high, total = e.counted_loop(I64(BLOCK), [lanes.of(0.0), lanes.of(float("-inf")), lanes.of(0.0)], scaled)
    search = _Search(e, x, total)
    widest = b.fmul(b.fsub(high, low), lanes.of(single(1 / 15)))

    def candidate(k, state):
        step = lanes.larger(e, b.fmul(widest, lanes.listed(e, [f for f, _ in _CANDIDATES], k)), lanes.of(0.5))
        base = b.fadd(low, b.fmul(step, lanes.listed(e, [p for _, p in _CANDIDATES], k)))
        sums = search.sums(step, base)
        return search.better(state, *search.fitted(step, sums), sums)

    state = [lanes.of(float("inf")), lanes.of(1.0), lanes.of(0.0)]
    state = e.counted_loop(I64(len(_CANDIDATES)), state, candidate)

    def again(_k, state):
        sums = search.sums(state[1], b.fmul(state[2], lanes.of(-8.0)))
        return search.better(state, *search.fitted(state[1], sums), sums)

    state = e.counted_loop(I64(1), state, again)
    s0, m0 = state[1:]

    def neighbour(k, state):
        s = lanes.clipped(e, b.fadd(s0, lanes.listed(e, [s for s, _ in _NEIGHBOURS], k)), 1.0, 255.0)
        m = lanes.clipped(e, b.fadd(m0, lanes.listed(e, [m for _, m in _NEIGHBOURS], k)), 0.0, 255.0)
        return search.better(state, s, m, search.sums(s, b.fmul(m, lanes.of(-8.0))))

    s, m = e.counted_loop(I64(len(_NEIGHBOURS)), state, neighbour)[1:]
    for values, start in ((s, 0), (m, ROWS)):
        e.store(b.trunc(b.fptosi(values, lanes.WORDS), vector(I8, ROWS)), b.add(tile, I64(start)), 1)
    inverse = b.fdiv(lanes.of(1.0), s)
    shift = b.fmul(b.fmul(m, lanes.of(8.0)), inverse)
    lanes.store_codes(e, x, tile, lambda column: b.fptosi(search.code(column, inverse, shift), lanes.WORDS))


def value_of_q4m(e, _fmt, tile, row_scales):
    """Return what emits the values D * (s * code - 8 * m) of 16 codes, in float32, of a tile at an address."""
    b = e.b
    s, m = (
        b.sitofp(b.zext(e.load(b.add(tile, I64(start)), vector(I8, ROWS), 1), lanes.WORDS), lanes.LANES)
        for start in (0, ROWS)
    )
    base, scale = b.fmul(m, lanes.of(-8.0)), e.load(row_scales, lanes.LANES, 4)
    return lambda code: b.fmul(scale, b.fadd(b.fmul(s, code), base))
