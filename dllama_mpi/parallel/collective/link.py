"""The link: what compiled code must know to exchange with other ranks, and its calls of MPI and the C library.

A link is one int64 array, made by `parallel.allreduce`; its fields are the constants below. Functions are called by
their addresses. MPI's handles, which are 32-bit integers with some libraries and pointers with others, are passed as
64-bit integers: the calling conventions of x86-64 and AArch64 let a function that wants 32 bits ignore the rest, in
registers and, on little-endian machines, on the stack.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...kernels.simd import I8, I32, I64

RANK, SIZE = 0, 1
WIDTH = 2  # bytes of 32 values in messages
ISEND, IRECV, TESTALL, COMMUNICATOR, BYTE, REQUEST_BYTES = 4, 5, 6, 7, 8, 9
YIELD, SLEEP, CLOCK, CLOCK_KIND = 10, 11, 12, 13  # addresses of sched_yield, usleep and clock_gettime; which clock
REQUESTS, STATUSES, SCRATCH = 14, 15, 16  # memory for MPI's requests and statuses; some words of ours
CALLBACK = 17  # address of a function (address of values, blocks) that sums over ranks in place
VALUES = 18  # float32 scratch for one part of the activations
MINE = 19  # payload scratch for one part
THEIRS = 20  # payload memory for results, one part after the other
THEIRS_STRIDE = 21
LEADERS, LEADER, HOSTS = 22, 23, 24  # first rank of each host, this host's place among them, their number
LOCAL, LOCALS = 25, 26  # this rank's place among those of its host, and their number
FLAGS, SLOTS, SLOT_BYTES, SHARED_THEIRS = 27, 28, 29, 30  # in memory that the ranks of a host share
SENT, RECEIVED, WAITED = 31, 32, 33  # bytes, and nanoseconds that the calling rank waited
AHEAD, AHEAD_BYTES = 34, 35  # memory to be read next: fetched into the cache while waiting
PATIENCE = 36  # microseconds of sleep between looks at the network, where another thread is computing; else 0
TURNS = 37  # number of exchanges of each part so far: PARTS fields
PARTS = 2  # parts of a step that may be in flight at once
JOBS, OVERLAPS = 39, 40  # memory of the queue, and whether another thread takes exchanges from it
START, FINISH = 41, 42  # addresses of `layer_calls`
WAYS = 43  # pairs (most blocks, way), ascending: which algorithm for which size
WAY_PAIRS = 6
FIELDS = WAYS + 2 * WAY_PAIRS

JOB_FIELDS = 4  # of a queued exchange: address of values, blocks, part, and where its source goes
QUEUE = 8

_TAG = 7
_POLLS_BEFORE_YIELD, _POLLS_BEFORE_SLEEP = 256, 4096  # some microseconds, and a few milliseconds
_PREFETCH_AT_ONCE = 4096
_PREFETCH_BYTES = 1 << 18  # at most: what surely fits into a core's cache


@intrinsic
def call(typingctx, function, arguments):
    """Call a C function by its address with integers, and return its int."""

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
def _prefetch(typingctx, address):
    """Ask for the cache line at an address."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        ty = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, ty, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, I32(0), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@njit(cache=True, nogil=True, inline="never")
def now(link):
    """Return the time in nanoseconds."""
    at = link[SCRATCH]
    call(link[CLOCK], (link[CLOCK_KIND], at))
    return 1_000_000_000 * load(at) + load(at + 8)


@njit(cache=True, nogil=True, inline="never")
def _pause(link, turn):
    """Spend the time between two looks at something: let others run, sooner or later."""
    if link[PATIENCE] != 0:
        call(link[SLEEP], (link[PATIENCE],))
    elif turn >= _POLLS_BEFORE_SLEEP:
        call(link[SLEEP], (np.int64(50),))
    elif turn >= _POLLS_BEFORE_YIELD:
        call(link[YIELD], (np.int64(0),))


@njit(cache=True, nogil=True, inline="never")
def _fetch_ahead(link, turn):
    start, stop = turn * _PREFETCH_AT_ONCE, min(link[AHEAD_BYTES], _PREFETCH_BYTES)
    if start < stop:
        for line in range(start, min(start + _PREFETCH_AT_ONCE, stop), 64):
            _prefetch(link[AHEAD] + line)


@njit(cache=True, nogil=True, inline="never")
def receive(link, request, address, size, rank):
    link[RECEIVED] += size
    at = link[REQUESTS] + request * link[REQUEST_BYTES]
    call(link[IRECV], (address, size, link[BYTE], rank, np.int64(_TAG), link[COMMUNICATOR], at))


@njit(cache=True, nogil=True, inline="never")
def send(link, request, address, size, rank):
    link[SENT] += size
    at = link[REQUESTS] + request * link[REQUEST_BYTES]
    call(link[ISEND], (address, size, link[BYTE], rank, np.int64(_TAG), link[COMMUNICATOR], at))


@njit(cache=True, nogil=True, inline="never")
def finish_messages(link, count):
    """Wait until so many requests are done."""
    done, turn = link[SCRATCH] + 16, 0
    store(done, 0)
    while True:
        call(link[TESTALL], (count, link[REQUESTS], done, link[STATUSES]))
        if load(done) & 0xFFFFFFFF:
            return
        _fetch_ahead(link, turn)
        _pause(link, turn)
        turn += 1


@njit(cache=True, nogil=True, inline="never")
def await_value(link, address, value):
    """Wait until a counter in shared memory has reached a value."""
    turn = 0
    while load(address) < value:
        _pause(link, turn)
        turn += 1
