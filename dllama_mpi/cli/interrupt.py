"""Ctrl-C: ends the program, or what is being generated, between two steps and on all ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..parallel.launch import INTERRUPTED, interrupted, launched


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


@contextlib.contextmanager
def ending_at_interrupt() -> Iterator[None]:
    """Have an interrupt end the program, and the whole job with it, without a traceback."""
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as shells have it for what runs in the background
    if threading.current_thread() is not threading.main_thread() or (is_ignored and launched() is None):
        yield
        return
    before, hook = signal.signal(signal.SIGINT, interrupted), sys.unraisablehook

    def end(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:  # in a callback that can raise nothing: it would be lost
            os._exit(INTERRUPTED)
        hook(unraisable)

    sys.unraisablehook = end
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook
