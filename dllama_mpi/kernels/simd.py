"""A SIMD vocabulary for Numba: vector types and operations, emitted as LLVM vector IR.

Kernels are written once on top of `Emitter`; what differs between instruction sets is a method of a subclass.
Anything not overridden is plain vector IR, which LLVM lowers correctly for every processor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .runtime import ISA

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

Codes = Iterator[tuple[int, ir.Value]]

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


def _single(value: float) -> float:
    """Return the float32 nearest to a value, as LLVM wants constants."""
    return struct.unpack("f", struct.pack("f", value))[0]


class Emitter:
    """Emits vector operations into one LLVM function; addresses are 64-bit integers, in bytes.

    Attributes:
        offset: what `block_dots` wants added to signed codes that are not narrow.
        ahead: bytes by which weights are prefetched, or 0 to leave it to
            the hardware.
    """

    offset = 0
    ahead = 4096

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def dot_shape(self, tokens: int, narrow: bool) -> tuple[int, int]:
        """Return how many rows and tokens an inner kernel of `block_dots` takes at once, to stay in the registers."""
        return 16, min(tokens, 2)

    def fma_shape(self, tokens: int) -> tuple[int, int]:
        """Return the same for inner kernels of float32."""
        return 16, min(tokens, 4)

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
        shifted = self.fma(x, lanes(_single(1.4426950408889634)), lanes(12582912.0))
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
        result = b.select(b.fcmp_ordered("<=", x, lanes(_single(88.72283172607422))), result, beyond)
        return b.select(b.fcmp_ordered("<", x, lanes(_single(-87.33654022216797))), lanes(0.0), result)

    def broadcast(self, address: ir.Value, index: int, element: ir.Type, count: int) -> ir.Value:
        """Return element `index` of an array of 4-byte elements, a multiple of four of them, in every lane."""
        return self.splat(self.load(self.b.add(address, I64(4 * index)), element, 4), count)

    def columns(self, x: ir.Value, quad: int, rows: int) -> ir.Value:
        """Return columns 4 * quad to 4 * quad + 3 of the int8 block at address x, once a row: <4*rows x i8>."""
        return self.b.bitcast(self.broadcast(x, quad, I32, rows), vector(I8, 4 * rows))

    def block_dots(self, codes: Codes, narrow: bool, xs: list[ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
        """Add to the int32 totals of each token, <rows x i32>, the dot products of its 32 columns with every row.

        codes: pairs (quad, weights <4*rows x i8> of columns 4 * quad to 4 * quad + 3), emitted as they are drawn;
        narrow: they are 0..15, else -128..127 plus `offset`; xs: addresses of each token's 32 int8, -127..127.

        Here products are summed in int16 as long as they fit: eight narrow ones are at most 15,240, two others 32,512.
        """
        b = self.b
        pairs: list = [None] * len(xs)
        sums: list = [None] * len(xs)
        for k, (quad, weights) in enumerate(codes):
            wide = vector(I16, weights.type.count)
            factor = b.sext(weights, wide)
            for t, x in enumerate(xs):
                product = b.mul(factor, b.sext(self.columns(x, quad, totals[t].type.count), wide))
                sums[t] = product if sums[t] is None else b.add(sums[t], product)
                if k == 7 or (k % 2 == 1 and not narrow):
                    two = self.add_pairs(sums[t])
                    pairs[t], sums[t] = two if pairs[t] is None else b.add(pairs[t], two), None
        return [b.add(total, self.add_pairs(pair)) for total, pair in zip(totals, pairs, strict=True)]

    def dot4(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """Add to each int32 lane the four products of its bytes of weights, 0..127 + `offset`, and of x, -127..127."""
        wide = vector(I16, x.type.count)
        product = self.b.mul(self.b.sext(weights, wide), self.b.sext(x, wide))
        return self.b.add(total, self.add_pairs(self.add_pairs(product)))

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


class DotProduct(Emitter):
    """An instruction set with an instruction for dot products of four bytes, `native_dot4` on `dot_lanes` lanes."""

    dot_lanes: int

    def block_dots(self, codes: Codes, narrow: bool, xs: list[ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
        rows = totals[0].type.count
        for quad, weights in codes:
            totals = [
                self.dot4(total, weights, self.columns(x, quad, rows)) for x, total in zip(xs, totals, strict=True)
            ]
        return totals

    def dot4(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        return self.by_parts(total.type.count // self.dot_lanes, self.native_dot4, total, weights, x)

    def native_dot4(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """Return dot4 of one register's lanes."""
        raise NotImplementedError


