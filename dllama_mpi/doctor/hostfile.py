"""Which hosts a cluster has: hostfiles as MPICH and Open MPI write them, and lists of names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

_NAME = re.compile(r"(?:[\w.-]+@)?[A-Za-z0-9_][\w.:%-]*")  # no leading -, which ssh would take for an option


@dataclass(frozen=True)
class Host:
    """A host of the list. ranks: how many it is to run; None where nothing says so."""

    name: str
    ranks: int | None = None


def read_hostfile(path: str) -> list[Host]:
    """Return the hosts of a file, in order: lines like `pi0:4` (MPICH) or `pi0 slots=4` (Open MPI), # for comments.

    Raises:
        UsageError: it cannot be read, has no host, or a line that is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--hostfile {path}: {error.strerror or error}; see hostfile.example") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--hostfile {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            found.append(_host(words, f"--hostfile {path}: line {number}"))
    if not found:
        raise UsageError(f"--hostfile {path}: no host in it; write one a line, such as pi0:1 or pi0 slots=1")
    return _joined(found)


def parse_hosts(text: str) -> list[Host]:
    """Return the hosts of a list like `a,b,c` or `a:2,b:2`.

    Raises:
        UsageError: a name is empty or cannot be one.
    """
    return _joined([_host(part.split() or [""], f"--hosts {text}") for part in text.split(",")])


def _host(words: list[str], where: str) -> Host:
    """Return the host of a line. Other settings of a launcher (max_slots=, binding=) are its own affair."""
    name, colon, count = words[0].rpartition(":")
    if not colon or ":" in name:  # no count, or an IPv6 address
        name, count = words[0], ""
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{where}: {word!r} is not known; write pi0:4 (MPICH) or pi0 slots=4 (Open MPI)")
        if key == "slots":
            count = value
            colon = equals
    if not _NAME.fullmatch(name):
        raise UsageError(f"{where}: {name!r} is no name of a host")
    if not colon or (not count and ":" in name):
        return Host(name)
    if not re.fullmatch(r"[1-9][0-9]{0,4}", count):
        raise UsageError(f"{where}: {count!r} ranks on {name}; give a whole number above 0")
    return Host(name, int(count))


def _joined(hosts: list[Host]) -> list[Host]:
    """Return each host once: launchers add up the ranks of lines with the same name."""
    ranks: dict[str, int | None] = {}
    for host in hosts:
        before = ranks.get(host.name)
        ranks[host.name] = host.ranks if before is None else before + (host.ranks or 1)
    return [Host(name, count) for name, count in ranks.items()]
