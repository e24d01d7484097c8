"""Compile what emitters emit for any processor LLVM knows, without Numba: to read its assembly or to call it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir

from dllama_mpi.kernels.emitter import F32, I8, I32, I64, Emitter, constant, vector
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.kernels.matmul import emit_kernel
from dllama_mpi.kernels.rounding import emit_row

HOST = llvm.get_process_triple()

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()


def emitted(count: int, body: Callable[..., None]) -> ir.Module:
    """Return a module with one function, `f`, whose body `body(builder, *args)` emits; args are `count` int64."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * count), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    body(builder, *function.args)
    builder.ret_void()
    return module


def emulating(emitter: type[Emitter]) -> type[Emitter]:
    """Return an emitter like another, with plain IR in place of the instructions of its processors."""

    class Emulating(emitter):  # type: ignore[misc, valid-type]
        def call(self, name: str, ty: ir.Type, *args: ir.Value) -> ir.Value:
            for known, emulate in EMULATED.items():
                if name.startswith(known):
                    kinds = [a.type for a in args]
                    return self.b.call(_function(self.b.module, f"emulated.{name}", ty, kinds, emulate), args)
            return super().call(name, ty, *args)

    return Emulating


def _function(
    module: ir.Module, name: str, ty: ir.Type, kinds: list[ir.Type], emulate: Callable[..., ir.Value]
) -> ir.Function:
    """Return a function of a module, made when it is first asked for; not inlined, which would take long to compile."""
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ty, kinds), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(emulate(Emitter(builder), ty, *function.args))
    return function


