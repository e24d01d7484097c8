"""How far a download has come, on stderr, and what came of it."""

from __future__ import annotations

from types import TracebackType

from .. import log
from ..progress import BYTES, Progress, in_bytes, span


class Downloading:
    """Adds up the bytes of one download and shows them, unless it is quiet. A context manager."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False) -> None:
        """Begin at `done` bytes of `total`, which were there before."""
        self.quiet = quiet
        self._shown = Progress(what, total, BYTES, show=not quiet, done=done)

    def __enter__(self) -> Downloading:
        self._shown.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.end()
        if kind is None:
            self.say(f"{self._shown.what}: {in_bytes(self._shown.done)} in {span(self._shown.seconds())}")

    def add(self, size: int) -> None:
        """Count bytes that have come; a negative number for those that have to come again."""
        self._shown.add(size)

    def say(self, line: str) -> None:
        """Print a line."""
        if not self.quiet:
            log.say(line)
