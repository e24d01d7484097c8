"""How Numba runs here: where compiled kernels are kept, how many threads work, which instruction set is used.

Imported before any kernel is defined, because Numba reads its cache folder when a function is decorated.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numba
from numba import config

from ..errors import UsageError

ISA_VARIABLE = "DLLAMA_MPI_ISA"
ISAS = ("avx512vnni", "generic")
FASTMATH = {"nsz", "contract", "reassoc"}  # sums may be reordered; NaN and infinity keep their meaning


def host_isas() -> tuple[str, ...]:
    """Return the instruction sets this processor can run, best first."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    vnni = features.get("avx512vnni", False) and features.get("avx512bw", False)
    return (*(["avx512vnni"] if vnni else []), "generic")


def choose_isa() -> str:
    """Return the instruction set to emit code for: the best of the host, or what DLLAMA_MPI_ISA asks for.

    Raises:
        UsageError: the variable names a set that is unknown or that this processor lacks.
    """
    offered = host_isas()
    asked = os.environ.get(ISA_VARIABLE, "")
    if not asked:
        return offered[0]
    if asked not in offered:
        raise UsageError(
            f"{ISA_VARIABLE}={asked}: this processor offers {', '.join(offered)}; set one of those or none"
        )
    return asked


def _sources_digest() -> str:
    """Return a digest of every kernel source: Numba itself watches only the file a function stands in."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _cache_folder(isa: str) -> str:
    """Return a writable folder for compiled kernels, one for each version of the sources and instruction set."""
    bases = [os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache")]
    leaf = Path("dllama_mpi") / f"kernels-{_sources_digest()}-{isa}"
    user = os.getuid() if hasattr(os, "getuid") else 0
    for base in [*filter(None, bases), os.path.join(tempfile.gettempdir(), f"dllama_mpi-{user}")]:
        folder = Path(base) / leaf
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return str(folder)
        except OSError:
            continue
    return tempfile.mkdtemp(prefix="dllama_mpi-")


ISA = choose_isa()
config.CACHE_DIR = _cache_folder(ISA)  # type: ignore[attr-defined]


def usable_cores() -> list[int]:
    """Return the processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def most_threads() -> int:
    """Return the most threads that kernels can use in this process."""
    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def set_threads(count: int) -> None:
    """Set how many threads kernels use in this process.

    Raises:
        UsageError: fewer than one, or more than the processors this process may run on.
    """
    limit = most_threads()
    if not 1 <= count <= limit:
        raise UsageError(
            f"--nthreads {count}: this rank may use {limit} cores; give 1 to {limit}"
            " (Open MPI binds a rank to one core unless told --bind-to none)"
        )
    numba.set_num_threads(count)
