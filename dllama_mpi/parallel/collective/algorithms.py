"""The all-reduce's algorithms in compiled code: MPI and shared memory without Python in between.

An exchange leaves its result as a `source`, four integers: the address of the first payload, how many payloads are to
be added, the bytes from one to the next, and the bytes of 32 values in them. Adding them, in that order, is left to
whoever needs the sum, who reads every value only once. All ranks see the same bytes and so get the same sums. What each
algorithm costs: `table`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from ...kernels.compiled import inner
from ...kernels.layout import BLOCK
from . import table
from .intrinsics import call, load, store
from .link import EXACT, FLAG_BYTES, TERMS
from .messages import await_value, finish_messages, receive, send
from .payload import F32_BYTES, add_blocks, encode_blocks, encode_with_rest, rest_of_blocks, sum_blocks

_SMALL = 8192  # bytes sent, below which a second hop costs more than it saves
_SHARED, _DIRECT, _SCATTER = table.SHARED.number, table.DIRECT.number, table.SCATTER.number
_DOUBLING, _TWO_LEVEL, _MPI = table.DOUBLING.number, table.TWO_LEVEL.number, table.MPI.number


class Peers(NamedTuple):
    """Who exchanges: `count` ranks, of which this is number `me`; numbers: address of their int64 ranks."""

    numbers: int
    me: int
    count: int


class Terms(NamedTuple):
    """What is summed: so many blocks of float32 at an address, sent with so many bytes a block.

    incoming: where payloads arrive. part: which of the parts in flight. rest: address of what was left out of the
    terms before, see `payload`, or 0.
    """

    values: int
    blocks: int
    width: int
    incoming: int
    part: int
    rest: int


@njit(cache=True, nogil=True, inline="always")
def set_source(source, payloads, count, stride, width):
    """Fill in a source: `count` payloads, `stride` bytes apart, of `width` bytes a block."""
    source[0], source[1], source[2], source[3] = payloads, count, stride, width


@njit(cache=True, nogil=True, inline="always")
def _rank(peers, number):
    return load(peers.numbers + 8 * number)


@inner
def _direct(link, peers, terms, source):
    """Send the whole payload to every other rank: one hop, count - 1 payloads each way."""
    me, count, incoming = peers.me, peers.count, terms.incoming
    size = terms.blocks * terms.width
    mine = incoming + me * size
    for k in range(1, count):
        peer = (me + count - k) % count
        receive(link, k - 1, incoming + peer * size, size, _rank(peers, peer))
    encode_with_rest(terms.values, mine, terms.rest, terms.blocks, terms.width)
    for k in range(1, count):
        send(link, count + k - 2, mine, size, _rank(peers, (me + k) % count))
    finish_messages(link, 2 * (count - 1))
    set_source(source, incoming, count, size, terms.width)


@njit(cache=True, nogil=True, inline="always")
def _piece(terms, peers, peer):
    """Return the first block, and how many, of those that a peer sums."""
    first = terms.blocks * peer // peers.count
    return first, terms.blocks * (peer + 1) // peers.count - first


@inner
def _send_pieces(link, peers, terms, pieces):
    """Send each peer its piece of this rank's payload, and receive theirs of this rank's piece."""
    me, count, width = peers.me, peers.count, terms.width
    size, requests = _piece(terms, peers, me)[1] * width, 0
    for k in range(1, count):
        peer = (me + count - k) % count
        if size > 0:
            receive(link, requests, pieces + peer * size, size, _rank(peers, peer))
            requests += 1
    encode_with_rest(terms.values, link.outgoing, terms.rest, terms.blocks, width)
    for k in range(1, count):
        peer = (me + k) % count
        start, blocks = _piece(terms, peers, peer)
        if blocks > 0:
            send(link, requests, link.outgoing + start * width, blocks * width, _rank(peers, peer))
            requests += 1
    finish_messages(link, requests)


@inner
def _sum_pieces(link, peers, terms, pieces):
    """Write the sum of this rank's piece, in rank order, into its place in the result."""
    width = terms.width
    start, blocks = _piece(terms, peers, peers.me)
    sum_blocks(link.total, pieces, 0, 0, blocks, width)  # zeros
    for k in range(peers.count):
        piece = link.outgoing + start * width if k == peers.me else pieces + k * blocks * width
        add_blocks(link.total, piece, blocks, width)
    sums = terms.incoming + start * width
    encode_blocks(link.total, sums, blocks, width)
    if terms.rest != 0:
        spare, at = terms.values, start * 4 * BLOCK  # the terms were sent
        rest_of_blocks(link.total, sums, spare + at, blocks, width)
        add_blocks(terms.rest + at, spare + at, blocks, F32_BYTES)


@inner
def _scatter(link, peers, terms, source):
    """Sum one piece on each rank and send the sum to all: two hops, 2 (count - 1) / count payloads each way."""
    me, count, width, result = peers.me, peers.count, terms.width, terms.incoming
    pieces = result + terms.blocks * width
    _send_pieces(link, peers, terms, pieces)
    requests = 0
    for k in range(1, count):
        peer = (me + count - k) % count
        start, blocks = _piece(terms, peers, peer)
        if blocks > 0:
            receive(link, requests, result + start * width, blocks * width, _rank(peers, peer))
            requests += 1
    start, blocks = _piece(terms, peers, me)
    if blocks > 0:
        _sum_pieces(link, peers, terms, pieces)
        for k in range(1, count):
            send(link, requests, result + start * width, blocks * width, _rank(peers, (me + k) % count))
            requests += 1
    finish_messages(link, requests)
    set_source(source, result, 1, 0, width)


