"""What compiled code needs beyond Numba: calls of C functions by address, atomic words, records by address."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...kernels.simd import I8, I32, I64


@intrinsic
def call(typingctx, function, arguments):
    """Call a C function by its address with integers, and return its int.

    MPI's handles, which are 32-bit integers with some libraries and pointers with others, are passed as 64-bit
    integers: the calling conventions of x86-64 and AArch64 let a function that wants 32 bits ignore the rest, in
    registers and, on little-endian machines, on the stack.
    """

    def codegen(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        ty = ir.FunctionType(I32, [I64] * len(values))
        return builder.call(builder.inttoptr(args[0], ty.as_pointer()), values)

    return types.int32(types.int64, arguments), codegen


@intrinsic
def integers(typingctx, address):
    """Return a pointer to int64 from an address."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def load(typingctx, address):
    """Load an int64, seeing all that was written before it was stored."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store(typingctx, address, value):
    """Store an int64 after all that was written before."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        ty = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, ty, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, I32(0), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def address_of(typingctx, record):
    """Return the address of a record, which the caller keeps alive."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], I64)

    return types.int64(record), codegen


def record_at(dtype: np.dtype):
    """Return an intrinsic that gives the record of a structured dtype at an address."""
    record = from_dtype(dtype)

    @intrinsic
    def at(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), codegen

    return at
