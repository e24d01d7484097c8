"""A thread that carries out exchanges while the main thread computes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np

from . import algorithms as x
from . import link as at

_COUNTERS = slice(at.SENT, at.RECEIVED + 1), slice(at.TURNS, at.TURNS + at.PARTS)


class Overlap:
    """Works for one link, whose queue it brings along; sleeps between steps."""

    def __init__(self, link: np.ndarray, queue: np.ndarray, patience: int) -> None:
        """Start the thread.

        queue: (2 + QUEUE * JOB_FIELDS,) int64 zeros that outlive it. patience: microseconds of sleep between looks at
        the network.
        """
        self._link, self._queue, self._patience = link, queue, patience
        link[at.JOBS] = queue.ctypes.data
        self._begin, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._scratch = np.zeros(8, np.int64)  # the threads must not share these words
        self._own = link.copy()
        self._prepare()
        x.end_exchanges(link)  # compiled before the first prompt, so that no rank is late then
        x.carry_out_exchanges(link, self._own)
        threading.Thread(target=self._run, name="exchanges", daemon=True).start()

    def _prepare(self) -> None:
        self._own[:] = self._link
        self._own[at.PATIENCE], self._own[at.SCRATCH] = self._patience, self._scratch.ctypes.data

    def _run(self) -> None:
        while True:
            self._begin.acquire()
            x.carry_out_exchanges(self._link, self._own)
            self._done.release()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Have started exchanges carried out by the thread within a block, at whose end all are done."""
        link, own = self._link, self._own
        self._prepare()
        link[at.OVERLAPS] = 1
        self._begin.release()
        try:
            yield
        finally:
            x.end_exchanges(link)
            self._done.acquire()
            link[at.OVERLAPS] = 0
            for counters in _COUNTERS:
                link[counters] = own[counters]
