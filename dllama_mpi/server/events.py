"""What an answer comes to, piece by piece: reasoning, content, tool calls."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Literal, Protocol

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a tool call's arguments, which are JSON."""

    index: int
    text: str


Event = Reasoning | Content | CallStart | CallArguments
Phase = Literal["undecided", "reasoning", "answer"]


class Parser(Protocol):
    """Turns one answer's text, piece by piece, into events."""

    @property
    def phase(self) -> Phase:
        """What the next text is part of, as far as it can be told."""

    @property
    def complete_calls(self) -> int:
        """How many calls have come to their ends."""

    def feed(self, text: str) -> list[Event]:
        """Take more text; return what is certain."""

    def finish(self) -> list[Event]:
        """Return what was held back."""


def call_id(style: str) -> str:
    """Return a new id of a tool call; Mistral's templates want nine letters and digits."""
    if style == "mistral":
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def split(text: str, *marks: str) -> tuple[str, str]:
    """Return a text in two, the second part what may be the beginning of a mark."""
    size = max((_overlap(text, mark) for mark in marks), default=0)
    return text[: len(text) - size], text[len(text) - size :]


def _overlap(text: str, mark: str) -> int:
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