@inner
def _doubling(link, peers, terms, source):
    """Swap sums with a partner at distance 1, 2, 4...: log2(count) hops of one payload.

    Ranks beyond the largest power of two hand theirs to a partner first, and get the last round's payloads from it.
    """
    me, count, blocks, width, incoming = peers.me, peers.count, terms.blocks, terms.width, terms.incoming
    size, power = blocks * width, 1
    while 2 * power <= count:
        power *= 2
    set_source(source, incoming, 2, size, width)
    if me >= power:
        partner = _rank(peers, me - power)
        encode_blocks(terms.values, link.outgoing, blocks, width)
        send(link, 0, link.outgoing, size, partner)
        receive(link, 1, incoming, 2 * size, partner)
        finish_messages(link, 2)
        return
    values = terms.values
    if me + power < count:
        receive(link, 0, incoming + size, size, _rank(peers, me + power))
        encode_blocks(values, incoming, blocks, width)
        finish_messages(link, 1)
        sum_blocks(link.total, incoming, 2, size, blocks, width)
        values = link.total
    distance = 1
    while distance < power:
        partner = me ^ distance
        place = 0 if me < partner else 1
        receive(link, 0, incoming + (1 - place) * size, size, _rank(peers, partner))
        encode_blocks(values, incoming + place * size, blocks, width)
        send(link, 1, incoming + place * size, size, _rank(peers, partner))
        finish_messages(link, 2)
        distance *= 2
        if distance < power:
            sum_blocks(link.total, incoming, 2, size, blocks, width)
            values = link.total
    if me + power < count:
        send(link, 0, incoming, 2 * size, _rank(peers, me + power))
        finish_messages(link, 1)


@njit(cache=True, nogil=True, inline="always")
def _flags(link, part):
    """Return the address of a part's flags: of each rank of the host that its values are there, then of the result."""
    return link.arrivals + FLAG_BYTES * part * (link.locals + 1)


@inner
def _shared(link, terms, source):
    """Read the values of all ranks of this host where they wrote them: no message, no copy."""
    number, flags = link.exchanges[terms.part], _flags(link, terms.part)
    store(flags + FLAG_BYTES * link.local, number)
    for k in range(link.locals):
        await_value(link, flags + FLAG_BYTES * k, number)
    offset = terms.values - (link.slots + link.local * link.slot_bytes)
    set_source(source, link.slots + offset, link.locals, link.slot_bytes, F32_BYTES)


@inner
def _two_level(link, terms, source):
    """Sum the values of a host in shared memory, exchange the sums between the first ranks of the hosts.

    Two waits within the host, and one or two hops between hosts. The payloads are received into shared memory, where
    the other ranks of the host read them.
    """
    number, hosts, blocks, width = link.exchanges[terms.part], link.hosts, terms.blocks, terms.width
    flags = _flags(link, terms.part)
    ready = flags + FLAG_BYTES * link.locals
    incoming = link.host_incoming + terms.part * link.incoming_bytes
    direct = hosts == 2 or blocks * width * (hosts - 1) <= _SMALL
    if link.local != 0:
        store(flags + FLAG_BYTES * link.local, number)
        await_value(link, ready, number)
        set_source(source, incoming, hosts if direct else 1, blocks * width if direct else 0, width)
        return
    for k in range(1, link.locals):
        await_value(link, flags + FLAG_BYTES * k, number)
    for k in range(1, link.locals):  # nobody else reads this rank's values, so the sum may take their place
        add_blocks(terms.values, terms.values + k * link.slot_bytes, blocks, F32_BYTES)
    peers, sums = (
        Peers(link.leader_numbers, link.host, hosts),
        Terms(terms.values, blocks, width, incoming, terms.part, terms.rest),
    )
    if direct:
        _direct(link, peers, sums, source)
    else:
        _scatter(link, peers, sums, source)
    store(ready, number)


@inner
def exchange(link, algorithm, x, blocks, part, how, source):
    """Exchange so many blocks of float32 values at address x with all ranks; fill in the source of their sum.

    algorithm: its number in the table. The rest: see `exchange.start_exchange`.
    """
    link.exchanges[part] += 1
    width, rest = np.int64(link.width), np.int64(0)
    if how == EXACT:
        width = F32_BYTES
    elif link.coarse_width != 0 and blocks >= link.coarse_blocks:
        if how == TERMS:
            width = link.coarse_width
        rest = link.rests + (x - link.slots - link.local * link.slot_bytes) % (link.slot_bytes // 2)
    peers = Peers(link.rank_numbers, link.rank, link.ranks)
    terms = Terms(x, blocks, width, link.incoming + part * link.incoming_bytes, part, rest)
    if algorithm == _MPI or link.is_compiled == 0:
        call(link.callback, (algorithm, x, blocks, width, rest))
        set_source(source, x, 1, 0, F32_BYTES)
    elif algorithm == _SHARED:
        _shared(link, terms, source)
    elif algorithm == _DIRECT:
        _direct(link, peers, terms, source)
    elif algorithm == _SCATTER:
        _scatter(link, peers, terms, source)
    elif algorithm == _DOUBLING:
        _doubling(link, peers, terms, source)
    elif algorithm == _TWO_LEVEL:
        _two_level(link, terms, source)
