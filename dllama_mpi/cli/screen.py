"""The terminal that a person sits at, and which of this job's standard streams come from it and go to it.

Under mpiexec rank 0's own streams say nothing of that: they are pipes, or, as Open MPI's standard output, a terminal of
mpiexec's making. So the streams of mpiexec itself are looked at. What is shown there is written onto the terminal
itself, since on the way through mpiexec a prompt could overtake a text, and Open MPI's holds back what is no whole
line.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import stat
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from ..log import say
from ..parallel.launch import launched

_LAUNCHERS = ("mpiexec", "mpirun", "prterun", "prte", "orterun")  # how their processes' names begin
# Of MPICH's and Open MPI's mpiexec, without dashes: what is written goes into files, or gets marks.
_OUTPUT_OPTIONS = ("outfile", "prepend", "output", "tag-output", "timestamp-output", "xml", "xterm", "merge-stderr")
_SETTLE_SECONDS = 0.25


@dataclass(frozen=True)
class Streams:
    """Which streams of a job are joined to a terminal.

    Attributes:
        path: the terminal's. stdin, stdout, stderr: whether they come from it, and are seen there.
    """

    path: str
    stdin: bool
    stdout: bool
    stderr: bool


def find_streams() -> Streams | None:
    """Return the terminal that this job was started from, or None without one on this host."""
    return _own_streams() if launched() is None else _launcher_streams()


def _own_streams() -> Streams | None:
    joined = [os.isatty(number) for number in range(3)]
    if True not in joined:
        return None
    path = os.ttyname(joined.index(True))
    same = [joined[number] and os.ttyname(number) == path for number in range(3)]
    return Streams(path, same[0] and _is_in_foreground(os.getpid()), same[1], same[2])


def _launcher_streams() -> Streams | None:
    found = launcher_process()
    if found is None:
        return None
    process, path = found
    try:
        device = os.stat(path).st_rdev
        joined = [_device(process.pid, number) == device for number in range(3)]
        told = _redirects_output(process.cmdline())
    except (OSError, psutil.Error):  # where there is no /proc, nothing is known of another process's streams
        return None
    stdin = joined[0] and _is_in_foreground(process.pid)
    return Streams(path, stdin, joined[1] and not told, joined[2] and not told)


def launcher_process() -> tuple[psutil.Process, str] | None:
    """Return the mpiexec above this process and its terminal's path; None if it has none, or is on another host."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if process.name().startswith(_LAUNCHERS):  # those further up may have other terminals
                terminal = process.terminal()
                return None if terminal is None else (process, str(terminal))
    return None


def _device(pid: int, number: int) -> int | None:
    """Return the device that a process's stream is, or None if it is a file or a pipe, or closed."""
    try:
        found = os.stat(f"/proc/{pid}/fd/{number}")
    except FileNotFoundError:
        if not os.path.isdir(f"/proc/{pid}/fd"):
            raise
        return None
    return found.st_rdev if stat.S_ISCHR(found.st_mode) else None


def _is_in_foreground(pid: int) -> bool:
    """Return whether a process belongs to the job that reads the terminal, as far as can be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return True
    return fields[2] == fields[5]  # process group, and that in the foreground


def _redirects_output(command: Sequence[str]) -> bool:
    """Return whether a launcher's own options change where, or how, ranks' output appears."""
    for each in command[1:]:
        if Path(each).name.startswith("python"):  # the ranks' options begin
            break
        if each.startswith("-") and (each == "-l" or each.lstrip("-").startswith(_OUTPUT_OPTIONS)):
            return True
    return False


class Screen:
    """Where texts and lines for people go: onto the terminal where they are seen there, else to stdout and stderr.

    Attributes:
        streams: the terminal, None without one. has_colours: whether lines may be in colours.
    """

    def __init__(self, streams: Streams | None) -> None:
        self.streams: Streams | None = None
        self._device: int | None = None
        self._has_said = False
        if streams is not None:
            with contextlib.suppress(OSError):  # such as another user's terminal
                self._device = os.open(streams.path, os.O_RDWR | os.O_NOCTTY)
                self.streams = streams
                if launched() is not None:
                    # Open MPI's ranks are in the background of mpiexec's session, whose terminal stops writers.
                    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        self.has_colours = (
            self._device is not None and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        )

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device is not None:
            os.close(self._device)
        self._device = self.streams = None

    @property
    def device(self) -> int:
        """The open terminal; there must be one."""
        assert self._device is not None
        return self._device

    @property
    def shows_text(self) -> bool:
        """Whether a person reads the text on the terminal."""
        return self.streams is not None and self.streams.stdout

    @property
    def shows_lines(self) -> bool:
        """Whether a person reads lines of stderr on the terminal."""
        return self.streams is not None and self.streams.stderr

    def write_text(self, text: str) -> None:
        """Show a piece of what is generated: what a pipe or file would get."""
        if self.shows_text:
            self.draw(text)
        else:
            print(text, end="", flush=True)

    def say(self, line: str) -> None:
        """Show a line for people."""
        if self.shows_lines:
            self.draw(self.dim(line) + "\n")
        else:
            say(line)

    def draw(self, text: str) -> None:
        """Write onto the terminal itself."""
        if not self._has_said:  # lines of loading are still on their way through mpiexec
            self._has_said = True
            _settle()
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(self.device, data) :]

    def bold(self, text: str) -> str:
        """Return a text as what the user has given is shown."""
        return f"\x1b[1m{text}\x1b[0m" if self.has_colours else text

    def dim(self, text: str) -> str:
        """Return a text as what stands beside the matter is shown."""
        return f"\x1b[2m{text}\x1b[0m" if self.has_colours else text


def _settle() -> None:
    """Wait until a launcher has taken what was said on stderr, for a moment at most."""
    if launched() is None:
        return
    sys.stderr.flush()
    end = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < end and _unread(2):
        time.sleep(0.005)
    time.sleep(0.02)  # and for its way from there to the terminal


def _unread(pipe: int) -> int:
    """Return how many bytes of a pipe nobody has read."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(pipe, termios.FIONREAD, count)
    except OSError:
        return 0
    return count[0]
