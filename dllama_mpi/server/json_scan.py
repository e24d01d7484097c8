"""Reading one JSON object of a tool call while it is being written."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_NAME_FIRST = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class Extent:
    """Finds the end of a JSON object or array, character by character."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def feed(self, text: str, start: int = 0) -> int:
        """Read on from `start`; return the place after the end, or -1 if it goes on."""
        for at in range(start, len(text)):
            char = text[at]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return -1


@dataclass
class Progress:
    """What a reader has found: the name when it is first known, more of the arguments, and the rest behind the end."""

    name: str | None = None
    arguments: str = ""
    rest: str | None = None
    is_wrong: bool = False


class CallReader:
    """Reads `{"name": ..., "arguments": {...}}` in pieces; arguments stream where the name stands first.

    Args:
        name: of the function, where it stood before; then the arguments alone are read.

    Attributes:
        raw: all that was read, to be shown as it is when it turns out to be no call.
        has_started: whether the name has been given.
    """

    def __init__(self, name: str | None = None) -> None:
        self.raw, self.has_started = "", False
        self._name = name
        self._whole, self._value = Extent(), Extent()
        self._at = 0  # how far the whole has been looked at
        self._told: int | None = None  # how far arguments were given, once they are streamed
        self._value_ended = False

    def feed(self, text: str) -> Progress:
        """Take more text."""
        self.raw += text
        progress = Progress()
        if not self.has_started:
            self._start(progress)
        end = self._whole.feed(self.raw, self._at)
        self._at = len(self.raw)
        if self._told is not None and not self._value_ended:
            stop = self._value.feed(self.raw, self._told)
            self._value_ended = stop >= 0
            until = stop if stop >= 0 else len(self.raw)
            progress.arguments, self._told = self.raw[self._told : until], until
        if end >= 0:
            progress.rest = self.raw[end:]
            if not self.has_started:
                self._parse(self.raw[:end], progress)
        return progress

    def _start(self, progress: Progress) -> None:
        if self._name is not None:
            self.has_started, progress.name, self._told = True, self._name, 0
        elif match := _NAME_FIRST.match(self.raw):
            self.has_started, progress.name, self._told = True, json.loads(match[1], strict=False), match.end()

    def _parse(self, text: str, progress: Progress) -> None:
        try:
            found: Any = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("function"), dict):
            found = found["function"]
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            progress.is_wrong = True
            return
        self.has_started, progress.name = True, found["name"]
        given = found.get("arguments", found.get("parameters", {}))
        progress.arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
