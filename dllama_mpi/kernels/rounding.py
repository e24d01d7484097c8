"""How 16 x 32 weights become the codes of a tile and back, as vector code: a lane for each of the 16 rows.

x is the address of the weights column after column, 16 float32 each. Sums run over the columns in order, and products
are rounded before they are added, so that every processor finds the same codes.
"""

from __future__ import annotations

from llvmlite import ir

from . import lanes
from .emitter import F16, F32, I8, I64, Emitter, vector
from .layout import BLOCK, FORMATS, ROWS
from .rounding_search import pack_iq4nl, pack_mxfp4, pack_q4m, value_of_q4m


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
    value_of = {"q40": _value_of_q40, "q4m": value_of_q4m}.get(fmt.kernel, _value_of_signed)
    value = value_of(e, fmt, tile, row_scales)

    def chunk(j, state):
        words = e.load(e.b.add(tile, e.b.add(I64(lanes.CODES), e.b.mul(j, I64(64)))), vector(I8, 64), 1)
        halves = (
            [words] if fmt.kernel == "q80" else [e.b.and_(words, lanes.octets(15)), e.b.lshr(words, lanes.octets(4))]
        )
        for half, codes in enumerate(halves):
            if fmt.table:
                codes = e.lookup(ir.Constant(vector(I8, 16), [t & 255 for t in fmt.table]), codes)
            codes = e.b.bitcast(codes, lanes.WORDS)
            for c in range(4):
                one = e.b.ashr(e.b.shl(codes, lanes.words(24 - 8 * c)), lanes.words(24))
                column = e.b.add(e.b.mul(j, I64(4)), I64(16 * half + c))
                lanes.store_column(e, x, column, value(e.b.sitofp(one, lanes.LANES)))
        return state

    e.counted_loop(I64(8 if fmt.kernel == "q80" else 4), [], chunk)


# ---- f16 and f32


def _pack_floats(e, fmt, x, tile, _row_scales):
    element, size = (F16, 2) if fmt.kernel == "f16" else (F32, 4)

    def column(i, state):
        values = lanes.load_column(e, x, i)
        values = e.b.fptrunc(values, vector(element, ROWS)) if element == F16 else values
        e.store(values, e.b.add(tile, e.b.mul(i, I64(size * ROWS))), 1)
        return state

    e.counted_loop(I64(BLOCK), [], column)


def _unpack_floats(e, fmt, x, tile):
    element, size = (F16, 2) if fmt.kernel == "f16" else (F32, 4)

    def column(i, state):
        values = e.load(e.b.add(tile, e.b.mul(i, I64(size * ROWS))), vector(element, ROWS), 1)
        lanes.store_column(e, x, i, e.b.fpext(values, lanes.LANES) if element == F16 else values)
        return state

    e.counted_loop(I64(BLOCK), [], column)


# ---- q40 and q80: one scale, from the largest in size


def _pack_q40(e, _fmt, x, tile, _row_scales):
    """The largest in size becomes code 0 (ggml's Q4_0)."""
    b = e.b
    scale = b.fdiv(lanes.largest(e, x)[1], lanes.of(-8.0))
    inverse = lanes.inverse_of(e, scale)
    lanes.store_halves(e, scale, tile)

    def code_of(column):
        shifted = b.fadd(b.fmul(column, inverse), lanes.of(8.5))
        return b.fptosi(lanes.clipped(e, shifted, 0.0, 15.0), lanes.WORDS)

    lanes.store_codes(e, x, tile, code_of)


def _pack_q80(e, _fmt, x, tile, _row_scales):
    """The largest in size becomes 127; halves are rounded away from zero (ggml's Q8_0)."""
    b = e.b
    scale = b.fdiv(lanes.largest(e, x)[0], lanes.of(127.0))
    inverse = lanes.inverse_of(e, scale)
    lanes.store_halves(e, scale, tile)

    def code_of(column):
        value = b.fmul(column, inverse)
        half = b.select(b.fcmp_ordered(">=", value, lanes.of(0.0)), lanes.of(0.5), lanes.of(-0.5))
        return b.fptosi(lanes.clipped(e, b.fadd(value, half), -127.0, 127.0), lanes.WORDS)

    lanes.store_codes(e, x, tile, code_of, nibbles=False)


def _value_of_q40(e, _fmt, tile, _row_scales):
    scale = lanes.load_halves(e, tile)
    return lambda code: e.b.fmul(scale, e.b.fsub(code, lanes.of(8.0)))


def _value_of_signed(e, fmt, tile, row_scales):
    scale = lanes.load_halves(e, tile)
    if fmt.has_row_scales:
        scale = e.b.fmul(scale, e.load(row_scales, lanes.LANES, 4))
    return lambda code: e.b.fmul(scale, code)


_PACK = {"q40": _pack_q40, "q80": _pack_q80, "iq4nl": pack_iq4nl, "mxfp4": pack_mxfp4, "q4m": pack_q4m}


# ---- rows of tiles


def emit_row(e: Emitter, name: str, packing: bool, args: tuple[ir.Value, ...]) -> None:
    """Emit the packing or unpacking of one row of tiles.

    args, int64: address of 16 rows of float32, bytes from one to the next; address of the first tile, tiles; address of
    16 row scales or 0.
    """
    x, stride, tiles, count, row_scales = args
    b = e.b
    with b.goto_entry_block():
        scratch = b.alloca(ir.ArrayType(lanes.LANES, BLOCK))
        scratch.align = lanes.COLUMN_BYTES
    columns = b.ptrtoint(scratch, I64)

    def turned(block, to_columns):
        def row(r, state):
            start = b.add(b.add(x, b.mul(r, stride)), b.mul(block, I64(4 * BLOCK)))

            def column(i, state):
                ends = (
                    b.add(start, b.mul(i, I64(4))),
                    b.add(columns, b.add(b.mul(i, I64(lanes.COLUMN_BYTES)), b.mul(r, I64(4)))),
                )
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