class Vnni(DotProduct):
    """VNNI multiplies unsigned with signed bytes; its LLVM intrinsics are told by the registers' bits."""

    offset = 128

    def native_dot4(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        # As int32 lanes, the way LLVM had it until release 22, which still takes it so.
        lanes = [self.b.bitcast(operand, total.type) for operand in (weights, x)]
        return self.call(f"llvm.x86.avx512.vpdpbusd.{32 * self.dot_lanes}", total.type, total, *lanes)


class Avx512Vnni(Vnni):
    """AVX-512 with VNNI: 64 products an instruction, and 32 registers."""

    dot_lanes = 16

    def dot_shape(self, tokens: int, narrow: bool) -> tuple[int, int]:
        return 16, tokens

    def fma_shape(self, tokens: int) -> tuple[int, int]:
        return 16, tokens


class Avx2Vnni(Vnni):
    """AVX2 with AVX-VNNI: 32 products an instruction, and 16 registers."""

    dot_lanes = 8

    def dot_shape(self, tokens: int, narrow: bool) -> tuple[int, int]:
        return 16, min(tokens, 4)


class Avx2(Emitter):
    """AVX2: products of unsigned and signed bytes, added in pairs to int16, never so many that they saturate."""

    def dot_shape(self, tokens: int, narrow: bool) -> tuple[int, int]:
        return 8, min(tokens, 4 if narrow else 2)

    def block_dots(self, codes: Codes, narrow: bool, xs: list[ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
        b, rows = self.b, totals[0].type.count
        totals = list(totals)
        sums: list = [None] * len(xs)
        zero = constant(I8, 4 * rows, 0)
        for quad, weights in codes:
            size = None if narrow else b.select(b.icmp_signed("<", weights, zero), b.sub(zero, weights), weights)
            for t, address in enumerate(xs):
                x = self.columns(address, quad, rows)
                if narrow:  # a block's sixteen products in a lane are at most 30,480
                    two = self.products(weights, x)
                    sums[t] = two if sums[t] is None else b.add(sums[t], two)
                else:  # w * x = |w| * (x with the sign of w)
                    sign = self.call("llvm.x86.avx2.psign.b", x.type, x, weights)
                    totals[t] = self.dot4(totals[t], size, sign)
        if narrow:
            totals = [b.add(total, self.add_pairs(two)) for total, two in zip(totals, sums, strict=True)]
        return totals

    def dot4(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        return self.b.add(total, self.add_pairs(self.products(weights, x)))

    def products(self, weights: ir.Value, x: ir.Value) -> ir.Value:
        """Return the sums of neighbouring bytes' products, at most 2 * 128 * 127, as int16."""

        def native(weights: ir.Value, x: ir.Value) -> ir.Value:
            return self.call("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), weights, x)

        return self.by_parts(x.type.count // 32, native, weights, x)

    def add_pairs(self, values: ir.Value) -> ir.Value:
        if values.type.element != I16:
            return super().add_pairs(values)

        def native(words: ir.Value) -> ir.Value:
            return self.call("llvm.x86.avx2.pmadd.wd", vector(I32, 8), words, constant(I16, 16, 1))

        return self.by_parts(values.type.count // 16, native, values)


class Neon(Emitter):
    """NEON, which multiplies by one lane of a register: four elements are loaded at once."""

    ahead = 0

    def dot_shape(self, tokens: int, narrow: bool) -> tuple[int, int]:
        return 16, 1

    def broadcast(self, address: ir.Value, index: int, element: ir.Type, count: int) -> ir.Value:
        four = self.load(self.b.add(address, I64(4 * (index & ~3))), vector(element, 4), 4)
        return self.pick(four, [index & 3] * count)

    def add_pairs(self, values: ir.Value) -> ir.Value:
        def native(eight: ir.Value) -> ir.Value:
            if eight.type.element == I16:
                return self.call("llvm.aarch64.neon.saddlp.v4i32.v8i16", vector(I32, 4), eight)
            halves = self.pick(eight, range(4)), self.pick(eight, range(4, 8))
            return self.call("llvm.aarch64.neon.addp.v4i32", vector(I32, 4), *halves)

        return self.by_parts(values.type.count // 8, native, values)


class NeonDot(DotProduct, Neon):
    """NEON with dot product: 16 products of signed bytes an instruction."""

    dot_lanes = 4

    def dot_shape(self, tokens: int, narrow: bool) -> tuple[int, int]:
        return (16, tokens) if tokens <= 2 else (8, 4)

    def native_dot4(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        return self.call("llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, total, weights, x)


EMITTERS: dict[str, type[Emitter]] = {
    "avx512vnni": Avx512Vnni,
    "avx2vnni": Avx2Vnni,
    "avx2": Avx2,
    "neondot": NeonDot,
    "neon": Neon,
    "generic": Emitter,
}
EmitterHere = EMITTERS[ISA]


@intrinsic
def address(typingctx, array):
    """Return the address of an array's first element as int64. The caller keeps the array alive."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, I64)

    return types.int64(array), codegen


@intrinsic
def widen(typingctx, value):
    """Return a float32 from a float32 or from the bits of a float16 (uint16)."""

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        return builder.fpext(builder.bitcast(args[0], F16), F32)

    return types.float32(value), codegen


@intrinsic
def narrow(typingctx, value):
    """Return the bits (uint16) of the float16 nearest to a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], F16), I16)

    return types.uint16(types.float32), codegen


@intrinsic
def bf16_to_f32(typingctx, value):
    """Return the float32 whose upper half is the given bfloat16 bits (uint16)."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), I32(16)), F32)

    return types.float32(types.uint16), codegen
