"""The watchdog: a rank that dies, stops or is cut off ends the job instead of leaving the others to wait for ever.

A thread on every rank exchanges heartbeats with the root over TCP (see `connection`): a star, the root in its middle. A
connection that closes without a goodbye is a dead rank, and noticed at once; one that is silent for `timeout` seconds
is a stopped rank or a broken link. Each side judges the other by its own monotonic clock, so that every rank of a job
that was cut in two ends itself. The thread needs nothing of the main one, which may compute or wait as long as it
likes.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import os
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from ..log import warn
from .connection import (
    Kind,
    Message,
    Offer,
    Phase,
    TcpConnection,
    answer,
    listen,
    reach,
)

TIMEOUT = 30.0  # seconds of silence, unless told otherwise
LEAST_TIMEOUT, LONGEST_TIMEOUT = 1.0, 86400.0
LAST_WORDS_SECONDS = 0.3  # in which a launcher passes on what a rank has said before the job is ended
_BEAT_SECONDS = 1.0
SLACK = 0.5  # a look that comes this much late means that this process itself was stopped
_ABORT_SECONDS = 2.0  # MPI's abort, or that of the rank which failed, should have ended this process by then
_LEFT_SECONDS = 5.0  # a worker waits this long for a root that is leaving
_NOTHING_YET = Message(Kind.BEAT, Phase.LOADING, 0, 0, 0.0)


def is_timeout(value: Any) -> bool:
    """Return whether a value can be the watchdog's timeout."""
    return isinstance(value, (int, float)) and (value == 0 or LEAST_TIMEOUT <= value <= LONGEST_TIMEOUT)


@dataclass
class Peer:
    """Another rank as this one knows it: its connection once it has called, when it was heard, what it said last."""

    rank: int
    host: str
    heard: float
    connection: TcpConnection | None = None
    last: Message = _NOTHING_YET


@functools.cache
def watchdog() -> Watchdog:
    """Return this process's watchdog. Until it is started, which takes two ranks, its methods do nothing."""
    return Watchdog()


