"""The first words of a job: what its ranks must have alike to understand each other, compared before anything else.

Ranks send each other pickles of the program's own classes, and steps as bytes whose layout belongs to its sources, so
every rank must run the same ones. Python's version may differ, as may the processor: pickles of protocol 5 are read
by every Python from 3.8 on, and hold no class of another library but numpy's arrays (paths travel as texts).

What is said here is plain JSON in a fixed number of bytes, so that programs which differ understand it: neither that
nor the keys may change.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ClusterError

_BYTES = 1024
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Hello:
    """What a rank says of itself.

    Attributes:
        version: of the program. sources: a digest of them, "" if they cannot be read. python: its version.
        byteorder: "little" or "big".
    """

    host: str
    version: str
    sources: str
    python: str
    byteorder: str

    @classmethod
    def own(cls, host: str) -> Hello:
        """Return what this rank says."""
        return cls(host, __version__, _sources(), platform.python_version(), sys.byteorder)

    @classmethod
    def read(cls, data: bytes) -> Hello:
        """Return what another rank has said; what this program does not know of is left out, what is missing empty."""
        said = json.loads(data.rstrip(b"\0"))
        return cls(**{field.name: str(said.get(field.name, "")) for field in fields(cls)})

    def written(self) -> bytes:
        """Return it as the bytes that travel."""
        short = {name: value[:80] for name, value in asdict(self).items()}
        return json.dumps(short).encode().ljust(_BYTES, b"\0")

    @property
    def program(self) -> str:
        """The program, for people."""
        return f"{self.version} (sources {self.sources or 'unknown'})"


@functools.cache
def _sources() -> str:
    """Return a digest of the package's sources."""
    digest = hashlib.sha256()
    try:
        for path in sorted(_PACKAGE.rglob("*.py")):
            digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    except OSError:
        return ""
    return digest.hexdigest()[:12]


def shake_hands(comm: Any, host: str) -> list[Hello]:
    """Return what every rank says of itself, in rank order. Collective.

    Raises:
        ClusterError: the ranks cannot work together; the same, in one line, on every rank.
    """
    said = np.empty((comm.size, _BYTES), np.uint8)
    comm.Allgather(np.frombuffer(Hello.own(host).written(), np.uint8), said)
    ranks = [Hello.read(line.tobytes()) for line in said]
    if (wrong := unlike(ranks)) is not None:
        error = ClusterError(wrong)
        error.agreed = True  # every rank has come to the same
        raise error
    return ranks


def unlike(ranks: Sequence[Hello]) -> str | None:
    """Return what keeps ranks from working together, and what mends it; None if nothing does."""
    if len({rank.byteorder for rank in ranks}) > 1:
        orders = [f"{rank.byteorder}-endian" for rank in ranks]
        return f"processors whose bytes are in different orders cannot work together: {_by_host(ranks, orders)}"
    if len({(rank.version, rank.sources) for rank in ranks}) > 1:
        found = _by_host(ranks, [rank.program for rank in ranks])
        return f"hosts run different versions of dllama_mpi: {found}; install the same on all (doctor says how)"
    return None


def _by_host(ranks: Sequence[Hello], values: Sequence[str]) -> str:
    """Return which ranks on which hosts have which value, for people."""
    names: dict[str, list[str]] = {}
    for number, (rank, value) in enumerate(zip(ranks, values, strict=True)):
        names.setdefault(value, []).append(f"rank {number} on {rank.host}")
    return ", ".join(f"{value} for {' and '.join(_few(who))}" for value, who in names.items())


def _few(names: list[str], most: int = 3) -> list[str]:
    return names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
