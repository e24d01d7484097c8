"""The link: one record of all that compiled code must know to exchange with other ranks.

Fields are int64. Functions and memory stand in it as addresses, MPI's handles as integers. `memory.Buffers` makes it,
`calls` fills in whom to call, `choose` which algorithm suits which size.
"""

from __future__ import annotations

import numpy as np

from .intrinsics import record_at

PARTS = 2  # of a step that may be in flight at once, each with memory of its own
SIZES = 4  # sizes of messages for which the algorithm can differ
QUEUED = 8  # exchanges that may wait for the other thread
SCRATCH_WORDS = 8
TERMS, EXACT, LAST = 0, 1, 2  # how values are sent: as the payload; as float32; as the payload, with little left out
FLAG_BYTES = 64  # a cache line for each flag

_WHO = (
    "rank",
    "ranks",  # their number
    "rank_numbers",  # address of int64: 0, 1, 2...
    "host",  # this rank's host, by number
    "hosts",  # their number; ranks that share no memory count as a host each
    "leader_numbers",  # address of int64: the first rank of each host
    "local",  # this rank's place among those of its host
    "locals",  # their number
)
_CALLS = (
    "is_compiled",  # 1: MPI is called from compiled code; 0: by the callback
    "isend",  # addresses of MPI's functions
    "irecv",
    "testall",
    "communicator",
    "byte",  # MPI's datatype
    "request_bytes",
    "sched_yield",  # addresses of the C library's functions
    "usleep",
    "clock_gettime",
    "clock",  # which one
    "callback",  # address of `fallback.Fallback`'s function
    "start",  # addresses of `exchange.layer_calls`
    "finish",
)
_MEMORY = (
    "width",  # bytes of 32 values in messages
    "coarse_width",  # the same in messages of at least so many blocks, where what is left out is sent with the next
    "coarse_blocks",
    "rests",  # address of float32 values: what was left out of the terms of a sum, where they stand in a half of values
    "requests",  # MPI's
    "statuses",
    "scratch",  # int64 words of this thread
    "total",  # float32 values of one part
    "outgoing",  # payload of one part
    "incoming",  # payloads of one part after the other
    "incoming_bytes",  # of each part
    "arrivals",  # flags of who is there, in memory that the ranks of a host share, as are the following
    "slots",  # every rank's `values`, one after the other
    "slot_bytes",
    "host_incoming",  # as `incoming`, for all ranks of the host
)
_STATE = (
    "sent",  # bytes
    "received",  # bytes
    "waited",  # nanoseconds of the calling rank
    "ahead",  # memory to be read next, which is fetched into the cache while waiting
    "ahead_bytes",
    "patience",  # microseconds of sleep between looks at the network where another thread computes; else 0
    "overlaps",  # 1: another thread takes exchanges from the queue
    "queue",  # address of `QUEUED` jobs
    "queued",  # address of the number of exchanges put there so far
    "carried_out",  # address of the number of those that are done
)
LINK = np.dtype(
    [(name, np.int64) for name in (*_WHO, *_CALLS, *_MEMORY, *_STATE)]
    + [
        ("exchanges", np.int64, (PARTS,)),  # of each part so far
        ("most_blocks", np.int64, (SIZES,)),  # ascending: up to how many blocks of payload...
        ("algorithms", np.int64, (SIZES,)),  # ...which algorithm, by its number
    ],
    align=True,
)
JOB = np.dtype([(name, np.int64) for name in ("values", "blocks", "part", "how", "source")], align=True)
"""A queued exchange: the arguments of `exchange.start_exchange`; values 0: the step has no more."""

link_at, job_at = record_at(LINK), record_at(JOB)


def link_of_one_rank() -> np.record:
    """Return the link of a rank that has nobody to talk to."""
    link: np.record = np.zeros(1, LINK).view(np.recarray)[0]
    link.ranks = 1
    return link
