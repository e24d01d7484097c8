"""How far long work has come: a bar on the user's terminal, elsewhere a plain line every few seconds.

Under mpiexec the root's stderr is a pipe, whether mpiexec writes what comes out of it to a terminal or to a file. So
the root follows its stderr through the launchers above it on this host. If it ends at a terminal, the bar is drawn
there directly; otherwise there are lines, on stderr. Work of less than `QUIET_SECONDS` is never told.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

from . import log
from .errors import UsageError

MODES = ("auto", "bar", "lines", "off")
VARIABLE = "DLLAMA_MPI_PROGRESS"
QUIET_SECONDS = 2.0
LINE_SECONDS = 5.0  # between two lines, at least
_LONGEST_PAUSE, _PAUSE_SHARE = 60.0, 0.05  # seconds between lines of long work, and of the time it has taken
_DRAW_SECONDS = 0.25
_AFTER_LINE_SECONDS = 0.5  # until a bar is drawn again: a line passes through the launcher meanwhile
_BAR, _LEAST_BAR = 24, 6  # characters
_LEAST_SHARE, _LEAST_COUNT = 0.02, 10  # done and in all, from which the time that is left can be told
_TERMINALS = ("/dev/pts/", "/dev/tty")
BYTES = "bytes"

T = TypeVar("T")


class Progress:
    """How far some work has come. A context manager; of several that run, the one begun last is shown.

    Attributes:
        what: the work, for people. total: how much it is, None if that is not known. unit: of what, in the plural;
            "bytes" are told as MB and GB. done: how much of it has been done. note: more to be told of it.
            started: when, on the monotonic clock.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "", *, show: bool = True, done: int = 0
    ) -> None:
        """Begin at `done`, which was there before. show: False for work that is not to be told."""
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.note = ""
        self._show, self._before = show, done
        self.started = time.monotonic()

    def __enter__(self) -> Progress:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self) -> None:
        """Show it from now on."""
        if self._show:
            _display.begin(self)

    def end(self) -> None:
        """Show it no more."""
        _display.end(self)

    def add(self, count: int) -> None:
        """Count what has been done; a negative number for what has to be done again."""
        self.done += count

    def seconds(self) -> float:
        """Return how long it has run."""
        return time.monotonic() - self.started

    def line(self) -> str:
        """Return how far it is."""
        return f"{self.what}: {self._figures()}"

    def drawn(self, columns: int) -> str:
        """Return the same with a bar, at most so many columns wide."""
        share, figures = self._share(), self._figures()
        room = columns - len(self.what) - len(figures) - 5
        if share is None or room < _LEAST_BAR:
            return self.line()[:columns]
        width = min(_BAR, room)
        full = int(share * width)
        return f"{self.what} [{'#' * full}{'.' * (width - full)}] {figures}"

    def _share(self) -> float | None:
        return None if not self.total else min(1.0, max(0.0, self.done / self.total))

    def _figures(self) -> str:
        told, seconds = in_bytes if self.unit == BYTES else _count, self.seconds()
        unit = f" {self.unit}" if self.unit and self.unit != BYTES else ""
        rate = (self.done - self._before) / max(seconds, 1e-3)
        share, parts = self._share(), []
        if self.total is not None and share is not None:
            parts.append(f"{share:.0%}, {told(self.done)} of {told(self.total)}{unit}")
        elif self.done:
            parts.append(f"{told(self.done)}{unit}")
        if self.unit == BYTES and rate >= 1:
            parts.append(f"{in_bytes(rate)}/s")
        if self.note:
            parts.append(self.note)
        is_steady = self.total is not None and self.total >= _LEAST_COUNT and (share or 0.0) >= _LEAST_SHARE
        if self.total is not None and is_steady and rate > 0:
            parts.append(f"{span((self.total - self.done) / rate)} left")
        else:
            parts.append(span(seconds))
        return ", ".join(parts)


