"""All-reduce of activations in compiled code: MPI and shared memory without Python in between.

An exchange leaves its result as a `source`, four integers: the address of the first payload, how many payloads are to
be added, the bytes from one to the next, and the bytes of 32 values in them. Adding them, in that order, is left to
whoever needs the sum, who reads every value only once. All ranks see the same bytes and so get the same sums.

What an exchange needs to know stands in one int64 array, the link, made by `parallel.allreduce`; its fields are the
constants below. MPI is called by its functions' addresses. Handles, which are 32-bit integers with some MPI libraries
and pointers with others, are passed as 64-bit integers: the calling conventions of x86-64 and AArch64 let a function
that wants 32 bits ignore the rest. That holds for up to six arguments in registers, and on little-endian machines for
those on the stack.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .payload import F32_BYTES, add_blocks, encode_blocks, sum_blocks
from .simd import I8, I32, I64, address

# ---- fields of a link

RANK, SIZE = 0, 1
WIDTH = 2  # bytes of 32 values in messages
ROW_BLOCKS = 3  # blocks of 32 values in a row of activations
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
PATIENT = 36  # whether to sleep between looks at the network: another thread is computing
TURNS = 37  # number of exchanges of each part so far: PARTS fields
PARTS = 2  # parts of a step that may be in flight at once
JOBS, OVERLAPS = 39, 40  # memory of the queue, and whether another thread takes exchanges from it
START, FINISH = 41, 42  # addresses of `layer_calls`
WAYS = 43  # pairs (most blocks, way), ascending: which algorithm for which size
WAY_PAIRS = 6
FIELDS = WAYS + 2 * WAY_PAIRS

# ---- algorithms

NOTHING, DIRECT, SCATTER, DOUBLING, SHARED, TWO_LEVEL, CALL = range(7)

_TAG = 7
_FLAG_BYTES = 64  # a cache line for each flag
_POLLS_BEFORE_YIELD = 64
_PREFETCH_AT_ONCE = 4096
JOB_FIELDS = 4  # of a queued exchange: address of values, blocks, part, and its place in time
QUEUE = 8


@intrinsic
def _call(typingctx, function, arguments):
    """Call a C function by its address with integers, and return its int."""

    def codegen(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        ty = ir.FunctionType(I32, [I64] * len(values))
        return builder.call(builder.inttoptr(args[0], ty.as_pointer()), values)

    return types.int32(types.int64, arguments), codegen


@intrinsic
def _integers(typingctx, address):
    """Return a pointer to int64 from an address."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def _load(typingctx, address):
    """Load an int64, seeing all that was written before it was stored."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(typingctx, address, value):
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
def _now(link):
    """Return the time in nanoseconds."""
    at = link[SCRATCH]
    _call(link[CLOCK], (link[CLOCK_KIND], at))
    return 1_000_000_000 * _load(at) + _load(at + 8)


@njit(cache=True, nogil=True, inline="never")
def _pause(link, turn):
    """Spend the time between two looks at something: let others run, sooner or later."""
    if link[PATIENT] != 0:
        _call(link[SLEEP], (np.int64(20),))
    elif turn % _POLLS_BEFORE_YIELD == _POLLS_BEFORE_YIELD - 1:
        _call(link[YIELD], (np.int64(0),))


@njit(cache=True, nogil=True, inline="never")
def _fetch_ahead(link, turn):
    start = turn * _PREFETCH_AT_ONCE
    if start < link[AHEAD_BYTES]:
        for line in range(start, min(start + _PREFETCH_AT_ONCE, link[AHEAD_BYTES]), 64):
            _prefetch(link[AHEAD] + line)


@njit(cache=True, nogil=True, inline="never")
def _receive(link, request, address, size, rank):
    link[RECEIVED] += size
    at = link[REQUESTS] + request * link[REQUEST_BYTES]
    _call(link[IRECV], (address, size, link[BYTE], rank, np.int64(_TAG), link[COMMUNICATOR], at))


@njit(cache=True, nogil=True, inline="never")
def _send(link, request, address, size, rank):
    link[SENT] += size
    at = link[REQUESTS] + request * link[REQUEST_BYTES]
    _call(link[ISEND], (address, size, link[BYTE], rank, np.int64(_TAG), link[COMMUNICATOR], at))


@njit(cache=True, nogil=True, inline="never")
def _finish_messages(link, count):
    """Wait until so many requests are done."""
    done, turn = link[SCRATCH] + 16, 0
    _store(done, 0)
    while True:
        _call(link[TESTALL], (count, link[REQUESTS], done, link[STATUSES]))
        if _load(done) & 0xFFFFFFFF:
            return
        _fetch_ahead(link, turn)
        _pause(link, turn)
        turn += 1


@njit(cache=True, nogil=True, inline="never")
def _await(link, address, value):
    """Wait until a counter in shared memory has reached a value."""
    turn = 0
    while _load(address) < value:
        _pause(link, turn)
        turn += 1


# ---- the algorithms among `count` ranks, of which this is number `me`; ranks: address of their int64 numbers


@njit(cache=True, nogil=True, inline="never")
def _direct(link, ranks, me, count, x, blocks, theirs, source):
    """Send the whole payload to every other rank: one hop, (count - 1) payloads each way."""
    width = link[WIDTH]
    size = blocks * width
    mine = theirs + me * size
    for k in range(1, count):
        peer = (me + count - k) % count
        _receive(link, k - 1, theirs + peer * size, size, _load(ranks + 8 * peer))
    encode_blocks(x, mine, blocks, width)
    for k in range(1, count):
        _send(link, count + k - 2, mine, size, _load(ranks + 8 * ((me + k) % count)))
    _finish_messages(link, 2 * (count - 1))
    source[0], source[1], source[2], source[3] = theirs, count, size, width


@njit(cache=True, nogil=True, inline="never")
def _scatter(link, ranks, me, count, x, blocks, theirs, source):
    """Sum one part on each rank and send the sum to all: two hops, 2 * (count - 1) / count payloads each way."""
    width, mine = link[WIDTH], link[MINE]
    first, last = blocks * me // count, blocks * (me + 1) // count
    own = (last - first) * width
    pieces = theirs + blocks * width  # after the result
    requests = 0
    for k in range(1, count):
        peer = (me + count - k) % count
        if own > 0:
            _receive(link, requests, pieces + peer * own, own, _load(ranks + 8 * peer))
            requests += 1
    encode_blocks(x, mine, blocks, width)
    for k in range(1, count):
        peer = (me + k) % count
        start, stop = blocks * peer // count, blocks * (peer + 1) // count
        if stop > start:
            _send(link, requests, mine + start * width, (stop - start) * width, _load(ranks + 8 * peer))
            requests += 1
    _finish_messages(link, requests)
    requests = 0
    for k in range(1, count):
        peer = (me + count - k) % count
        start, stop = blocks * peer // count, blocks * (peer + 1) // count
        if stop > start:
            _receive(link, requests, theirs + start * width, (stop - start) * width, _load(ranks + 8 * peer))
            requests += 1
    if own > 0:
        total = link[VALUES]
        for k in range(count):
            if k == 0:
                sum_blocks(total, pieces, 0, 0, last - first, width)  # zeros
            piece = mine + first * width if k == me else pieces + k * own
            add_blocks(total, piece, last - first, width)
        encode_blocks(total, theirs + first * width, last - first, width)
        for k in range(1, count):
            _send(link, requests, theirs + first * width, own, _load(ranks + 8 * ((me + k) % count)))
            requests += 1
    _finish_messages(link, requests)
    source[0], source[1], source[2], source[3] = theirs, 1, 0, width


@njit(cache=True, nogil=True, inline="never")
def _doubling(link, ranks, me, count, x, blocks, theirs, source):
    """Swap sums with a partner at distance 1, 2, 4...: log2(count) hops of one payload.

    Ranks beyond the largest power of two hand theirs to a partner first, and get the last round's payloads from it.
    """
    width, total = link[WIDTH], link[VALUES]
    size, power = blocks * width, 1
    while 2 * power <= count:
        power *= 2
    source[0], source[1], source[2], source[3] = theirs, 2, size, width
    if me >= power:
        partner = _load(ranks + 8 * (me - power))
        encode_blocks(x, link[MINE], blocks, width)
        _send(link, 0, link[MINE], size, partner)
        _receive(link, 1, theirs, 2 * size, partner)
        _finish_messages(link, 2)
        return
    values = x
    if me + power < count:
        _receive(link, 0, theirs + size, size, _load(ranks + 8 * (me + power)))
        encode_blocks(x, theirs, blocks, width)
        _finish_messages(link, 1)
        sum_blocks(total, theirs, 2, size, blocks, width)
        values = total
    distance = 1
    while distance < power:
        partner = me ^ distance
        place = 0 if me < partner else 1
        _receive(link, 0, theirs + (1 - place) * size, size, _load(ranks + 8 * partner))
        encode_blocks(values, theirs + place * size, blocks, width)
        _send(link, 1, theirs + place * size, size, _load(ranks + 8 * partner))
        _finish_messages(link, 2)
        distance *= 2
        if distance < power:
            sum_blocks(total, theirs, 2, size, blocks, width)
            values = total
    if me + power < count:
        _send(link, 0, theirs, 2 * size, _load(ranks + 8 * (me + power)))
        _finish_messages(link, 1)


@njit(cache=True, nogil=True, inline="never")
def _shared(link, x, part, source):
    """Read the values of all ranks of this host where they wrote them: no message, no copy."""
    turn = link[TURNS + part]
    _store(link[FLAGS] + _FLAG_BYTES * (part * (link[LOCALS] + 1) + link[LOCAL]), turn)
    for k in range(link[LOCALS]):
        _await(link, link[FLAGS] + _FLAG_BYTES * (part * (link[LOCALS] + 1) + k), turn)
    offset = x - (link[SLOTS] + link[LOCAL] * link[SLOT_BYTES])
    source[0], source[1], source[2], source[3] = link[SLOTS] + offset, link[LOCALS], link[SLOT_BYTES], F32_BYTES


@njit(cache=True, nogil=True, inline="never")
def _two_level(link, x, blocks, part, source):
    """Sum the values of a host in shared memory, exchange the sums between the first ranks of the hosts.

    The payloads are received into shared memory, where the other ranks of the host read them.
    """
    turn, hosts, width = link[TURNS + part], link[HOSTS], link[WIDTH]
    theirs = link[SHARED_THEIRS] + part * link[THEIRS_STRIDE]
    arrived = link[FLAGS] + _FLAG_BYTES * part * (link[LOCALS] + 1)
    ready = arrived + _FLAG_BYTES * link[LOCALS]
    direct = hosts == 2 or blocks * width * (hosts - 1) <= 8192  # then a second hop costs more than it saves
    if link[LOCAL] != 0:
        _store(arrived + _FLAG_BYTES * link[LOCAL], turn)
        _await(link, ready, turn)
        source[0], source[1] = theirs, hosts if direct else 1
        source[2], source[3] = blocks * width if direct else 0, width
        return
    total = x
    if link[LOCALS] > 1:
        for k in range(1, link[LOCALS]):
            _await(link, arrived + _FLAG_BYTES * k, turn)
        # Nobody else reads this rank's values, so the sum may take their place.
        for k in range(1, link[LOCALS]):
            add_blocks(total, x + k * link[SLOT_BYTES], blocks, F32_BYTES)
    if direct:
        _direct(link, link[LEADERS], link[LEADER], hosts, total, blocks, theirs, source)
    else:
        _scatter(link, link[LEADERS], link[LEADER], hosts, total, blocks, theirs, source)
    _store(ready, turn)


@njit(cache=True, nogil=True, inline="never")
def exchange(link, way, x, blocks, part, source):
    """Exchange so many blocks of float32 values at address x with all ranks; fill in the source of their sum.

    x: for shared memory in this rank's slot. part: which of the parts in flight, each with memory of its own.
    """
    link[TURNS + part] += 1
    theirs = link[THEIRS] + part * link[THEIRS_STRIDE]
    ranks, me, count = link[LEADERS] + 8 * link[HOSTS], link[RANK], link[SIZE]
    if way == SHARED:
        _shared(link, x, part, source)
    elif way == DIRECT:
        _direct(link, ranks, me, count, x, blocks, theirs, source)
    elif way == SCATTER:
        _scatter(link, ranks, me, count, x, blocks, theirs, source)
    elif way == DOUBLING:
        _doubling(link, ranks, me, count, x, blocks, theirs, source)
    elif way == TWO_LEVEL:
        _two_level(link, x, blocks, part, source)
    else:
        if way == CALL:
            _call(link[CALLBACK], (x, blocks))
        source[0], source[1], source[2], source[3] = x, 1, 0, F32_BYTES


@njit(cache=True, nogil=True)
def way_for(link, blocks):
    """Return the algorithm for a message of so many blocks."""
    way = link[WAYS + 1]
    for pair in range(1, WAY_PAIRS):
        if blocks > link[WAYS + 2 * pair - 2]:
            way = link[WAYS + 2 * pair + 1]
    return way


# ---- what the layers call: start an exchange, later wait for its result. Called by address, so that one rank alone
# does not compile what it never needs, and the layers are not compiled together with it.


@njit(cache=True, nogil=True, inline="always")
def start_exchange(link, x, blocks, part, source, ahead, ahead_bytes):
    """Begin an exchange of values at address x; another thread carries it out if the link has one.

    ahead, ahead_bytes: memory that will be read after it.
    """
    source[0], source[1], source[2], source[3] = x, 1, 0, F32_BYTES
    if link[SIZE] > 1:
        link[AHEAD], link[AHEAD_BYTES] = ahead, ahead_bytes
        _call(link[START], (address(link), x, blocks, part, address(source)))


@njit(cache=True, nogil=True, inline="always")
def finish_exchange(link, source):
    """Wait until the source of an exchange that was started is there."""
    if link[OVERLAPS] != 0:
        _call(link[FINISH], (address(link), address(source)))


def _start(link_at, x, blocks, part, source_at):
    link, source = carray(_integers(link_at), (FIELDS,)), carray(_integers(source_at), (4,))
    if link[OVERLAPS] == 0:
        begun = _now(link)
        exchange(link, way_for(link, blocks), x, blocks, part, source)
        link[WAITED] += _now(link) - begun
        return np.int32(0)
    queue = link[JOBS]
    number = _load(queue)
    job = queue + 16 + 8 * JOB_FIELDS * (number % QUEUE)
    _store(job, x)
    _store(job + 8, blocks)
    _store(job + 16, part)
    _store(job + 24, source_at)
    source[1] = -(number + 1)  # until then it has no number of payloads
    _store(queue, number + 1)
    return np.int32(0)


def _finish(link_at, source_at):
    link = carray(_integers(link_at), (FIELDS,))
    number = -_load(source_at + 8)
    if number <= 0:
        return np.int32(0)
    begun, turn = _now(link), 0
    while _load(link[JOBS] + 8) < number:
        if turn < 200:
            turn += 1
        else:  # the other thread may need this processor
            _call(link[SLEEP], (np.int64(20),))
    link[WAITED] += _now(link) - begun
    return np.int32(0)


@functools.cache
def layer_calls() -> tuple:
    """Return what `start_exchange` and `finish_exchange` call, compiled; their `address` goes into a link."""
    whole = types.int64
    return (
        cfunc(types.int32(whole, whole, whole, whole, whole), cache=True, nopython=True)(_start),
        cfunc(types.int32(whole, whole), cache=True, nopython=True)(_finish),
    )


@njit(cache=True, nogil=True)
def carry_out_exchanges(link, own):
    """Carry out queued exchanges until one has no values: what the other thread does during a step.

    own: a copy of the link for this thread, whose counters are added to the link's at the end.
    """
    queue, source = link[JOBS], np.zeros(4, np.int64)
    while True:
        number = _load(queue + 8)
        while _load(queue) <= number:
            _call(own[SLEEP], (np.int64(20),))
        job = queue + 16 + 8 * JOB_FIELDS * (number % QUEUE)
        x, blocks, part, target = _load(job), _load(job + 8), _load(job + 16), _load(job + 24)
        if x == 0:
            _store(queue + 8, number + 1)
            return
        exchange(own, way_for(own, blocks), x, blocks, part, source)
        for i in range(4):
            _store(target + 8 * i, source[i])
        _store(queue + 8, number + 1)


@njit(cache=True, nogil=True)
def end_exchanges(link):
    """Tell the other thread that this step has no more exchanges."""
    queue = link[JOBS]
    number = _load(queue)
    _store(queue + 16 + 8 * JOB_FIELDS * (number % QUEUE), 0)
    _store(queue, number + 1)


@njit(cache=True, nogil=True)
def time_exchange(link, way, x, blocks, times):
    """Carry out an exchange repeatedly; write the nanoseconds that each took."""
    source = np.zeros(4, np.int64)
    for i in range(times.size):
        begun = _now(link)
        exchange(link, way, x, blocks, 0, source)
        times[i] = _now(link) - begun


@njit(cache=True, nogil=True)
def all_reduce(link, way, x, blocks, out):
    """Write the sum over all ranks of float32 values at address x to address out."""
    source = np.zeros(4, np.int64)
    exchange(link, way, x, blocks, 0, source)
    sum_blocks(out, source[0], source[1], source[2], blocks, source[3])
