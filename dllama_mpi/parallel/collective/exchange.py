"""Exchanges as compiled layers see them: start one, compute, later wait for its result.

The caller writes this rank's terms of a sum into its half of `AllReduce.values`, starts an exchange of them, and adds
up what the source says once the exchange is finished. Here, and nowhere else in a step, do ranks talk to each other.
What is called goes by address, so that one rank alone does not compile what it never needs, and the layers are not
compiled together with it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numba import carray, cfunc, njit, types

from ...kernels.compiled import entry
from ...kernels.simd import address
from .algorithms import exchange, set_source
from .intrinsics import address_of, call, integers, load, store
from .link import EXACT, JOB, QUEUED, SIZES, job_at, link_at
from .messages import now
from .payload import F32_BYTES, encode_blocks, sum_blocks

_JOB_BYTES = JOB.itemsize
_POLLS_BEFORE_SLEEP = 200


class Ahead(NamedTuple):
    """Memory that will be read after an exchange, fetched into the cache while waiting; address and size in bytes."""

    address: int
    size: int


@njit(cache=True, nogil=True, inline="always")
def start_exchange(link, x, blocks, part, how, source, ahead):
    """Begin to sum so many blocks of 32 float32 at address x over all ranks.

    Every rank starts the same exchanges in the same order. Without another thread this one does all of it, now; with
    one it goes on computing.

    link: a record, see `link`. x: in `AllReduce.values`, where its docstring says; the exchange may change what stands
    there. part: which of the parts of a step, 0 to PARTS - 1; each has memory of its own, so that its result stays
    until its next exchange is started, and one exchange in flight. how: TERMS, EXACT (send float32 whatever the payload
    is; then at most as many blocks as the part has rows) or LAST of a step. source: (4,) int64, for `finish_exchange`.
    ahead: an `Ahead`.
    """
    set_source(source, x, 1, 0, F32_BYTES)
    if link.ranks > 1:
        link.ahead, link.ahead_bytes = ahead.address, ahead.size
        call(link.start, (address_of(link), x, blocks, part, np.int64(how), address(source)))


@njit(cache=True, nogil=True, inline="always")
def finish_exchange(link, source):
    """Wait until an exchange that was started is done: source (see `algorithms`) then tells where its result is."""
    if link.overlaps != 0:
        call(link.finish, (address_of(link), address(source)))


@njit(cache=True, nogil=True, inline="always")
def _algorithm_for(link, blocks, how):
    """Return the number of the algorithm for a message of so many blocks."""
    if how == EXACT:  # as many blocks of payload as are as long
        blocks = blocks * F32_BYTES // link.width
    size = 0
    while size < SIZES - 1 and blocks > link.most_blocks[size]:
        size += 1
    return link.algorithms[size]


def _start(link_address, x, blocks, part, how, source_address):
    link = link_at(link_address)
    if link.overlaps == 0:
        begun = now(link)
        source = carray(integers(source_address), (4,))
        exchange(link, _algorithm_for(link, blocks, how), x, blocks, part, how, source)
        link.waited += now(link) - begun
        return np.int32(0)
    number = load(link.queued)
    job = job_at(link.queue + _JOB_BYTES * (number % QUEUED))
    job.values, job.blocks, job.part, job.how, job.source = x, blocks, part, how, source_address
    store(source_address + 8, -(number + 1))  # until it is done it has no number of payloads
    store(link.queued, number + 1)
    return np.int32(0)


def _finish(link_address, source_address):
    link = link_at(link_address)
    number = -load(source_address + 8)
    if number <= 0:
        return np.int32(0)
    begun, polls = now(link), 0
    while load(link.carried_out) < number:
        if polls < _POLLS_BEFORE_SLEEP:
            polls += 1
        else:  # the other thread may need this processor
            call(link.usleep, (np.int64(50),))
    link.waited += now(link) - begun
    return np.int32(0)


@functools.cache
def layer_calls() -> tuple:
    """Return what `start_exchange` and `finish_exchange` call, compiled; their `address` goes into a link."""
    whole = types.int64
    return (
        cfunc(types.int32(whole, whole, whole, whole, whole, whole), cache=True, nopython=True)(_start),
        cfunc(types.int32(whole, whole), cache=True, nopython=True)(_finish),
    )


@entry
def carry_out_exchanges(link, own):
    """Carry out queued exchanges until one has no values: what the other thread does during a step.

    own: a copy of the link for this thread, whose counters are added to the link's at the end.
    """
    source = np.zeros(4, np.int64)
    while True:
        number = load(link.carried_out)
        while load(link.queued) <= number:
            call(own.usleep, (own.patience,))
        job = job_at(link.queue + _JOB_BYTES * (number % QUEUED))
        if job.values == 0:
            store(link.carried_out, number + 1)
            return
        call(own.start, (address_of(own), job.values, job.blocks, job.part, job.how, address(source)))
        for i in (0, 2, 3, 1):  # the number of payloads last: it says that the others are there
            store(job.source + 8 * i, source[i])
        store(link.carried_out, number + 1)


@entry
def end_exchanges(link):
    """Tell the other thread that this step has no more exchanges."""
    number = load(link.queued)
    job_at(link.queue + _JOB_BYTES * (number % QUEUED)).values = 0
    store(link.queued, number + 1)


@entry
def time_exchange(link, x, blocks, payload, encodings, times):
    """Write the nanoseconds of exchanges of values at address x, each with computing: so many encodings to payload.

    With a thread that takes exchanges these run while the computing goes on, else before it.
    """
    source = np.zeros(4, np.int64)
    for i in range(times.size):
        begun = now(link)
        call(link.start, (address_of(link), x, blocks, np.int64(0), np.int64(0), address(source)))
        for _ in range(encodings):
            encode_blocks(x, payload, blocks, F32_BYTES)
        if link.overlaps != 0:
            call(link.finish, (address_of(link), address(source)))
        times[i] = now(link) - begun


@entry
def all_reduce(link, x, blocks, how, out):
    """Write the sum over all ranks of float32 values at address x to address out. how: see `start_exchange`."""
    source = np.zeros(4, np.int64)
    call(link.start, (address_of(link), x, blocks, np.int64(0), np.int64(how), address(source)))
    sum_blocks(out, source[0], source[1], source[2], blocks, source[3])