class _Display:
    """Where progress is shown, by a thread of its own while there is some: what works need not come by often."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._mode = "off"
        self._running: list[Progress] = []
        self._thread: threading.Thread | None = None
        self._terminal: int | None = None  # of the bar; None where there are lines
        self._chosen_for = "off"  # the mode that the terminal was chosen for
        self._is_drawn = False
        self._said = self._cleared = float("-inf")

    def use(self, mode: str) -> None:
        """Show progress so from now on."""
        with self._changed:
            self._mode = mode

    def begin(self, progress: Progress) -> None:
        if self._mode == "off":
            return
        with self._changed:
            self._running.append(progress)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
                self._thread.start()

    def end(self, progress: Progress) -> None:
        with self._changed:
            if progress in self._running:
                self._running.remove(progress)
                self.clear()
                self._changed.notify_all()

    def clear(self) -> None:
        """Take the bar away."""
        with self._changed:
            self._cleared = time.monotonic()
            if self._is_drawn:
                self._is_drawn = False
                self._write("\r\x1b[K")

    def _work(self) -> None:
        with self._changed:
            while self._running:
                self._changed.wait(_DRAW_SECONDS)
                if self._running and self._running[-1].seconds() >= QUIET_SECONDS:
                    self._show(self._running[-1], time.monotonic())
            self._thread = None

    def _show(self, progress: Progress, now: float) -> None:
        if self._mode == "off":
            return
        if self._mode != self._chosen_for:
            self._terminal, self._chosen_for = _terminal(self._mode), self._mode
        if self._terminal is None:
            pause = max(LINE_SECONDS, min(_LONGEST_PAUSE, _PAUSE_SHARE * progress.seconds()))
            if now - self._said >= pause:
                self._said = now
                log.say(progress.line())
        elif now - self._cleared >= _AFTER_LINE_SECONDS:
            # The cursor goes back to the beginning: a line that another process prints there begins there.
            self._write(f"\r{progress.drawn(_columns(self._terminal) - 1)}\x1b[K\r")
            self._is_drawn = True

    def _write(self, text: str) -> None:
        if self._terminal is None:
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # launchers' children are no foreground
        try:
            with contextlib.suppress(OSError):  # the terminal has gone
                os.write(self._terminal, text.encode(errors="replace"))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_display = _Display()
log.before_line.append(_display.clear)


def chosen(mode: str | None) -> str:
    """Return how progress is to be shown, which the environment may say where nobody else does.

    Raises:
        UsageError: the environment says something else.
    """
    if mode is not None:
        return mode
    said = os.environ.get(VARIABLE) or "auto"
    if said not in MODES:
        raise UsageError(f"{VARIABLE}={said}: must be one of {', '.join(MODES)}")
    return said


def show_progress(mode: str) -> None:
    """Show progress as a "bar", in "lines", "auto" (a bar if stderr ends at a terminal) or "off", as before the call.

    Of the ranks of a job the root alone shows it.
    """
    _display.use(mode)


def progress(items: Iterable[T], what: str, show: bool, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yield `items` and count them, if `show`."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total, unit, show=show) as shown:
        for item in items:
            yield item
            shown.add(1)


def progress_bytes(sizes: Iterable[int], what: str, show: bool, total: int) -> Iterator[int]:
    """Yield numbers of bytes and add them up, if `show`."""
    with Progress(what, total, BYTES, show=show) as shown:
        for size in sizes:
            yield size
            shown.add(size)


# ---- words


def in_bytes(size: float) -> str:
    """Return bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def span(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _count(number: float) -> str:
    return f"{number:,.0f}"


# ---- where


def _terminal(mode: str) -> int | None:
    """Return a file descriptor of the terminal that a bar is drawn on, or None where there are to be lines."""
    if mode == "lines" or (mode == "auto" and os.environ.get("TERM") == "dumb"):
        return None
    try:
        own = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # no file: somebody has put something else there
        return None
    if os.isatty(own):
        return own
    path = launcher_terminal(own)
    if path is not None:
        with contextlib.suppress(OSError):
            terminal = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
            if os.isatty(terminal):
                return terminal
            os.close(terminal)
    return own if mode == "bar" else None


def launcher_terminal(descriptor: int) -> str | None:
    """Return the terminal on which what this process writes comes out by way of launchers above it on this host.

    None if there is none, or where that cannot be seen: it ends in a file, on another host, or this is not Linux.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        written, process = os.readlink(f"/proc/self/fd/{descriptor}"), os.getpid()
        while not written.startswith(_TERMINALS):
            process = _parent(process)
            if process < 1:
                return None
            if _reads(process, written):
                written = os.readlink(f"/proc/{process}/fd/2")
        return written
    return None


def _parent(process: int) -> int:
    stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[1])  # the name in parentheses may hold anything


def _reads(process: int, pipe: str) -> bool:
    """Return whether a process holds the end of a pipe from which it is read."""
    for descriptor in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/{process}/fd/{descriptor}") == pipe:
                flags = Path(f"/proc/{process}/fdinfo/{descriptor}").read_text().partition("flags:")[2].split()[0]
                if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
                    return True
    return False


def _columns(terminal: int) -> int:
    with contextlib.suppress(OSError):
        if (columns := os.get_terminal_size(terminal).columns) > 0:
            return columns
    return shutil.get_terminal_size().columns