def _dot(unsigned: bool) -> Callable[..., ir.Value]:
    def emulate(e: Emitter, ty: ir.Type, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        count = 4 * ty.count
        weights, x = (e.b.bitcast(v, vector(I8, count)) for v in (weights, x))
        widened = e.b.zext(weights, vector(I32, count)) if unsigned else e.b.sext(weights, vector(I32, count))
        product = e.b.mul(widened, e.b.sext(x, vector(I32, count)))
        for first in range(4):
            total = e.b.add(total, e.pick(product, range(first, count, 4)))
        return total

    return emulate


def _shuffle(e: Emitter, ty: ir.Type, table: ir.Value, codes: ir.Value) -> ir.Value:
    """Emit the shuffle of bytes in parts of 16; a code above 15, which no kernel has, gives zero."""
    result = constant(I8, ty.count, 0)
    for i in range(16):
        there = e.pick(table, [lane // 16 * 16 + i for lane in range(ty.count)])
        result = e.b.select(e.b.icmp_unsigned("==", codes, constant(I8, ty.count, i)), there, result)
    return result


def _pairs(e: Emitter, ty: ir.Type, *parts: ir.Value) -> ir.Value:
    sums = []
    for part in parts:
        wide = e.b.sext(part, vector(I32, part.type.count)) if part.type.element != I32 else part
        sums.append(e.b.add(e.pick(wide, range(0, wide.type.count, 2)), e.pick(wide, range(1, wide.type.count, 2))))
    if len(sums) == 1:
        return sums[0]
    return e.b.shuffle_vector(*sums, ir.Constant(vector(I32, ty.count), [*range(ty.count)]))


def _byte_products(e: Emitter, ty: ir.Type, weights: ir.Value, x: ir.Value) -> ir.Value:
    """Emit the sums of neighbouring products of unsigned and signed bytes, as int16 that no sum exceeds."""
    count = 2 * ty.count
    product = e.b.mul(e.b.zext(weights, vector(I32, count)), e.b.sext(x, vector(I32, count)))
    total = e.b.add(e.pick(product, range(0, count, 2)), e.pick(product, range(1, count, 2)))
    for bound, beyond in ((2**15 - 1, ">"), (-(2**15), "<")):
        limit = constant(I32, ty.count, bound)
        total = e.b.select(e.b.icmp_signed(beyond, total, limit), limit, total)
    return e.b.trunc(total, ty)


def _pair_products(e: Emitter, ty: ir.Type, x: ir.Value, y: ir.Value) -> ir.Value:
    product = e.b.mul(*(e.b.sext(v, vector(I32, 2 * ty.count)) for v in (x, y)))
    return e.b.add(e.pick(product, range(0, 2 * ty.count, 2)), e.pick(product, range(1, 2 * ty.count, 2)))


def _signed(e: Emitter, ty: ir.Type, values: ir.Value, signs: ir.Value) -> ir.Value:
    zero = constant(I8, ty.count, 0)
    turned = e.b.select(e.b.icmp_signed("<", signs, zero), e.b.sub(zero, values), values)
    return e.b.select(e.b.icmp_signed("==", signs, zero), zero, turned)


EMULATED: dict[str, Callable[..., ir.Value]] = {
    "llvm.x86.avx512.vpdpbusd": _dot(unsigned=True),
    "llvm.x86.avx512.pshuf.b": _shuffle,
    "llvm.x86.avx2.pshuf.b": _shuffle,
    "llvm.x86.avx2.pmadd.ub.sw": _byte_products,
    "llvm.x86.avx2.pmadd.wd": _pair_products,
    "llvm.x86.avx2.psign.b": _signed,
    "llvm.aarch64.neon.sdot": _dot(unsigned=False),
    "llvm.aarch64.neon.tbl1": _shuffle,
    "llvm.aarch64.neon.saddlp": _pairs,
    "llvm.aarch64.neon.addp": _pairs,
}


def kernel(emitter: type[Emitter], fmt: str) -> ir.Module:
    """Return the kernel that multiplies a format; see `matmul.kernel_address` for its arguments."""
    return emitted(11, lambda b, *args: emit_kernel(emitter(b), FORMATS[fmt].kernel, args))


def rounding(emitter: type[Emitter], fmt: str, packing: bool) -> ir.Module:
    """Return what packs or unpacks a row of tiles; see `rounding.emit_row` for its arguments."""
    return emitted(5, lambda b, *args: emit_row(emitter(b), fmt, packing, args))


def dot4(emitter: type[Emitter], lanes: int) -> ir.Module:
    """Return f(total, weights, x), which adds the dot products of `lanes` * 4 bytes to `lanes` int32."""

    def body(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, x: ir.Value) -> None:
        e = emitter(builder)
        operands = [e.load(address, vector(I8, 4 * lanes), 1) for address in (weights, x)]
        e.store(e.dot4(e.load(total, vector(I32, lanes), 4), *operands), total, 4)

    return emitted(3, body)


def exp(emitter: type[Emitter], lanes: int) -> ir.Module:
    """Return f(x, y, n), which writes e**x of n vectors of float32 to y."""

    def body(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, n: ir.Value) -> None:
        e = emitter(builder)

        def one(i: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            at = builder.mul(i, I64(4 * lanes))
            e.store(e.exp(e.load(builder.add(x, at), vector(F32, lanes), 4)), builder.add(y, at), 4)
            return state

        e.counted_loop(n, [], one)

    return emitted(3, body)


def optimised(module: ir.Module, cpu: str, triple: str = HOST) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """Return a module after LLVM's passes for a processor, without what the host has on top of it."""
    jit = triple == HOST
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features="", opt=3, jit=jit)
    module.triple, module.data_layout = triple, str(machine.target_data)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return parsed, machine


def assembly(module: ir.Module, cpu: str, triple: str) -> str:
    """Return a module's assembly."""
    parsed, machine = optimised(module, cpu, triple)
    return machine.emit_assembly(parsed)


class Compiled:
    """A function compiled for a processor whose instructions this process can run."""

    def __init__(self, module: ir.Module, cpu: str) -> None:
        count = len(module.get_global("f").args)
        self._engine = llvm.create_mcjit_compiler(*optimised(module, cpu))  # owns the code
        self._engine.finalize_object()
        self._call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)(self._engine.get_function_address("f"))

    def __call__(self, *args: int) -> None:
        self._call(*args)