class Watchdog:
    """Watches the ranks that this one has a connection to: all of them on the root, the root elsewhere.

    Attributes:
        timeout: seconds of silence that end the job; 0: only a closed connection does.
    """

    def __init__(self) -> None:
        self.timeout = TIMEOUT
        self._rank = 0
        self._state = (Phase.LOADING, 0, time.monotonic())  # phase, step, since when
        self._thread: threading.Thread | None = None
        self._peers: dict[int, Peer] = {}
        self._last_words: Message | None = None
        self._said = threading.Event()
        self._over = False  # the job is being ended, or this rank is leaving: peers may go

    # ---- for the main thread

    def start(self, comm: Any, hosts: list[str]) -> None:
        """Begin to watch; `hosts` has each rank's host name. Collective; a second call does nothing."""
        if self._thread is not None:
            return
        self._comm, self._rank, now = comm, comm.rank, time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._alarm, bell = socket.socketpair()
        bell.setblocking(False)
        self._selector.register(bell, selectors.EVENT_READ, functools.partial(bell.recv, 64))
        offer: Offer | None = None
        if comm.rank == 0:
            with contextlib.suppress(OSError):
                listener, offer = listen(hosts[0])
                self._peers = {rank: Peer(rank, host, now) for rank, host in enumerate(hosts) if rank > 0}
                welcome = functools.partial(self._welcome, listener, offer)
                self._selector.register(listener, selectors.EVENT_READ, welcome)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        if comm.rank == 0:
            self._thread.start()  # callers wait for an answer
        offer = comm.bcast(offer)
        if comm.rank > 0:
            connection = reach(offer, comm.rank, hosts[comm.rank]) if offer is not None else None
            if connection is not None:
                self._connect(Peer(0, hosts[0], time.monotonic()), connection)
            self._thread.start()
        missing = [rank for rank, found in enumerate(comm.allgather(bool(self._peers))) if not found]
        for rank in missing if comm.rank == 0 else []:
            self._peers.pop(rank, None)
            warn(f"rank {rank} on {hosts[rank]} has no TCP connection to rank 0 on {hosts[0]}; nobody watches over it")
        atexit.register(self.close)

    def tell(self, phase: Phase) -> None:
        """Say what this rank does from now on; a prefill or a decode begins the next step."""
        before, step, _ = self._state
        self._state = (phase, step + (phase in (Phase.PREFILL, Phase.DECODE)), time.monotonic())
        if phase is not before and self._rank == 0 and self._thread is not None:
            self._alarm.send(b"!")  # workers cannot tell between two steps what the root is about to do

    def fail(self, status: int) -> None:
        """Say that this rank is about to end the job with an exit status; the others end themselves if need be."""
        if self._depart(Kind.FAILED, status):
            _exit_later(_ABORT_SECONDS)

    def goodbye(self) -> None:
        """Say goodbye at once: every rank is about to leave with the same error.

        Not after MPI's end, like `close`: a launcher kills what is left of a job soon after the first rank has gone
        with an exit status other than 0, so that nothing may keep the others.
        """
        self._depart(Kind.GOODBYE, 0)

    def close(self) -> None:
        """Leave MPI, which may take other ranks' time and is watched like everything else, then say goodbye."""
        if self._thread is None or self._over:
            return
        self.tell(Phase.LEAVING)
        mpi = sys.modules["mpi4py.MPI"]
        if not mpi.Is_finalized():
            mpi.Finalize()
        self._depart(Kind.GOODBYE, 0)

    def _depart(self, kind: Kind, status: int) -> bool:
        if self._thread is None or self._over:
            return False
        self._last_words = self._message(kind, status)
        self._alarm.send(b"!")
        self._said.wait(LAST_WORDS_SECONDS)
        return True

    # ---- the thread

    def _run(self) -> None:
        looked = sent = time.monotonic()
        told = self._state[0]
        while not self._said.is_set():
            beat = min(_BEAT_SECONDS, self.timeout / 4 or _BEAT_SECONDS)
            pause = max(0.0, sent + beat - time.monotonic())
            for key, _ in self._selector.select(pause):
                key.data()
            now = time.monotonic()
            late = now - looked - pause
            if late > SLACK:  # stopped and continued: its own clock says nothing about others
                for peer in list(self._peers.values()):
                    peer.heard = min(now, peer.heard + late)
            looked = now
            if now >= sent + beat or (self._rank == 0 and self._state[0] is not told):
                sent, told = now, self._state[0]
                self._send(self._message(Kind.BEAT))
            if self._last_words is not None:
                self._over = True
                self._send(self._last_words)
                self._said.set()
            self._judge(now)

    def _message(self, kind: Kind, status: int = 0) -> Message:
        phase, step, since = self._state
        return Message(kind, phase, status, step, time.monotonic() - since)

    def _send(self, message: Message, but: Peer | None = None) -> None:
        for peer in list(self._peers.values()):
            if peer.connection is not None and peer is not but:
                peer.connection.send(message)

    def _welcome(self, listener: socket.socket, offer: Offer) -> None:
        caller = answer(listener, offer)
        if caller is not None and caller[0] in self._peers:
            self._connect(self._peers[caller[0]], caller[1])
        if all(peer.connection is not None for peer in list(self._peers.values())):
            self._selector.unregister(listener)
            listener.close()

    def _connect(self, peer: Peer, connection: TcpConnection) -> None:
        peer.connection, peer.heard = connection, time.monotonic()
        self._peers[peer.rank] = peer
        self._selector.register(
            connection.socket, selectors.EVENT_READ, functools.partial(self._hear, peer, connection)
        )

    def _hear(self, peer: Peer, connection: TcpConnection) -> None:
        messages, is_open = connection.receive()
        for message in messages:
            peer.heard, peer.last = time.monotonic(), message
            if message.kind is Kind.FAILED:
                self._follow(peer, message.status)
        if not is_open:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            del self._peers[peer.rank]
            if peer.last.kind is not Kind.GOODBYE:
                self._end(f"{self._name(peer)} has died ({self._last_known(peer)})")

    def _judge(self, now: float) -> None:
        for peer in list(self._peers.values()):
            if self.timeout and now - peer.heard > self.timeout:
                self._end(f"{self._name(peer)} has been silent for {self.timeout:g} s ({self._last_known(peer)})")
        root = self._peers.get(0)
        if root is None or root.last.phase is not Phase.LEAVING or root.last.seconds < _LEFT_SECONDS:
            return
        phase, _, since = self._state
        if phase is Phase.IDLE and now - since > _LEFT_SECONDS:
            self._end(f"{self._name(root)} has left while rank {self._rank} waits for it")

    @staticmethod
    def _name(peer: Peer) -> str:
        return f"rank {peer.rank} on {peer.host}"

    def _last_known(self, peer: Peer) -> str:
        """Return the step at which a peer was lost: ranks step together, so that the later of both sides' is meant."""
        phase = self._state[0] if self._rank == 0 else peer.last.phase
        step = max(self._state[1], peer.last.step)
        return f"last step {step}, {phase.name.lower()}" if step else phase.name.lower()

    # ---- ending the job

    def _end(self, reason: str) -> None:
        """Say why, and end the whole job."""
        if self._over:
            return
        self._over = True
        self._send(self._message(Kind.FAILED, 1))
        _exit_later(LAST_WORDS_SECONDS + _ABORT_SECONDS)
        if self._rank > 1:  # one rank's word is enough, if that rank is there to say it
            time.sleep(min(_ABORT_SECONDS - LAST_WORDS_SECONDS, 1.0 + self._rank * LAST_WORDS_SECONDS))
        ahead = "\n" if self._state[0] in (Phase.PREFILL, Phase.DECODE) else ""  # text may stand in the line
        with contextlib.suppress(OSError):
            os.write(2, f"{ahead}error: {reason}; ending the job\n".encode())
        time.sleep(LAST_WORDS_SECONDS)
        self._abort()
        os._exit(1)

    def _abort(self) -> None:
        mpi = sys.modules["mpi4py.MPI"]
        with contextlib.suppress(Exception):
            if not mpi.Is_finalized() and mpi.Query_thread() == mpi.THREAD_MULTIPLE:
                abort(self._comm, 1)

    def _follow(self, peer: Peer, status: int) -> None:
        """Pass on that a rank ends the job, and end with it."""
        if self._over:
            return
        self._over = True
        self._send(self._message(Kind.FAILED, status), peer)
        _exit_later(2 * _ABORT_SECONDS)
        time.sleep(_ABORT_SECONDS)
        os._exit(status)


def abort(comm: Any, status: int) -> None:
    """End the whole job by MPI; what was to be said has been said."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries say on every rank that they abort
    comm.Abort(status)


def _exit_later(seconds: float) -> None:
    """End this process, with status 1, even if Python and MPI do not come round to it."""
    nothing = open(os.devnull, "w")  # noqa: SIM115  # stays open as long as the process
    faulthandler.dump_traceback_later(seconds, exit=True, file=nothing)
