"""Lines from standard input, for conversations without line editing, and Ctrl-C under launchers.

An interrupt reaches mpiexec itself: MPICH's forwards the first to all ranks and ends the job at the second, Open MPI's
ends it at once. So where lines may come from mpiexec's terminal, it is told to deliver Ctrl-C as a line of its own,
which mpiexec passes on like any other.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import termios
from collections.abc import Callable
from typing import Any

from ..parallel.launch import launched
from .screen import Streams, launcher_process

_CTRL_C = b"\x03"


class Terminal:
    """Lines typed by the user, and whether Ctrl-C was among them. A context manager: it restores the terminal.

    Args:
        interrupt: called at Ctrl-C while an answer comes.
        streams: what is known of the job's terminal; None for nothing.
    """

    KEYS = "Ctrl-C stops an answer; the end of input leaves"

    def __init__(self, interrupt: Callable[[], None], streams: Streams | None) -> None:
        self._interrupt, self._streams = interrupt, streams
        self._pending = b""
        self._ended = False
        self._saved: tuple[int, list[Any]] | None = None
        self.prompt = ""  # what stands before the line that is awaited, if one is

    def __enter__(self) -> Terminal:
        may_be_typed = self._streams is None or self._streams.stdin
        found = launcher_process() if launched() is not None and may_be_typed else None
        if found is not None:
            with contextlib.suppress(OSError, termios.error):
                device = os.open(found[1], os.O_RDWR | os.O_NOCTTY)
                saved = termios.tcgetattr(device)
                changed = termios.tcgetattr(device)
                changed[3] &= ~termios.ISIG
                changed[6][termios.VEOL] = _CTRL_C
                set_modes(device, changed)
                self._saved = (device, saved)
                atexit.register(self._restore)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._saved is not None:
            device, saved = self._saved
            self._saved = None
            with contextlib.suppress(OSError, termios.error):
                set_modes(device, saved)
                os.close(device)

    def read_line(self, prompt: str) -> str | None:
        """Return the next line without its end, or None at the end of input. Ctrl-C begins the line anew."""
        self.prompt = prompt  # before it is shown: Ctrl-C may come at once
        print(prompt, end="", file=sys.stderr, flush=True)
        try:
            return self._line()
        finally:
            self.prompt = ""

    def interrupted(self) -> None:
        """Say how to leave if Ctrl-C comes while a line is awaited; else end the answer."""
        if self.prompt:
            print(f"\n(/quit leaves)\n{self.prompt}", end="", file=sys.stderr, flush=True)
        else:
            self._interrupt()

    def _line(self) -> str | None:
        while True:
            if _CTRL_C in self._pending:
                self._pending = self._pending.rpartition(_CTRL_C)[2]
                self.interrupted()
            line, found, rest = self._pending.partition(b"\n")
            if found:
                self._pending = rest
                return line.decode("utf-8", "replace").rstrip("\r")
            if self._ended:
                line, self._pending = self._pending, b""
                return line.decode("utf-8", "replace") if line else None
            self._read()

    def _read(self) -> None:
        data = os.read(sys.stdin.fileno(), 4096)
        self._ended = not data
        self._pending += data

    def answering(self) -> contextlib.AbstractContextManager[None]:
        """Return what lasts as long as an answer comes."""
        return contextlib.nullcontext()

    def poll(self) -> None:
        """Interrupt if Ctrl-C was typed; what was typed before it is dropped, the rest is kept for the next line."""
        while not self._ended and select.select([sys.stdin], [], [], 0)[0]:
            self._read()
        if _CTRL_C in self._pending:
            self._pending = self._pending.rpartition(_CTRL_C)[2]
            self._interrupt()


def set_modes(device: int, attributes: list[Any]) -> None:
    """Set a terminal's attributes, from the background, too: Open MPI's ranks are in mpirun's session."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # which would stop this process
    try:
        termios.tcsetattr(device, termios.TCSANOW, attributes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
