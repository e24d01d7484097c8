"""Parallel regions: one compiled function on every thread, without a parallel function of Numba's.

A region calls the thread pool of Numba's threading layer itself. Compiling a `parallel=True` function costs seconds,
and it takes no nested structures; this costs a few instructions, and passes any arguments on through the caller's
stack.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.ufunc.parallel import _launch_threads

from .compiled import declare
from .simd import I32, I64

_launch_threads()  # loads the threading layer, and tells the linker of its `numba_parallel_for`

_BYTES = ir.IntType(8).as_pointer()
# As in numba/np/ufunc/omppool.cpp: (function, arguments, dimensions, steps, data, inner dimensions, number of
# arguments, threads); the function gets (arguments, dimensions, steps, data).
_KERNEL = ir.FunctionType(ir.VoidType(), [_BYTES.as_pointer(), I64.as_pointer(), I64.as_pointer(), _BYTES])
_POOL = ir.FunctionType(
    ir.VoidType(), [_BYTES, _BYTES.as_pointer(), I64.as_pointer(), I64.as_pointer(), _BYTES, I64, I64, I32]
)


@intrinsic
def run_parallel(typingctx, function, arguments, threads):
    """Call function(*arguments, thread, threads) for every thread in range(threads), at the same time.

    function: compiled, of some module, returning nothing; arguments: a tuple. Returns when all are done. One thread is
    this one: no region is begun.
    """
    whole = types.int64
    wanted = function.get_call_type(typingctx, (*arguments.types, whole, whole), {})

    def codegen(context, builder, signature, args):
        _, packed, count = args
        frame = ir.LiteralStructType([packed.type, I64])
        callee = declare(context, builder.module, function.dispatcher, wanted.args)

        def run(b, packed, thread, threads):
            values = [
                context.cast(b, b.extract_value(packed, i), kind, wanted_kind)
                for i, (kind, wanted_kind) in enumerate(zip(arguments.types, wanted.args, strict=False))
            ]
            context.call_conv.call_function(b, callee, types.none, wanted.args, [*values, thread, threads])

        with builder.if_else(builder.icmp_signed("==", count, I64(1))) as (alone, together):
            with alone:
                run(builder, packed, I64(0), count)
            with together:
                _emit_call(builder, _emit_kernel(builder.module, run, frame), frame, packed, count)
        return context.get_dummy_value()

    return types.void(function, arguments, whole), codegen


def _emit_kernel(module, run, frame):
    """Emit what the pool calls: it takes the arguments from the frame and runs the compiled function."""
    kernel = ir.Function(module, _KERNEL, module.get_unique_name("parallel_region"))
    kernel.linkage = "internal"
    b = ir.IRBuilder(kernel.append_basic_block("entry"))
    slots, dimensions = kernel.args[:2]
    packed = b.load(b.bitcast(b.load(slots), frame.as_pointer()))
    first = b.ptrtoint(b.load(b.gep(slots, [I64(1)])), I64)
    with cgutils.for_range(b, b.load(dimensions), intp=I64) as loop:
        run(b, b.extract_value(packed, 0), b.add(first, loop.index), b.extract_value(packed, 1))
    b.ret_void()
    return kernel


def _emit_call(builder, kernel, frame, packed, count):
    """Emit the call of the pool; a thread's number is an address without a base, with a step of one byte."""
    b = builder
    values = b.insert_value(b.insert_value(ir.Constant(frame, ir.Undefined), packed, 0), count, 1)
    place = cgutils.alloca_once_value(b, values)
    slots = cgutils.alloca_once(b, _BYTES, size=2)
    b.store(b.bitcast(place, _BYTES), slots)
    b.store(I64(0).inttoptr(_BYTES), b.gep(slots, [I64(1)]))
    steps = cgutils.alloca_once(b, I64, size=2)
    b.store(I64(0), steps)
    b.store(I64(1), b.gep(steps, [I64(1)]))
    pool = cgutils.get_or_insert_function(b.module, _POOL, "numba_parallel_for")
    nothing = ir.Constant(_BYTES, None)
    dimensions = cgutils.alloca_once_value(b, count)
    b.call(pool, [b.bitcast(kernel, _BYTES), slots, dimensions, steps, nothing, I64(0), I64(2), b.trunc(count, I32)])
