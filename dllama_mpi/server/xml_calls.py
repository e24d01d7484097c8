"""Qwen3-Coder's calls: `<function=NAME>`, `<parameter=NAME>` with plain values, made JSON by the tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .events import split
from .json_scan import Progress

OPENER = "<function="
_CLOSER, _PARAMETER, _END = "</function>", "<parameter=", "</parameter>"
_NAME = re.compile(r"<(?:function|parameter)=\s*([^<>\n]{1,256}?)\s*>")
_LONGEST_TAG = 300  # characters
_MARK = "</tool_call>"


class XmlReader:
    """Reads one call in pieces, as `json_scan.CallReader` does; texts among its arguments stream.

    schemas: of the tools' parameters by the tools' names.
    """

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self.raw, self.has_started = "", False
        self._schemas = schemas
        self._buffer = ""
        self._properties: Any = {}
        self._root: Any = {}
        self._parameter: str | None = None
        self._is_first = True
        self._is_text = self._is_open = False  # of the value: whether it streams, and has begun to

    def feed(self, text: str) -> Progress:
        """Take more text."""
        if not self.has_started:
            self.raw += text
        self._buffer += text
        progress = Progress()
        while progress.rest is None and not progress.is_wrong and self._step(progress):
            pass
        return progress

    def _step(self, progress: Progress) -> bool:
        if not self.has_started:
            return self._start(progress)
        return self._between(progress) if self._parameter is None else self._value(progress)

    def _start(self, progress: Progress) -> bool:
        match = _NAME.match(self._buffer)
        if match is None:
            progress.is_wrong = any(c in self._buffer for c in ">\n") or len(self._buffer) > _LONGEST_TAG
            return False
        self.has_started, progress.name = True, match[1]
        progress.arguments, self._buffer = "{", self._buffer[match.end() :]
        self._root = self._schemas.get(match[1]) or {}
        properties = self._root.get("properties")
        self._properties = properties if isinstance(properties, dict) else {}
        return True

    def _between(self, progress: Progress) -> bool:
        text = self._buffer = self._buffer.lstrip()
        if text.startswith((_CLOSER, _MARK)):
            progress.arguments += "}"
            progress.rest = text.removeprefix(_CLOSER)
        elif (match := _NAME.match(text)) is not None and text.startswith(_PARAMETER):
            self._parameter, self._buffer = match[1], text[match.end() :]
            kinds = kinds_of(self._properties.get(match[1]), self._root)
            self._is_text, self._is_open = kinds <= {"string"}, False
            progress.arguments += ("" if self._is_first else ", ") + json.dumps(match[1], ensure_ascii=False) + ": "
            self._is_first = False
            return True
        elif any(tag.startswith(text) for tag in (_CLOSER, _MARK, _PARAMETER)) or _is_open_tag(text):
            return False
        else:  # nothing of a call
            self._buffer = "".join(text[1:].partition("<")[1:])
        return bool(self._buffer)

    def _value(self, progress: Progress) -> bool:
        value, found, after = self._buffer.partition(_END)
        if self._is_text:
            return self._text(value, found, after, progress)
        if found:
            value = value.removeprefix("\n").removesuffix("\n")
            kinds = kinds_of(self._properties.get(self._parameter), self._root)
            progress.arguments += json.dumps(converted(value, kinds), ensure_ascii=False)
            self._parameter, self._buffer = None, after
        return bool(found)

    def _text(self, value: str, found: str, after: str, progress: Progress) -> bool:
        if not self._is_open:
            if not self._buffer:
                return False
            value = value.removeprefix("\n")
            progress.arguments += '"'
            self._is_open = True
        if found:
            value, held = value.removesuffix("\n"), after
        else:
            value, held = split(value, "\n" + _END, _END)
        progress.arguments += json.dumps(value, ensure_ascii=False)[1:-1] + ('"' if found else "")
        self._buffer = held
        if found:
            self._parameter = None
        return bool(found)


def _is_open_tag(text: str) -> bool:
    return text.startswith(_PARAMETER) and not any(c in text for c in ">\n") and len(text) < _LONGEST_TAG


def kinds_of(schema: Any, root: Any = None, depth: int = 0) -> frozenset[str]:
    """Return the JSON types that a schema allows, "string" where it does not tell. root: holds what is referred to."""
    if not isinstance(schema, dict) or depth > 8:
        return frozenset({"string"})
    if isinstance(reference := schema.get("$ref"), str):
        found: Any = root
        for part in reference.removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, dict) else None
        return kinds_of(found, root, depth + 1) if found is not None else frozenset({"object"})
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(each for each in kind if isinstance(each, str))
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(name), list) and options:
            return frozenset().union(*(kinds_of(each, root, depth + 1) for each in options))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values:
        return frozenset().union(*(_kinds(each) for each in values))
    return frozenset({"string"})


def converted(text: str, kinds: frozenset[str]) -> Any:
    """Return a value that was written as text, of one of these types if it can be; else the text."""
    stripped = text.strip()
    word = {"true": True, "false": False, "none": None, "null": None}.get(stripped.lower(), ...)
    try:
        value = json.loads(stripped, parse_constant=_no_constant) if word is ... else word
    except (ValueError, RecursionError):
        return text
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if _kinds(value) & kinds - {"string"} else text


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _kinds(value: Any) -> frozenset[str]:
    """Return the types, as schemas call them, that a value is of."""
    if value is None or isinstance(value, bool):
        return frozenset({"null" if value is None else "boolean"})
    if isinstance(value, (int, float)):
        return frozenset({"integer", "number"} if isinstance(value, int) else {"number"})
    return frozenset({"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"})
