"""Compile what emitters emit for any processor LLVM knows, without Numba: to read its assembly or to call it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir

from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.kernels.matmul import emit_float_tile_row, emit_quantised_tile_row
from dllama_mpi.kernels.simd import (
    F32,
    I8,
    I32,
    I64,
    Emitter,
    vector,
)

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


def tile_row(emitter: type[Emitter], fmt: str, tokens: int) -> ir.Module:
    """Return the kernel for one row of tiles of a format and a number of tokens."""
    if FORMATS[fmt].quantised_activations:
        return emitted(7, lambda b, *args: emit_quantised_tile_row(emitter(b), FORMATS[fmt], tokens, *args))
    return emitted(6, lambda b, *args: emit_float_tile_row(emitter(b), FORMATS[fmt], tokens, *args))


def dot4(emitter: type[Emitter], lanes: int) -> ir.Module:
    """Return f(total, weights, x), which adds the dot products of `lanes` * 4 bytes to `lanes` int32."""

    def body(builder, total, weights, x):
        e = emitter(builder)
        operands = [e.load(address, vector(I8, 4 * lanes), 1) for address in (weights, x)]
        e.store(e.dot4(e.load(total, vector(I32, lanes), 4), *operands), total, 4)

    return emitted(3, body)


def exp(emitter: type[Emitter], lanes: int) -> ir.Module:
    """Return f(x, y, n), which writes e**x of n vectors of float32 to y."""

    def body(builder, x, y, n):
        e = emitter(builder)

        def one(i, state):
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
