"""The hosts of a job and how many ranks each runs, from a list or from a hostfile of either MPI."""

from __future__ import annotations

import re

from ..errors import UsageError

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ENTRY = re.compile(rf"({_NAME})(?::([0-9]+))?")


def listed_hosts(text: str) -> dict[str, int]:
    """Return hosts and how many ranks each has room for, from `a,b:2`; without a number it is 1.

    Raises:
        UsageError: an entry is no host.
    """
    found: dict[str, int] = {}
    for entry in text.split(","):
        _add(found, entry.strip(), None, f"--hosts {text}")
    return found


def read_hostfile(path: str) -> dict[str, int]:
    """Return hosts and how many ranks each has room for, from lines `host:4` (MPICH) or `host slots=4` (Open MPI).

    Without a number it is 1 with either: a rank takes all cores of its host.

    Raises:
        UsageError: the file cannot be read, or a line means nothing in either form.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UsageError(f"--hostfile {path} cannot be read: {error.strerror}; write one host a line") from None
    except UnicodeDecodeError:
        raise UsageError(f"--hostfile {path} is not a text; write one host a line") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if not words:
            continue
        where = f"--hostfile {path}, line {number}"
        slots = None
        for word in words[1:]:
            key, _, value = word.partition("=")
            if key == "slots" and value.isdecimal():
                slots = value
            elif key not in ("max_slots", "max-slots"):  # at most as many: none are given beyond what -n asks for
                raise UsageError(
                    f"{where}: {word!r} is not understood; write host:4 or host slots=4 (users and ports belong into "
                    "~/.ssh/config)"
                )
        _add(found, words[0], slots, where)
    if not found:
        raise UsageError(f"--hostfile {path} names no host; write one a line")
    return found


def _add(found: dict[str, int], entry: str, slots: str | None, where: str) -> None:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise UsageError(f"{where}: {entry!r} is no host; write a name such as pi0, or pi0:2 for two ranks")
    if slots is not None and match[2] is not None:
        raise UsageError(f"{where}: {entry!r} has two numbers of ranks; write host:{slots} or host slots={slots}")
    count = int(slots or match[2] or 1)
    if count == 0:
        raise UsageError(f"{where}: no rank on {match[1]}; give at least 1, or leave the host out")
    found[match[1]] = found.get(match[1], 0) + count


def placed(room: dict[str, int], ranks: int | None) -> dict[str, int]:
    """Return how many of the ranks each host runs: all it has room for, or evenly spread if they are fewer or more.

    Raises:
        UsageError: a host would be left without a rank.
    """
    if ranks is None:
        return dict(room)
    if ranks < len(room):
        raise UsageError(
            f"-n {ranks} is less than the {len(room)} hosts; give -n {len(room)} or more, or fewer hosts: "
            f"--hosts {','.join(list(room)[:ranks])}"
        )
    counts = dict.fromkeys(room, 0)
    left, limited = ranks, True
    while left:
        takers = [host for host in room if not limited or counts[host] < room[host]]
        limited = bool(takers) and limited  # when all are full, each takes one more in turn
        for host in takers[:left]:
            counts[host] += 1
        left -= len(takers[:left])
    return counts
