"""What compiled code needs to call MPI and the C library itself: addresses of functions, and handles as integers."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

import numpy as np

PYTHON_VARIABLE = "DLLAMA_MPI_CALLS"  # "python": MPI is called through mpi4py alone
REQUEST_BYTES, STATUS_BYTES = 8, 32  # at most, of MPI's; known libraries have 4 and 20, or 8 and 24


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def mpi_functions() -> dict[str, int] | None:
    """Return the addresses of the MPI functions that exchanges call, by the link's names; None where there are none.

    Looked up in the libraries that mpi4py's module is linked with. They are called with every argument in a 64-bit
    register or stack slot, which suits 64-bit little-endian x86 and ARM.
    """
    from mpi4py import MPI

    if os.environ.get(PYTHON_VARIABLE) == "python" or ctypes.sizeof(ctypes.c_void_p) != 8 or sys.byteorder != "little":
        return None
    if MPI._sizeof(MPI.Request) > REQUEST_BYTES or MPI._sizeof(MPI.Status) > STATUS_BYTES:
        return None
    try:
        library = ctypes.CDLL(MPI.__file__)
        return {name.lower(): _address(library, f"MPI_{name}") for name in ("Isend", "Irecv", "Testall")}
    except (AttributeError, OSError):
        return None


def fill_calls(link: np.record, comm: Any, functions: dict[str, int] | None) -> None:
    """Tell a link whom to call: the C library, and MPI, on a communicator, if its functions are known."""
    library = ctypes.CDLL(None)
    for name in ("sched_yield", "usleep", "clock_gettime"):
        link[name] = _address(library, name)
    link.clock = time.CLOCK_MONOTONIC  # which only rises
    if functions is not None:
        from mpi4py import MPI

        for name, address in functions.items():
            link[name] = address
        link.communicator, link.byte, link.is_compiled = _handle(comm), _handle(MPI.BYTE), 1
        link.request_bytes = MPI._sizeof(MPI.Request)


def _handle(thing: Any) -> int:
    """Return an MPI handle (of a communicator or a datatype) as an integer."""
    from mpi4py import MPI

    size = MPI._sizeof(type(thing))
    return int.from_bytes(ctypes.string_at(MPI._addressof(thing), size), sys.byteorder)


def can_use_threads() -> bool:
    """Return whether several threads may call MPI at the same time."""
    from mpi4py import MPI

    return bool(MPI.Query_thread() >= MPI.THREAD_MULTIPLE)
