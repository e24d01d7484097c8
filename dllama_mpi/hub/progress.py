"""How far a download has come, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from ..log import say

LINE_SECONDS = 10.0  # between two lines


def in_bytes(size: float) -> str:
    """Return bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


class Progress:
    """Adds up the bytes of one download and shows them, unless it is quiet. A context manager."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False) -> None:
        """Begin at `done` bytes of `total`, which were there before."""
        self.quiet = quiet
        self._what, self._total, self._done, self._before = what, total, done, done
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=what, unit="B", unit_scale=True, leave=False, file=sys.stderr
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            self.say(f"{self._what}: {in_bytes(self._done)} in {time.monotonic() - self._started:.0f} s")

    def add(self, size: int) -> None:
        """Count bytes that have come; a negative number for those that have to come again."""
        self._done += size
        if self._bar is not None:
            self._bar.update(size)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self.say(self._line())

    def say(self, line: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.clear()
        if not self.quiet:
            say(line)

    def _line(self) -> str:
        rate = max(1.0, (self._done - self._before) / max(1e-3, time.monotonic() - self._started))
        left = max(0, self._total - self._done) / rate
        ends = f"{left / 3600:.1f} h" if left >= 5400 else f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        share = self._done / self._total if self._total else 1.0
        done = f"{share:.0%}, {in_bytes(self._done)} of {in_bytes(self._total)}"
        return f"{self._what}: {done}, {in_bytes(rate)}/s, {ends} left"
