"""A SIMD vocabulary for Numba: vector types and operations, emitted as LLVM vector IR.

Kernels are written once on top of `Emitter`; what differs between instruction sets is a method of a subclass here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .emitter import (
    BYTES,
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    NIBBLES,
    SMALL,
    Codes,
    Emitter,
    constant,
    vector,
)
from .runtime import ISA


class Shuffle(NamedTuple):
    """The LLVM intrinsic that shuffles, by bytes 0..15, so many bytes in parts of 16."""

    name: str
    size: int


class ByteShuffle(Emitter):
    """An instruction set with an instruction that shuffles bytes, whose first operand is the table."""

    shuffle: Shuffle

    def lookup(self, table: ir.Value, codes: ir.Value) -> ir.Value:
        wide = self.pick(table, [*range(16)] * (self.shuffle.size // 16))

        def native(part: ir.Value) -> ir.Value:
            return self.call(self.shuffle.name, part.type, wide, part)

        return self.by_parts(codes.type.count // self.shuffle.size, native, codes)


class DotProduct(ByteShuffle):
    """An instruction set with an instruction for dot products of four bytes, `native_dot4` on `dot_lanes` lanes."""

    dot_lanes: int

    def block_dots(self, codes: Codes, most: int, xs: list[ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
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

    offsets: ClassVar = {SMALL: 128, BYTES: 128}

    def native_dot4(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        # As int32 lanes, the way LLVM had it until release 22, which still takes it so.
        lanes = [self.b.bitcast(operand, total.type) for operand in (weights, x)]
        return self.call(f"llvm.x86.avx512.vpdpbusd.{32 * self.dot_lanes}", total.type, total, *lanes)


class Avx512Vnni(Vnni):
    """AVX-512 with VNNI: 64 products an instruction, and 32 registers."""

    dot_lanes = 16
    shuffle = Shuffle("llvm.x86.avx512.pshuf.b.512", 64)

    def dot_shape(self, tokens: int, most: int) -> tuple[int, int]:
        return 16, tokens

    def fma_shape(self, tokens: int) -> tuple[int, int]:
        return 16, tokens


class Avx2Vnni(Vnni):
    """AVX2 with AVX-VNNI: 32 products an instruction, and 16 registers."""

    dot_lanes = 8
    shuffle = Shuffle("llvm.x86.avx2.pshuf.b", 32)

    def dot_shape(self, tokens: int, most: int) -> tuple[int, int]:
        return 16, min(tokens, 4)


class Avx2(ByteShuffle):
    """AVX2: products of unsigned and signed bytes, added in pairs to int16, never so many that they saturate."""

    shuffle = Shuffle("llvm.x86.avx2.pshuf.b", 32)
    offsets: ClassVar = {SMALL: 16}

    def dot_shape(self, tokens: int, most: int) -> tuple[int, int]:
        # One token takes all rows at once: in two goes over a row of tiles the memory would rest during the second.
        return (16, 1) if tokens == 1 else (8, min(tokens, 2 if most == BYTES else 4))

    def block_dots(self, codes: Codes, most: int, xs: list[ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
        if most != BYTES:
            for sums in self.pair_sums(codes, most, xs):
                totals = [self.b.add(total, self.add_pairs(two)) for total, two in zip(totals, sums, strict=True)]
            return totals
        rows = totals[0].type.count
        for quad, weights in codes:  # w * x = |w| * (x with the sign of w)
            size = self.size(weights)
            signed = [self.with_sign(self.columns(x, quad, rows), weights) for x in xs]
            totals = [self.dot4(total, size, x) for total, x in zip(totals, signed, strict=True)]
        return totals

    def pair_sums(self, codes: Codes, most: int, xs: list[ir.Value]) -> Iterator[list[ir.Value]]:
        """Emit each token's sums of neighbouring products, in int16, for as many codes at a time as surely fit.

        Eight times two products of nibbles are at most 30,480, four times two of small codes with their offset 28,448.
        """
        sums: list = []
        for k, (quad, weights) in enumerate(codes):
            two = [self.products(weights, self.columns(x, quad, weights.type.count // 4)) for x in xs]
            sums = [self.b.add(*pair) for pair in zip(sums, two, strict=True)] if sums else two
            if k == 7 or (k == 3 and most == SMALL):
                yield sums
                sums = []

    def scaled_dots(
        self, codes: Codes, xs: list[ir.Value], s: ir.Value, m: ir.Value, offsets: list[ir.Value]
    ) -> list[ir.Value]:
        b, rows = self.b, s.type.count
        words, pairs = vector(I32, rows), vector(I16, 2 * rows)
        s, m = b.zext(s, words), b.bitcast(b.zext(m, words), pairs)  # an offset fits into 16 bits, and so takes m and 0
        s = b.bitcast(b.or_(s, b.shl(s, constant(I32, rows, 16))), pairs)
        (sums,) = self.pair_sums(codes, NIBBLES, xs)
        shifts = [self.add_products(b.bitcast(offset, pairs), m) for offset in offsets]
        totals = [b.add(self.add_products(two, s), shift) for two, shift in zip(sums, shifts, strict=True)]
        return [b.sitofp(total, vector(F32, rows)) for total in totals]

    def with_sign(self, values: ir.Value, signs: ir.Value) -> ir.Value:
        """Return signed bytes, negated where others are negative, 0 where they are 0."""

        def native(values: ir.Value, signs: ir.Value) -> ir.Value:
            return self.call("llvm.x86.avx2.psign.b", values.type, values, signs)

        return self.by_parts(values.type.count // 32, native, values, signs)

    def size(self, codes: ir.Value) -> ir.Value:
        """Return the sizes of signed bytes, as unsigned ones."""
        zero = constant(I8, codes.type.count, 0)
        return self.b.select(self.b.icmp_signed("<", codes, zero), self.b.sub(zero, codes), codes)

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

        return self.add_products(values, constant(I16, values.type.count, 1))

    def add_products(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return the sums of neighbouring int16's products, as int32."""

        def native(x: ir.Value, y: ir.Value) -> ir.Value:
            return self.call("llvm.x86.avx2.pmadd.wd", vector(I32, 8), x, y)

        return self.by_parts(x.type.count // 16, native, x, y)


class Neon(ByteShuffle):
    """NEON, which multiplies by one lane of a register: four elements are loaded at once."""

    ahead = 0
    shuffle = Shuffle("llvm.aarch64.neon.tbl1.v16i8", 16)

    def dot_shape(self, tokens: int, most: int) -> tuple[int, int]:
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

    def dot_shape(self, tokens: int, most: int) -> tuple[int, int]:
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


@intrinsic
def bits_of(typingctx, value):
    """Return the bits (uint32) of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), codegen
