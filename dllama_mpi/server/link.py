"""The line between a job's root and the process that starts the job again: who listens, is ready, is to end.

A socket in a folder of the supervisor's: nobody else comes in, and its end is noticed at once on either side.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from ..errors import UsageError

LISTENING, READY = b"L", b"R"  # what the root says
DRAIN, END = b"D", b"E"  # and what it is told


class Link:
    """The root's end, made when the root listens.

    `drain` is called when it is told to end, or when the supervisor has gone; `end` when it is to end at once.

    Raises:
        UsageError: there is no supervisor on this host.
    """

    def __init__(self, path: str, drain: Callable[[], None], end: Callable[[], None]) -> None:
        self._drain, self._end = drain, end
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError:
            raise UsageError(
                f"the process with --restart is not on {socket.gethostname()}, where rank 0 runs; "
                "give its host first to the launcher, or start it there"
            ) from None
        self._tell(LISTENING)
        threading.Thread(target=self._follow, name="link", daemon=True).start()

    def tell_ready(self) -> None:
        """Say that requests are taken."""
        self._tell(READY)

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # the supervisor has gone, which `_follow` sees
            self._socket.sendall(word)

    def _follow(self) -> None:
        word = DRAIN
        while word:
            try:
                word = self._socket.recv(1)
            except OSError:
                word = b""
            if word == END:
                self._end()
            self._drain()
