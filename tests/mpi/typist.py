"""A program on a terminal, and somebody who types."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import time

from tests.mpi.launch import ROOT, environment


class Typist:
    """A program on a pseudo-terminal, and what it wrote so far."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        given = environment(env)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(command[0], command, given)
        self.seen = ""

    def until(self, text: str, timeout: float = 300) -> str:
        """Read until `text` appears after what was read before; return what came."""
        end, came = time.monotonic() + timeout, ""
        while text not in came:
            assert time.monotonic() < end, f"no {text!r} in {came!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                came += os.read(self.fd, 4096).decode(errors="replace")
        self.seen += came
        return came

    def type(self, text: str) -> None:
        """Type, as at the keyboard: \\x03 is Ctrl-C."""
        os.write(self.fd, text.encode())

    def status(self, timeout: float = 300) -> int:
        """Wait for the end; return the exit status, a signal's number negative."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # the other side is closed
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"still running: {self.seen!r}")
