"""Messages between ranks, and waiting for them: MPI's calls, and counters in shared memory, from compiled code."""

from __future__ import annotations

import numpy as np

from ...kernels.compiled import inner
from ..tags import Tag
from .intrinsics import call, load, prefetch, store

_TAG = int(Tag.EXCHANGE)
_POLLS_BEFORE_YIELD, _POLLS_BEFORE_SLEEP = 256, 4096  # some microseconds, and a few milliseconds
_PREFETCH_AT_ONCE = 4096
_PREFETCH_BYTES = 1 << 18  # at most: what surely fits into a core's cache


@inner
def now(link):
    """Return the time in nanoseconds."""
    time = link.scratch
    call(link.clock_gettime, (link.clock, time))
    return 1_000_000_000 * load(time) + load(time + 8)


@inner
def _pause(link, polls):
    """Spend the time between two looks at something: let others run, sooner or later."""
    if link.patience != 0:
        call(link.usleep, (link.patience,))
    elif polls >= _POLLS_BEFORE_SLEEP:
        call(link.usleep, (np.int64(50),))
    elif polls >= _POLLS_BEFORE_YIELD:
        call(link.sched_yield, (np.int64(0),))


@inner
def _fetch_ahead(link, polls):
    start, stop = polls * _PREFETCH_AT_ONCE, min(link.ahead_bytes, _PREFETCH_BYTES)
    if start < stop:
        for line in range(start, min(start + _PREFETCH_AT_ONCE, stop), 64):
            prefetch(link.ahead + line)


@inner
def receive(link, number, address, size, rank):
    """Begin to receive `size` bytes from a rank, as request `number`."""
    link.received += size
    request = link.requests + number * link.request_bytes
    call(link.irecv, (address, size, link.byte, rank, np.int64(_TAG), link.communicator, request))


@inner
def send(link, number, address, size, rank):
    """Begin to send `size` bytes to a rank, as request `number`."""
    link.sent += size
    request = link.requests + number * link.request_bytes
    call(link.isend, (address, size, link.byte, rank, np.int64(_TAG), link.communicator, request))


@inner
def finish_messages(link, count):
    """Wait until requests 0 to count - 1 are done."""
    done, polls = link.scratch + 16, 0
    store(done, 0)
    while True:
        call(link.testall, (count, link.requests, done, link.statuses))
        if load(done) & 0xFFFFFFFF:
            return
        _fetch_ahead(link, polls)
        _pause(link, polls)
        polls += 1


@inner
def await_value(link, address, value):
    """Wait until a counter in shared memory has reached a value."""
    polls = 0
    while load(address) < value:
        _pause(link, polls)
        polls += 1
