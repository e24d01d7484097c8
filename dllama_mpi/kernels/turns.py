"""One process at a time compiles what a cache of kernels lacks; the others of the host wait, and find it there.

Ranks want the same kernels at the same moment. Where each compiles them, they take the processors from one another.
Who compiles or waits shows how long that has taken, if it shows progress at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba import config
from numba.core.caching import FunctionCache

from ..log import warn
from ..progress import Progress

_WHAT = "compiling kernels"


class _Turn:
    """A lock on the cache's folder that this process takes at its first miss and keeps until it has compiled that."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._depth = 0  # compilations that run, one inside of the other
        self._file: int | None = None
        self._shown: Progress | None = None
        self._made, self._seconds = 0, 0.0  # functions compiled, and in what time

    @contextlib.contextmanager
    def compilation(self) -> Iterator[None]:
        """Give the lock back, if it was taken, when the outermost compilation has ended."""
        with self._guard:
            self._depth += 1
        try:
            yield
        finally:
            with self._guard:
                self._depth -= 1
                if self._depth == 0:
                    self._end()

    def _end(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._shown is not None:
            self._shown.end()
            self._made, self._seconds = self._shown.done, self._shown.seconds()
            self._shown = None

    def miss(self, family: str) -> None:
        """Show that a function of some family has to be compiled. The time is that of all compilations so far."""
        with self._guard:
            if self._depth and self._shown is None:
                self._shown = Progress(_WHAT, unit="functions", done=self._made)
                self._shown.started -= self._seconds
                self._shown.begin()
            if self._shown is not None:
                self._shown.what = f"{_WHAT} ({family})"

    def made(self) -> None:
        """Count a function as compiled."""
        with self._guard:
            if self._shown is not None:
                self._shown.add(1)

    def take(self) -> bool:
        """Wait for the lock; return whether it had to be taken: what was missing may be there now."""
        with self._guard:
            if self._depth == 0 or self._file is not None:
                return False
            with contextlib.suppress(OSError):  # a file system without locks: every process compiles
                path = Path(config.CACHE_DIR) / "turn"  # type: ignore[attr-defined]
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(self._file, fcntl.LOCK_EX)
                return True
            return False


_turn = _Turn()
compilation = _turn.compilation


class SharedCache(FunctionCache):
    """A function's cache, looked into again when it is this process's turn to compile."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return a compiled function, or None, on which the caller compiles it."""
        found = super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        if found is None:
            _turn.miss(self._py_func.__module__.rpartition(".")[2].replace("_", " "))
        if found is None and _turn.take():
            found = super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a function that has been compiled, if there is room: else it is compiled at every start."""
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError as error:
            _tell_once(f"compiled kernels cannot be kept in {config.CACHE_DIR}: {error.strerror or error}")  # type: ignore[attr-defined]
        _turn.made()


@functools.cache
def _tell_once(line: str) -> None:
    warn(line)
