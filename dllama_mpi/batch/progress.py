"""How far a batch is, on stderr; and lines with the time in a log file."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TextIO

from .. import progress
from ..errors import UsageError
from ..log import say

_SECONDS = 10.0  # between two lines of the log
_RECENT = 6  # readings over which the speed is taken


class Progress:
    """Counts what is answered and generated.

    Attributes:
        answered: lines, those of earlier runs included. errors: of them. prompt, output: tokens of this run.
    """

    def __init__(self, total: int, answered: int, errors: int, log: Path | None) -> None:
        """Begin.

        Raises:
            UsageError: the log cannot be written.
        """
        self.total, self.answered, self.errors = total, answered, errors
        self.prompt = self.output = 0
        self._began, self._before = time.monotonic(), answered
        self._readings: deque[tuple[float, int, int]] = deque([(self._began, 0, answered)], _RECENT)
        self._log: TextIO | None = None
        if log is not None:
            try:
                self._log = log.open("a", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--log {log}: {error.strerror or error}") from None
        self._shown = progress.Progress("batch", total, "answered", done=answered)
        self._shown.begin()
        self._said = self._began

    def add(self, lines: int, errors: int) -> None:
        """Count answers that are on the disk."""
        self.answered += lines
        self.errors += errors
        self._shown.add(lines)
        self.tick()

    def tick(self) -> None:
        """Take the speed and write a line into the log, if it is time."""
        now = time.monotonic()
        if now - self._said < _SECONDS:
            return
        self._said = now
        then, tokens, answered = self._readings[0]
        self._readings.append((now, self.output, self.answered))
        speed = (self.output - tokens) / (now - then)
        rate = (self.answered - answered) / (now - then)
        left = f", {progress.span((self.total - self.answered) / rate)} left" if rate else ""
        self._shown.note = ", ".join(filter(None, [self._wrong(), f"{speed:.1f} tokens/s"]))
        self._write(f"batch: {self._counts()}, {speed:.1f} tokens/s{left}")

    def _counts(self) -> str:
        wrong = f" ({self._wrong()})" if self.errors else ""
        return f"{self.answered:,} of {self.total:,} answered{wrong}"

    def _wrong(self) -> str:
        return f"{self.errors:,} error{'s' * (self.errors != 1)}" if self.errors else ""

    def end(self, path: Path) -> None:
        """Say what has been done."""
        self._shown.end()
        seconds = time.monotonic() - self._began
        new = self.answered - self._before
        earlier = f", {self._before:,} of them before" if self._before else ""
        speed = f"{self.output / seconds:.1f} tokens/s, " if self.output else ""
        line = (
            f"{path}: {self._counts()}{earlier}; {new:,} in {seconds:.1f} s, {self.prompt:,} tokens read,"
            f" {self.output:,} generated, {speed}"
        ).rstrip(", ")
        if self.answered < self.total:
            line += "; give the same command again to go on"
        say(line)
        self._write(line)
        if self._log is not None:
            self._log.close()

    def _write(self, line: str) -> None:
        if self._log is not None:
            print(time.strftime("%Y-%m-%dT%H:%M:%S%z"), line, file=self._log, flush=True)
