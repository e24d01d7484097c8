"""Vector types and operations, emitted as plain LLVM vector IR, which LLVM lowers correctly for every processor."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

Codes = Iterator[tuple[int, ir.Value]]
NIBBLES, SMALL, BYTES = 15, 12, 128  # the largest size of codes: of 0..15, of signed ones up to 12, of any signed ones

_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")
# Of e**r, highest power first: 1 + r + r**2 * (the polynomial of least relative error, 2**-28, on +-ln 2 / 2).
_EXP_POLYNOMIAL = [
    float.fromhex(c)
    for c in ("0x1.6a23dp-10", "0x1.123a2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p0", "0x1p0")
]


def vector(element: ir.Type, count: int) -> ir.VectorType:
    """Return the vector type of `count` elements."""
    return ir.VectorType(element, count)


def constant(element: ir.Type, count: int, value: float) -> ir.Constant:
    """Return a vector constant with `value` in every lane."""
    return ir.Constant(vector(element, count), [value] * count)


def single(value: float) -> float:
    """Return the float32 nearest to a value, as LLVM wants constants."""
    return struct.unpack("f", struct.pack("f", value))[0]


class Emitter:
    """Emits vector operations into one LLVM function; addresses are 64-bit integers, in bytes.

    Attributes:
        offsets: what `block_dots` wants added to codes, by their largest size; 0 unless told.
        ahead: bytes by which weights are prefetched, or 0 to leave it to the hardware.
    """

    offsets: Mapping[int, int] = {}
    ahead = 4096

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def dot_shape(self, tokens: int, most: int) -> tuple[int, int]:
        """Return how many rows and tokens an inner kernel of `block_dots` takes at once, to stay in the registers."""
        return 16, min(tokens, 2)

    def fma_shape(self, tokens: int) -> tuple[int, int]:
        """Return the same for inner kernels of float32."""
        return 16, min(tokens, 4)

    @staticmethod
    def shapes(shape: Callable[[int], tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the different rows and tokens that inner kernels take of 8, 4, 2 and 1 tokens, most tokens first."""
        found: dict[int, int] = {}
        for rows, tokens in map(shape, (8, 4, 2, 1)):
            found.setdefault(tokens, rows)
        return [(rows, tokens) for tokens, rows in found.items()]

    def load(self, address: ir.Value, ty: ir.Type, align: int) -> ir.Value:
        """Load a scalar or vector."""
        return self.b.load(self.b.inttoptr(address, ty.as_pointer()), align=align)

    def store(self, value: ir.Value, address: ir.Value, align: int) -> None:
        """Store a scalar or vector."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=align)

    def splat(self, value: ir.Value, count: int) -> ir.Value:
        """Broadcast a scalar to every lane."""
        ty = vector(value.type, count)
        one = self.b.insert_element(ir.Constant(ty, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(one, ir.Constant(ty, ir.Undefined), ir.Constant(vector(I32, count), [0] * count))

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """Return x * y + z, rounded once, for vectors of float32."""
        ty = x.type
        fma = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(ty, [ty] * 3), f"llvm.fma.v{ty.count}f32")
        return self.b.call(fma, [x, y, z])

    def exp(self, x: ir.Value) -> ir.Value:
        """Return e**x for vectors of float32, within 1 unit in the last place.

        0 below -87.3, where the result would be subnormal; infinity above 88.7; NaN stays NaN.
        """
        b, ty = self.b, x.type
        bits = vector(I32, ty.count)

        def lanes(value: float) -> ir.Constant:
            return constant(F32, ty.count, value)

        # x = n ln 2 + r: adding 1.5 * 2**23 rounds to an integer, which then stands in the lowest bits.
        shifted = self.fma(x, lanes(single(1.4426950408889634)), lanes(12582912.0))
        n = b.fsub(shifted, lanes(12582912.0))
        r = self.fma(n, lanes(-_LN2_HIGH), x)  # n times the short upper part of ln 2 is exact
        r = self.fma(n, lanes(-_LN2_LOW), r)
        result = lanes(_EXP_POLYNOMIAL[0])
        for coefficient in _EXP_POLYNOMIAL[1:]:
            result = self.fma(result, r, lanes(coefficient))
        # Times 2**n: n is added to the exponent.
        power = b.shl(b.bitcast(shifted, bits), constant(I32, ty.count, 23))
        result = b.bitcast(b.add(b.bitcast(result, bits), power), ty)
        beyond = b.fadd(x, lanes(float("inf")))  # infinity for large x, NaN for NaN
        result = b.select(b.fcmp_ordered("<=", x, lanes(single(88.72283172607422))), result, beyond)
        return b.select(b.fcmp_ordered("<", x, lanes(single(-87.33654022216797))), lanes(0.0), result)

    def broadcast(self, address: ir.Value, index: int, element: ir.Type, count: int) -> ir.Value:
        """Return element `index` of an array of 4-byte elements, a multiple of four of them, in every lane."""
        return self.splat(self.load(self.b.add(address, I64(4 * index)), element, 4), count)

    def columns(self, x: ir.Value, quad: int, rows: int) -> ir.Value:
        """Return columns 4 * quad to 4 * quad + 3 of the int8 block at address x, once a row: <4*rows x i8>."""
        return self.b.bitcast(self.broadcast(x, quad, I32, rows), vector(I8, 4 * rows))

    def block_dots(self, codes: Codes, most: int, xs: list[ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
        """Add to the int32 totals of each token, <rows x i32>, the dot products of its 32 columns with every row.

        codes: pairs (quad, weights <4*rows x i8> of columns 4 * quad to 4 * quad + 3), emitted as they are drawn; most:
        their largest size, NIBBLES, SMALL or BYTES, without the offset that they have been given. xs: addresses of each
        token's 32 int8, -127..127.

        Here products are summed in int16 as long as they fit: eight of nibbles are at most 15,240, two of bytes 32,512.
        """
        b = self.b
        pairs: list = [None] * len(xs)
        sums: list = [None] * len(xs)
        together = 2 if most == BYTES else 8
        for k, (quad, weights) in enumerate(codes):
            wide = vector(I16, weights.type.count)
            factor = b.sext(weights, wide)
            for t, x in enumerate(xs):
                product = b.mul(factor, b.sext(self.columns(x, quad, totals[t].type.count), wide))
                sums[t] = product if sums[t] is None else b.add(sums[t], product)
                if k % together == together - 1:
                    two = self.add_pairs(sums[t])
                    pairs[t], sums[t] = two if pairs[t] is None else b.add(pairs[t], two), None
        return [b.add(total, self.add_pairs(pair)) for total, pair in zip(totals, pairs, strict=True)]

    def scaled_dots(
        self, codes: Codes, xs: list[ir.Value], s: ir.Value, m: ir.Value, offsets: list[ir.Value]
    ) -> list[ir.Value]:
        """Return s * dot + m * offset of each token, rounded once to <rows x float>.

        dot: that of `block_dots` for NIBBLES. s, m: unsigned bytes <rows x i8>. offsets: <rows x i32>, at most 32,512
        in size.
        """
        b, rows = self.b, s.type.count
        lanes, words = vector(F32, rows), vector(I32, rows)
        s, m = (b.sitofp(b.zext(v, words), lanes) for v in (s, m))
        dots = self.block_dots(codes, NIBBLES, xs, [constant(I32, rows, 0)] * len(xs))
        both = [(b.sitofp(dot, lanes), b.sitofp(offset, lanes)) for dot, offset in zip(dots, offsets, strict=True)]
        return [self.fma(s, dot, b.fmul(m, offset)) for dot, offset in both]  # products are exact: less than 2**24

    def dot4(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """Add to each int32 lane the four products of its bytes of weights, 0..127, and of x, -127..127."""
        wide = vector(I16, x.type.count)
        product = self.b.mul(self.b.sext(weights, wide), self.b.sext(x, wide))
        return self.b.add(total, self.add_pairs(self.add_pairs(product)))

    def lookup(self, table: ir.Value, codes: ir.Value) -> ir.Value:
        """Return the bytes of a table <16 x i8> that codes, bytes 0..15, stand for."""
        count = codes.type.count
        values = [self.pick(table, [i] * count) for i in range(16)]
        for bit in (1, 2, 4, 8):
            is_set = self.b.icmp_signed("!=", self.b.and_(codes, constant(I8, count, bit)), constant(I8, count, 0))
            values = [self.b.select(is_set, *pair) for pair in zip(values[1::2], values[::2], strict=True)]
        return values[0]

    def add_pairs(self, values: ir.Value) -> ir.Value:
        """Return the sums of neighbouring lanes as int32."""
        count = values.type.count
        two = [self.pick(values, range(first, count, 2)) for first in (0, 1)]
        if values.type.element != I32:
            two = [self.b.sext(part, vector(I32, count // 2)) for part in two]
        return self.b.add(*two)

    def pick(self, values: ir.Value, lanes: Iterable[int]) -> ir.Value:
        """Return a vector of some lanes of another."""
        lanes = [*lanes]
        nothing = ir.Constant(values.type, ir.Undefined)
        return self.b.shuffle_vector(values, nothing, ir.Constant(vector(I32, len(lanes)), lanes))

    def by_parts(self, parts: int, operation: Callable[..., ir.Value], *vectors: ir.Value) -> ir.Value:
        """Return the results, one after the other, of an operation on each of so many equal parts of vectors."""
        if parts == 1:
            return operation(*vectors)
        results = []
        for half in (0, 1):
            picked = [self.pick(v, range(half * v.type.count // 2, (half + 1) * v.type.count // 2)) for v in vectors]
            results.append(self.by_parts(parts // 2, operation, *picked))
        count = 2 * results[0].type.count
        return self.b.shuffle_vector(*results, ir.Constant(vector(I32, count), [*range(count)]))

    def prefetch(self, address: ir.Value, size: int) -> None:
        """Ask for `size` bytes `ahead` of an address, which need not exist."""
        for line in range(self.ahead, self.ahead + size, 64) if self.ahead else ():
            pointer = self.b.inttoptr(self.b.add(address, I64(line)), I8.as_pointer())
            self.call("llvm.prefetch.p0i8", ir.VoidType(), pointer, I32(0), I32(3), I32(1))

    def call(self, name: str, ty: ir.Type, *args: ir.Value) -> ir.Value:
        """Call an LLVM intrinsic."""
        function = ir.FunctionType(ty, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), args)

    def counted_loop(self, count: ir.Value, state: list[ir.Value], body) -> list[ir.Value]:
        """Emit `for i in range(count): state = body(i, state)`, values in registers; return the final state."""
        b = self.b
        entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.cbranch(b.icmp_signed(">", count, I64(0)), loop, done)
        b.position_at_end(loop)
        i = b.phi(I64)
        i.add_incoming(I64(0), entry)
        phis = [b.phi(s.type) for s in state]
        for phi, start in zip(phis, state, strict=True):
            phi.add_incoming(start, entry)
        after = body(i, phis)
        following = b.add(i, I64(1))
        i.add_incoming(following, b.block)
        for phi, value in zip(phis, after, strict=True):
            phi.add_incoming(value, b.block)
        last = b.block
        b.cbranch(b.icmp_signed("<", following, count), loop, done)
        b.position_at_end(done)
        results = []
        for start, value in zip(state, after, strict=True):
            phi = b.phi(start.type)
            phi.add_incoming(start, entry)
            phi.add_incoming(value, last)
            results.append(phi)
        return results
