"""How Numba runs here: where compiled kernels are kept, how many threads work, which instruction set is used.

Imported before any kernel is defined, because Numba reads its cache folder when a function is decorated.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import numba
from llvmlite import binding
from numba import config
from numba.core.codegen import get_host_cpu_features

from ..errors import UsageError

ISA_VARIABLE = "DLLAMA_MPI_ISA"
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_NEEDS = {
    "avx512vnni": _AVX2 | {"avx512vnni", "avx512bw", "avx512vl"},
    "avx2vnni": _AVX2 | {"avxvnni"},
    "avx2": _AVX2,
    "neondot": frozenset({"neon", "dotprod"}),
    "neon": frozenset({"neon"}),
    "generic": frozenset(),
}
ISAS = tuple(_NEEDS)  # best first
# Processors that NUMBA_CPU_NAME may name and what of the above LLVM knows them to have; it does not tell itself.
_PROCESSORS = (
    ("haswell broadwell skylake skylake-avx512 znver1 znver2 znver3 x86-64-v3 x86-64-v4", "avx2"),
    ("alderlake raptorlake meteorlake", "avx2vnni"),
    ("cascadelake icelake-client icelake-server tigerlake rocketlake znver4", "avx512vnni"),
    ("sapphirerapids graniterapids znver5", "avx512vnni avx2vnni"),
    ("cortex-a53 cortex-a57 cortex-a72 cortex-a73", "neon"),
    ("cortex-a55 cortex-a75 cortex-a76 cortex-a77 cortex-a78 neoverse-n1 neoverse-v1 apple-m1 apple-m2", "neondot"),
)
FASTMATH = {"nsz", "contract", "reassoc"}  # sums may be reordered; NaN and infinity keep their meaning


def _arm_dot_product() -> bool:
    """Return whether this ARM processor has the dot product instructions, which LLVM does not report."""
    if sys.platform == "darwin":
        return True
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except AttributeError:
        return False
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return bool(getauxval(16) >> 20 & 1)  # AT_HWCAP, HWCAP_ASIMDDP


def _host_features() -> tuple[set[str], set[str]]:
    """Return what this processor has, and as much of it as LLVM says."""
    try:
        said = {name for name, there in binding.get_host_cpu_features().items() if there}
    except RuntimeError:  # LLVM cannot tell on this system
        said = set()
    if not binding.get_process_triple().startswith(("aarch64", "arm64")):
        return said, said
    return said | {"neon"} | ({"dotprod"} if _arm_dot_product() else set()), said


def _usable_features() -> set[str]:
    """Return what this processor has and Numba lets LLVM use: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may restrict it."""
    has, said = _host_features()
    name, features = config.CPU_NAME, config.CPU_FEATURES  # type: ignore[attr-defined]
    if name is None:
        emitted = set(has)
    else:
        known = " ".join(isas for names, isas in _PROCESSORS if name in names.split())
        emitted = set().union(*(_NEEDS[isa] for isa in known.split()))
    if features is None:  # Numba adds the host's
        return has & (emitted | said)
    for feature in filter(None, features.split(",")):
        change = {f for f in has if f == feature[1:] or (feature == "-avx512f" and f.startswith("avx512"))}
        emitted = emitted | change if feature.startswith("+") else emitted - change
    return has & emitted


def host_isas() -> tuple[str, ...]:
    """Return the instruction sets that kernels can be compiled for and run here, best first."""
    features = _usable_features()
    return tuple(isa for isa, needed in _NEEDS.items() if needed <= features)


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


def describe() -> str:
    """Return the instruction set in use, what else could be used, and the processor, for people."""
    others = [isa for isa in host_isas() if isa != ISA]
    processor = config.CPU_NAME or binding.get_host_cpu_name()  # type: ignore[attr-defined]
    return f"{ISA} on {processor}" + (f" (also possible: {', '.join(others)})" if others else "")


def _allow_dot_product() -> None:
    """Let LLVM use dot products on an ARM processor whose name does not tell it that they are there."""
    if config.CPU_NAME is None and config.CPU_FEATURES is None:  # type: ignore[attr-defined]
        features = get_host_cpu_features()  # type: ignore[no-untyped-call]
        config.CPU_FEATURES = ",".join(filter(None, [features, "+dotprod"]))  # type: ignore[attr-defined]


def _sources_digest() -> str:
    """Return a digest of every source that is compiled: Numba itself watches only the file a function stands in."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for room in ("kernels", "model", "parallel/collective"):
        for path in sorted((package / room).glob("*.py")):
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
if ISA == "neondot":
    _allow_dot_product()
config.CACHE_DIR = _cache_folder(ISA)  # type: ignore[attr-defined]


# How long GNU's OpenMP lets a thread spin for work before it sleeps, in rounds of about 40 cycles. Its default, a few
# milliseconds, makes every parallel region wait that long when another program takes one of the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def is_cold() -> bool:
    """Return whether no kernel has been compiled and kept for this program, processor and instruction set yet."""
    return not any(Path(config.CACHE_DIR).rglob("*.nbi"))  # type: ignore[attr-defined]


def bind(cores: list[int]) -> None:
    """Keep this process on `cores`, and each of its kernels' threads on one of them.

    Threads are bound where OpenMP is not running yet, that is, before the first kernel is compiled or run.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    os.environ.setdefault("OMP_PLACES", ",".join(f"{{{core}}}" for core in cores))
    os.environ.setdefault("OMP_PROC_BIND", "close")


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
