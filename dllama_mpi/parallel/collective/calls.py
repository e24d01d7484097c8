"""What compiled code needs to call MPI and the C library itself: addresses of functions, and handles as integers."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

PYTHON_VARIABLE = "DLLAMA_MPI_CALLS"  # "python": MPI is called through mpi4py alone


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def c_functions() -> dict[str, int]:
    """Return the addresses of sched_yield, usleep and clock_gettime, and the number of the clock that only rises."""
    library = ctypes.CDLL(None)
    found = {name: _address(library, name) for name in ("sched_yield", "usleep", "clock_gettime")}
    return {**found, "clock": time.CLOCK_MONOTONIC}


def mpi_functions() -> dict[str, int] | None:
    """Return the addresses of the MPI functions that exchanges call; None where they cannot be had.

    Looked up in the libraries that mpi4py's module is linked with. They are called with every argument in a 64-bit
    register or stack slot, which suits 64-bit little-endian x86 and ARM.
    """
    from mpi4py import MPI

    if os.environ.get(PYTHON_VARIABLE) == "python" or ctypes.sizeof(ctypes.c_void_p) != 8 or sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(MPI.__file__)
        return {name: _address(library, name) for name in ("MPI_Isend", "MPI_Irecv", "MPI_Testall")}
    except (AttributeError, OSError):
        return None


def handle(thing: Any) -> int:
    """Return an MPI handle (of a communicator or a datatype) as an integer."""
    from mpi4py import MPI

    size = MPI._sizeof(type(thing))
    return int.from_bytes(ctypes.string_at(MPI._addressof(thing), size), sys.byteorder)


def sizes() -> tuple[int, int]:
    """Return the bytes of an MPI request and of an MPI status."""
    from mpi4py import MPI

    return MPI._sizeof(MPI.Request), MPI._sizeof(MPI.Status)


def can_use_threads() -> bool:
    """Return whether several threads may call MPI at the same time."""
    from mpi4py import MPI

    return bool(MPI.Query_thread() >= MPI.THREAD_MULTIPLE)
