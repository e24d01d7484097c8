"""A thread that carries out exchanges while the main thread computes, where that pays."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np

from ...kernels.layout import BLOCK
from .calls import can_use_threads
from .choose import Choice
from .exchange import carry_out_exchanges, end_exchanges
from .link import SCRATCH_WORDS
from .payload import encode
from .table import ALGORITHMS, MPI, PAYLOADS
from .transport import Transport

LEAST_ROWS = 64  # a step of fewer tokens is not cut into parts
_LEAST_MICROSECONDS = 200  # nor one whose exchanges take less
_LARGEST_SHARE = 0.9  # of the time one after the other that an overlap may take; 0.5 would be perfect


class Overlap:
    """Works for one link, whose queue is its own; sleeps between steps."""

    def __init__(self, link: np.record, own: np.record, patience: int) -> None:
        """Start the thread.

        own: a link for this thread, with the next words as its scratch. patience: microseconds of sleep between looks
        at the network.
        """
        self._link, self._own, self._patience = link, own, patience
        self._begin, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._prepare()
        end_exchanges(link)  # compiled before the first prompt, so that no rank is late then
        carry_out_exchanges(link, own)
        threading.Thread(target=self._run, name="exchanges", daemon=True).start()

    def _prepare(self) -> None:
        link, own = self._link, self._own
        for name in link.dtype.names or ():
            own[name] = link[name]
        own.patience = self._patience
        own.scratch = link.scratch + 8 * SCRATCH_WORDS  # the threads must not share these words
        own.ahead_bytes = 0  # this thread's cache is not the one that will be read from

    def _run(self) -> None:
        while True:
            self._begin.acquire()
            carry_out_exchanges(self._link, self._own)
            self._done.release()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Have started exchanges carried out by the thread within a block, at whose end all are done."""
        link, own = self._link, self._own
        self._prepare()
        link.overlaps = 1
        self._begin.release()
        try:
            yield
        finally:
            end_exchanges(link)
            self._done.acquire()
            link.overlaps = 0
            link.sent, link.received, link.exchanges[:] = own.sent, own.received, own.exchanges


def make_overlap(transport: Transport, choices: list[Choice]) -> Overlap | None:
    """Return the other thread, where exchanging a prompt takes long and computing can go on meanwhile. Collective."""
    last, in_compiled_code = choices[-1], transport.setting.is_compiled
    for choice in choices:
        algorithm = ALGORITHMS[choice.algorithm]
        in_compiled_code = in_compiled_code and algorithm is not MPI and not algorithm.needs_one_host
    is_slow = last.tokens >= LEAST_ROWS and last.best >= _LEAST_MICROSECONDS
    is_possible = in_compiled_code and is_slow and can_use_threads()
    if not all(transport.comm.allgather(is_possible)):  # ranks may differ in what they can, not in what they do
        return None
    # Looking costs the computing thread some time, being late costs little as long as there is much to compute.
    patience = int(min(500, max(20, last.best / 10)))
    overlap = Overlap(transport.link, transport.buffers.links[1], patience)
    return overlap if _share(transport, overlap, last.tokens) <= _LARGEST_SHARE else None


def _share(transport: Transport, overlap: Overlap, rows: int) -> float:
    """Return how long computing and an exchange of equal length take at once, of what they take one by one.

    The slowest rank's. Where the network is driven by the same cores it may be as long.
    """
    values = transport.buffers.values[0, :rows].reshape(-1, BLOCK)
    payload = np.empty((len(values), PAYLOADS["f32"]), np.uint8)

    def seconds(encodings: int) -> float:
        return float(np.median(transport.nanoseconds(rows, 5, payload, encodings))) / 1e9

    encode(values, payload)
    begun = time.perf_counter()
    for _ in range(100):
        encode(values, payload)
    each = (time.perf_counter() - begun) / 100
    encodings = max(1, round(seconds(0) / each))
    apart = seconds(encodings)
    with overlap.working():
        together = seconds(encodings)
    return float(max(transport.comm.allgather(together / apart)))
