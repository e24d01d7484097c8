"""Lines for people, on stderr; generated text alone goes to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def say(line: str) -> None:
    """Print one line on stderr."""
    print(line, file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Print one line on stderr, marked as a warning."""
    say(f"warning: {line}")


def progress(items: Iterable[T], what: str, show: bool, total: int | None = None) -> Iterator[T]:
    """Yield `items` with a progress bar on stderr, if `show` and stderr is a terminal."""
    from tqdm import tqdm  # imported late: 50 ms that a run without a terminal need not pay

    bar: Any = tqdm(
        items, desc=what, total=total, disable=not (show and sys.stderr.isatty()), leave=False, file=sys.stderr
    )
    yield from bar


def progress_bytes(sizes: Iterable[int], what: str, show: bool, total: int) -> Iterator[int]:
    """Yield numbers of bytes while a bar on stderr adds them up, if `show` and stderr is a terminal."""
    from tqdm import tqdm

    bar: Any = tqdm(
        desc=what,
        total=total,
        disable=not (show and sys.stderr.isatty()),
        leave=False,
        file=sys.stderr,
        unit="B",
        unit_scale=True,
    )
    with bar:
        for size in sizes:
            yield size
            bar.update(size)
