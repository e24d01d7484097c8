"""All-reduce of activations in compiled code: MPI and shared memory without Python in between.

An exchange leaves its result as a `source`, four integers: the address of the first payload, how many payloads are to
be added, the bytes from one to the next, and the bytes of 32 values in them. Adding them, in that order, is left to
whoever needs the sum, who reads every value only once. All ranks see the same bytes and so get the same sums.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import carray, cfunc, njit, types

from ...kernels.simd import address
from .link import (
    AHEAD,
    AHEAD_BYTES,
    CALLBACK,
    FIELDS,
    FINISH,
    FLAGS,
    HOSTS,
    JOB_FIELDS,
    JOBS,
    LEADER,
    LEADERS,
    LOCAL,
    LOCALS,
    MINE,
    OVERLAPS,
    PATIENCE,
    QUEUE,
    RANK,
    SHARED_THEIRS,
    SIZE,
    SLEEP,
    SLOT_BYTES,
    SLOTS,
    START,
    THEIRS,
    THEIRS_STRIDE,
    TURNS,
    VALUES,
    WAITED,
    WAY_PAIRS,
    WAYS,
    WIDTH,
    await_value,
    call,
    finish_messages,
    integers,
    load,
    now,
    receive,
    send,
    store,
)
from .payload import F32_BYTES, add_blocks, encode_blocks, sum_blocks

NOTHING, DIRECT, SCATTER, DOUBLING, SHARED, TWO_LEVEL, CALL = range(7)  # algorithms
_FLAG_BYTES = 64  # a cache line for each flag


# ---- the algorithms among `count` ranks, of which this is number `me`; ranks: address of their int64 numbers


@njit(cache=True, nogil=True, inline="never")
def _direct(link, ranks, me, count, x, blocks, theirs, source):
    """Send the whole payload to every other rank: one hop, (count - 1) payloads each way."""
    width = link[WIDTH]
    size = blocks * width
    mine = theirs + me * size
    for k in range(1, count):
        peer = (me + count - k) % count
        receive(link, k - 1, theirs + peer * size, size, load(ranks + 8 * peer))
    encode_blocks(x, mine, blocks, width)
    for k in range(1, count):
        send(link, count + k - 2, mine, size, load(ranks + 8 * ((me + k) % count)))
    finish_messages(link, 2 * (count - 1))
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
            receive(link, requests, pieces + peer * own, own, load(ranks + 8 * peer))
            requests += 1
    encode_blocks(x, mine, blocks, width)
    for k in range(1, count):
        peer = (me + k) % count
        start, stop = blocks * peer // count, blocks * (peer + 1) // count
        if stop > start:
            send(link, requests, mine + start * width, (stop - start) * width, load(ranks + 8 * peer))
            requests += 1
    finish_messages(link, requests)
    requests = 0
    for k in range(1, count):
        peer = (me + count - k) % count
        start, stop = blocks * peer // count, blocks * (peer + 1) // count
        if stop > start:
            receive(link, requests, theirs + start * width, (stop - start) * width, load(ranks + 8 * peer))
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
            send(link, requests, theirs + first * width, own, load(ranks + 8 * ((me + k) % count)))
            requests += 1
    finish_messages(link, requests)
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
        partner = load(ranks + 8 * (me - power))
        encode_blocks(x, link[MINE], blocks, width)
        send(link, 0, link[MINE], size, partner)
        receive(link, 1, theirs, 2 * size, partner)
        finish_messages(link, 2)
        return
    values = x
    if me + power < count:
        receive(link, 0, theirs + size, size, load(ranks + 8 * (me + power)))
        encode_blocks(x, theirs, blocks, width)
        finish_messages(link, 1)
        sum_blocks(total, theirs, 2, size, blocks, width)
        values = total
    distance = 1
    while distance < power:
        partner = me ^ distance
        place = 0 if me < partner else 1
        receive(link, 0, theirs + (1 - place) * size, size, load(ranks + 8 * partner))
        encode_blocks(values, theirs + place * size, blocks, width)
        send(link, 1, theirs + place * size, size, load(ranks + 8 * partner))
        finish_messages(link, 2)
        distance *= 2
        if distance < power:
            sum_blocks(total, theirs, 2, size, blocks, width)
            values = total
    if me + power < count:
        send(link, 0, theirs, 2 * size, load(ranks + 8 * (me + power)))
        finish_messages(link, 1)


@njit(cache=True, nogil=True, inline="never")
def _shared(link, x, part, source):
    """Read the values of all ranks of this host where they wrote them: no message, no copy."""
    turn = link[TURNS + part]
    store(link[FLAGS] + _FLAG_BYTES * (part * (link[LOCALS] + 1) + link[LOCAL]), turn)
    for k in range(link[LOCALS]):
        await_value(link, link[FLAGS] + _FLAG_BYTES * (part * (link[LOCALS] + 1) + k), turn)
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
        store(arrived + _FLAG_BYTES * link[LOCAL], turn)
        await_value(link, ready, turn)
        source[0], source[1] = theirs, hosts if direct else 1
        source[2], source[3] = blocks * width if direct else 0, width
        return
    total = x
    if link[LOCALS] > 1:
        for k in range(1, link[LOCALS]):
            await_value(link, arrived + _FLAG_BYTES * k, turn)
        # Nobody else reads this rank's values, so the sum may take their place.
        for k in range(1, link[LOCALS]):
            add_blocks(total, x + k * link[SLOT_BYTES], blocks, F32_BYTES)
    if direct:
        _direct(link, link[LEADERS], link[LEADER], hosts, total, blocks, theirs, source)
    else:
        _scatter(link, link[LEADERS], link[LEADER], hosts, total, blocks, theirs, source)
    store(ready, turn)


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
            call(link[CALLBACK], (x, blocks))
        source[0], source[1], source[2], source[3] = x, 1, 0, F32_BYTES


@njit(cache=True, nogil=True, inline="always")
def _way_for(link, blocks):
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
        call(link[START], (address(link), x, blocks, part, address(source)))


@njit(cache=True, nogil=True, inline="always")
def finish_exchange(link, source):
    """Wait until the source of an exchange that was started is there."""
    if link[OVERLAPS] != 0:
        call(link[FINISH], (address(link), address(source)))


def _start(link_at, x, blocks, part, source_at):
    link, source = carray(integers(link_at), (FIELDS,)), carray(integers(source_at), (4,))
    if link[OVERLAPS] == 0:
        begun = now(link)
        exchange(link, _way_for(link, blocks), x, blocks, part, source)
        link[WAITED] += now(link) - begun
        return np.int32(0)
    queue = link[JOBS]
    number = load(queue)
    job = queue + 16 + 8 * JOB_FIELDS * (number % QUEUE)
    store(job, x)
    store(job + 8, blocks)
    store(job + 16, part)
    store(job + 24, source_at)
    source[1] = -(number + 1)  # until then it has no number of payloads
    store(queue, number + 1)
    return np.int32(0)


def _finish(link_at, source_at):
    link = carray(integers(link_at), (FIELDS,))
    number = -load(source_at + 8)
    if number <= 0:
        return np.int32(0)
    begun, turn = now(link), 0
    while load(link[JOBS] + 8) < number:
        if turn < 200:
            turn += 1
        else:  # the other thread may need this processor
            call(link[SLEEP], (np.int64(50),))
    link[WAITED] += now(link) - begun
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
        number = load(queue + 8)
        while load(queue) <= number:
            call(own[SLEEP], (own[PATIENCE],))
        job = queue + 16 + 8 * JOB_FIELDS * (number % QUEUE)
        x, blocks, part, target = load(job), load(job + 8), load(job + 16), load(job + 24)
        if x == 0:
            store(queue + 8, number + 1)
            return
        call(own[START], (address(own), x, blocks, part, address(source)))
        for i in (0, 2, 3, 1):  # the number of payloads last: it says that the others are there
            store(target + 8 * i, source[i])
        store(queue + 8, number + 1)


@njit(cache=True, nogil=True)
def end_exchanges(link):
    """Tell the other thread that this step has no more exchanges."""
    queue = link[JOBS]
    number = load(queue)
    store(queue + 16 + 8 * JOB_FIELDS * (number % QUEUE), 0)
    store(queue, number + 1)


@njit(cache=True, nogil=True)
def time_exchange(link, x, blocks, payload, turns, source, times):
    """Write the nanoseconds of exchanges of values at address x, each with computing: `turns` encodings to payload.

    With a thread that takes exchanges these run while the computing goes on, else before it.
    """
    for i in range(times.size):
        begun = now(link)
        call(link[START], (address(link), x, blocks, np.int64(0), address(source)))
        for _ in range(turns):
            encode_blocks(x, payload, blocks, F32_BYTES)
        if link[OVERLAPS] != 0:
            call(link[FINISH], (address(link), address(source)))
        times[i] = now(link) - begun


@njit(cache=True, nogil=True)
def all_reduce(link, x, blocks, out):
    """Write the sum over all ranks of float32 values at address x to address out."""
    source = np.zeros(4, np.int64)
    call(link[START], (address(link), x, blocks, np.int64(0), address(source)))
    sum_blocks(out, source[0], source[1], source[2], blocks, source[3])
