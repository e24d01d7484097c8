"""Compiled functions that call each other in every way there is; a process of its own runs some of them.

usage: compiled_functions.py FUNCTION...: print what each writes
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from dllama_mpi.kernels.compiled import call, entry, inner
from dllama_mpi.kernels.parallel import run_parallel


@inner
def leaf(out: Any, value: Any) -> None:
    """Add a value to all elements."""
    for i in range(out.size):
        out[i] += value


@inner
def middle(out: Any, value: Any) -> None:
    """Call `leaf` where it lies."""
    call(leaf, (out, value))  # type: ignore[call-arg]  # an intrinsic


@inner
def _share(out: Any, value: Any, thread: Any, threads: Any) -> None:
    for i in range(out.size * thread // threads, out.size * (thread + 1) // threads):
        middle(out[i : i + 1], value)


@entry
def first(out: Any, value: Any) -> None:
    """Copy `middle`, which calls."""
    middle(out, value)


@entry
def second(out: Any, value: Any) -> None:
    """Copy it, too."""
    middle(out, 10 * value)


@entry
def third(out: Any, value: Any) -> None:
    """Call it from a parallel region."""
    run_parallel(_share, (out, 100 * value), np.int64(2))  # type: ignore[call-arg]  # an intrinsic


if __name__ == "__main__":
    from tests.unit import compiled_functions  # as its callers find it by name

    for name in sys.argv[1:]:
        numbers = np.zeros(3, np.int64)
        getattr(compiled_functions, name)(numbers, 7)
        print(numbers.tolist())
