"""A SIMD vocabulary for Numba: vector types and operations, emitted as LLVM vector IR.

Kernels are written once on top of `Emitter`; what differs between instruction sets is a method of a subclass.
Anything not overridden is plain vector IR, which LLVM lowers correctly for every processor.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .runtime import ISA

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def vector(element: ir.Type, count: int) -> ir.VectorType:
    """Return the vector type of `count` elements."""
    return ir.VectorType(element, count)


def constant(element: ir.Type, count: int, value: float) -> ir.Constant:
    """Return a vector constant with `value` in every lane."""
    return ir.Constant(vector(element, count), [value] * count)


class Emitter:
    """Emits vector operations into one LLVM function; addresses are 64-bit integers, in bytes."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

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

    def dot4(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Add to each int32 lane the sum of four products of unsigned and signed bytes.

        total: <16 x i32>; unsigned: <64 x i8>, 0..255; signed: <64 x i8>, -128..127.
        """
        b = self.b
        for c in range(4):
            lanes = ir.Constant(vector(I32, 16), [4 * lane + c for lane in range(16)])
            wide = []
            for bytes_, extend in ((unsigned, b.zext), (signed, b.sext)):
                part = b.shuffle_vector(bytes_, ir.Constant(bytes_.type, ir.Undefined), lanes)
                wide.append(extend(part, vector(I32, 16)))
            total = b.add(total, b.mul(*wide))
        return total

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


class Avx512Vnni(Emitter):
    """AVX-512 with VNNI: one instruction for 64 products."""

    def dot4(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        ty = ir.FunctionType(total.type, [total.type, unsigned.type, signed.type])
        name = "llvm.x86.avx512.vpdpbusd.512"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, ty, name), [total, unsigned, signed])


EMITTERS: dict[str, type[Emitter]] = {"avx512vnni": Avx512Vnni, "generic": Emitter}
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
