"""What there is to mend on a host, and whom its neighbours are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["error", "advice"]


@dataclass(frozen=True)
class Finding:
    """One thing to mend: an error keeps a job from running, or from running right; advice makes it faster or safer."""

    level: Level
    host: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level}: {self.host}: {self.what}: {self.remedy}"


@dataclass(frozen=True)
class Seen:
    """A host that has answered: its name in the list, the ranks it is to run, its report."""

    name: str
    ranks: int | None
    report: dict[str, Any]

    def get(self, *keys: str) -> Any:
        """Return what lies under these keys of the report; None where it could not be found out."""
        found: Any = self.report
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @property
    def pip(self) -> str:
        """The pip of the host's Python."""
        return f"on {self.name} run {self.get('python', 'path') or 'python'} -m pip install"


Rule = Callable[[Seen, Seen], Iterator[Finding]]
"""Compares a host with the first that answered, which may be the same."""


def error(host: Seen, what: str, remedy: str) -> Finding:
    """Return an error of a host."""
    return Finding("error", host.name, what, remedy)


def advice(host: Seen, what: str, remedy: str) -> Finding:
    """Return advice for a host."""
    return Finding("advice", host.name, what, remedy)
