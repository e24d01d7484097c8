"""The roll call: a start that does not get on ends the job, where the watchdog does not watch yet.

Until MPI is up on every rank, a rank that is dead, stopped or was never started leaves the others to wait in MPI's
start for ever, and nobody has a connection to anybody. So each rank has a thread look at the clock; when time is up it
looks at the processes of its own host (see `siblings`), says what can be known, and ends this process. Launchers end
the others with it. The thread also ends this process at Ctrl-C, which the main thread does not see while it waits in C.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping

from .launch import INTERRUPTED, Launched, abandon, host_name, is_started, launched
from .siblings import Sibling, mark_as_waiting, siblings
from .watchdog import LAST_WORDS_SECONDS, SLACK

_MOST = 10  # times the timeout: so long at most is a rank waited for that is at work
# One rank's word is enough. What others wait before they say the same: all but rank 0, by their number up to 8, and
# those who see nothing missing.
_OTHERS_SECONDS, _RANK_SECONDS, _BLIND_SECONDS = 1.0, 0.3, 2.0


@contextlib.contextmanager
def roll_call(timeout: float) -> Iterator[None]:
    """Watch over a block in which this rank waits for the others to start MPI. Without others it does nothing.

    timeout: seconds; 0: Ctrl-C alone ends the block.
    """
    found = launched()
    if found is None or found.ranks == 1 or is_started():
        yield
        return
    call = RollCall(found, timeout)
    try:
        yield
    finally:
        call.end()


class RollCall:
    """The thread, and how the main one dismisses it."""

    def __init__(self, job: Launched, timeout: float) -> None:
        self._job, self._timeout = job, timeout
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)
        self._before: int | None = None
        if getattr(signal.getsignal(signal.SIGINT), "ends_job", False):  # else it is somebody else's affair
            self._before = signal.set_wakeup_fd(self._alarm.fileno(), warn_on_full_buffer=False)
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="roll call", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Every rank has come, or this one leaves."""
        self._is_over = True
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        self._alarm.send(b"\0")
        self._thread.join()
        self._alarm.close()
        self._bell.close()

    def _run(self) -> None:
        mark_as_waiting()
        beat = min(1.0, self._timeout / 4 or 1.0)
        began = looked = moved = time.monotonic()
        seen: dict[int, Sibling] = {}
        while not self._is_over:
            if select.select([self._bell], [], [], beat)[0] and signal.SIGINT in self._bell.recv(64):
                os._exit(abandon(INTERRUPTED))
            now = time.monotonic()
            if now - looked - beat > SLACK:  # this process was stopped itself: its clock says nothing about others
                began, moved = began + now - looked, moved + now - looked
            looked = now
            before, seen = seen, siblings(self._job.rank_variable)
            if gone := before.keys() - seen.keys():
                came = f"{len(_waiting(seen))} of {self._job.ranks} ranks had come"
                self._give_up(f"{ranks_in_words(gone)} on {host_name()} ended before MPI was up ({came})", False)
            if not self._timeout:
                continue
            if now - began < _MOST * self._timeout and is_moving(self._job.ranks, before, seen):
                moved = now
            elif now - moved > self._timeout:
                is_blind = len(seen) < self._job.ranks and len(_waiting(seen)) == len(seen)
                self._give_up(verdict(self._job, seen, self._timeout, host_name()), is_blind)

    def _give_up(self, said: str, is_blind: bool) -> None:
        """Say why, if nobody else does first, and end this process; the main thread may be anywhere."""
        if self._job.rank > 0:
            time.sleep(_OTHERS_SECONDS + _RANK_SECONDS * min(self._job.rank, 8))
        time.sleep(_BLIND_SECONDS * is_blind)
        if self._is_over:
            return
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"error: {said}; ending the job\n".encode())
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(abandon(1))


def _waiting(seen: Mapping[int, Sibling]) -> list[int]:
    """Return which ranks of this host wait for the others."""
    return [each.rank for each in seen.values() if each.waits and not each.is_stopped]


def is_moving(ranks: int, before: Mapping[int, Sibling], seen: Mapping[int, Sibling]) -> bool:
    """Return whether one of so many ranks has come on this host since the last look, or works on its way.

    That one works which waits says nothing, as MPI libraries wait in loops; unless all have come.
    """
    have_all_come = len(_waiting(seen)) == ranks
    for rank, now in seen.items():
        then = before.get(rank)
        if before and not now.is_stopped:
            if then is None or (now.waits and not then.waits):
                return True
            if (have_all_come or not now.waits) and now.has_worked_since(then):
                return True
    return False


def verdict(job: Launched, seen: Mapping[int, Sibling], timeout: float, host: str) -> str:
    """Return what can be said of a start that has come to nothing: how many came, and who is missing."""
    came = _waiting(seen) or [job.rank]
    within = f"within {timeout:g} s (--timeout)"
    late = [_told(each) for each in seen.values() if each.rank not in came]
    unseen = [rank for rank in range(job.ranks) if rank not in seen and rank not in came]
    is_one_host = job.local_ranks == job.ranks
    if is_one_host and seen:
        late += [f"rank {rank} (not running)" for rank in unseen]
        unseen = []
    if len(came) == job.ranks:
        return f"all {job.ranks} ranks came, but MPI has not connected them {within}"
    if not unseen:
        return f"{len(came)} of {job.ranks} ranks came {within}; missing: {', '.join(late)}"
    here = "" if is_one_host else f" on {host}"
    missing = f"; missing: {', '.join(late)}" if late else ""
    if job.local_ranks is not None and len(seen) < job.local_ranks and seen:
        missing += f"; {job.local_ranks - len(seen)} more of {host} not running"
    return (
        f"MPI has not started {within}: of {job.ranks} ranks {len(came)} came{here}{missing}; from here"
        f" {ranks_in_words(unseen)} cannot be seen: look at what other hosts have said"
    )


def _told(each: Sibling) -> str:
    if each.is_stopped:
        return f"rank {each.rank} (stopped)"
    return f"rank {each.rank} ({each.command}, which has not started MPI)"


def ranks_in_words(ranks: Collection[int]) -> str:
    """Return "rank 3", "ranks 1 and 2", or "ranks 1 to 7": the first and the last of many."""
    numbers = sorted(ranks)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    is_run = len(numbers) == numbers[-1] - numbers[0] + 1
    if len(numbers) > 2 and is_run:
        return f"ranks {numbers[0]} to {numbers[-1]}"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
