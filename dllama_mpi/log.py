"""Lines for people, on stderr; generated text alone goes to stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable

before_line: list[Callable[[], None]] = []
"""What is called before a line is printed: a bar that stands there takes itself away."""


def say(line: str) -> None:
    """Print one line on stderr."""
    for call in before_line:
        call()
    print(line, file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Print one line on stderr, marked as a warning."""
    say(f"warning: {line}")
