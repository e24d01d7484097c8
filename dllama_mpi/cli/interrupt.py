"""Ctrl-C: ends what is being generated, between two steps and on all ranks, not the program."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` at an interrupt instead of raising KeyboardInterrupt, which could part ranks in mid-step.

    Launchers send an interrupt to every rank; `action` should do nothing on workers, which the root stops.
    """

    def handler(_signal: int, _frame: Any) -> None:
        action()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
