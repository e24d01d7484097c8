"""Which algorithm for which size: the one that was asked for, or the fastest by measurement."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from .table import ALGORITHMS, candidates
from .transport import Transport

_MEASURED_ROWS = {1: 9, 8: 5, 64: 3}  # rows of a message: how often each algorithm is timed


@dataclass(frozen=True)
class Choice:
    """The algorithm for messages of up to so many tokens.

    Attributes:
        tokens: most tokens; the last choice is for any number. bytes: of their payload. algorithm: its name.
        microseconds: what each algorithm that was tried took, the slowest rank's median.
    """

    tokens: int
    bytes: int
    algorithm: str
    microseconds: dict[str, float]

    @property
    def best(self) -> float:
        """Microseconds that the algorithm took."""
        return self.microseconds[self.algorithm]

    def describe(self) -> str:
        """Return the choice as a line for people."""
        took = {name: f"{value:.0f}" if value >= 10 else f"{value:.1f}" for name, value in self.microseconds.items()}
        best = took.pop(self.algorithm)
        tried = f" ({', '.join(f'{name} {value}' for name, value in took.items())})" if took else ""
        what = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"all-reduce of {what} ({self.bytes / 1e3:.1f} kB): {self.algorithm}, {best} us{tried}"

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as JSON-ready values."""
        return dataclasses.asdict(self)


def choose(transport: Transport, sync: str) -> list[Choice]:
    """Return the algorithm for each size, ascending, and take them into use. Collective.

    sync: an algorithm's name, or "auto" for the fastest of all that suit.
    """
    names = [sync] if sync != "auto" else [algorithm.name for algorithm in candidates(transport.setting)]
    choices: list[Choice] = []
    for rows, times in _MEASURED_ROWS.items():
        rows = min(rows, transport.rows)
        medians = np.array([transport.measure(name, rows, times) for name in names])
        slowest = np.max(transport.comm.allgather(medians), axis=0)  # the same on every rank
        took = {name: float(t) for name, t in zip(names, slowest, strict=True)}
        best = min(took, key=lambda name: took[name])
        choices.append(Choice(rows, transport.message_bytes(rows, ALGORITHMS[best]), best, took))
        if rows == transport.rows:
            break
    transport.use([(choice.tokens, ALGORITHMS[choice.algorithm]) for choice in choices])
    return choices
