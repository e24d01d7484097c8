"""What an answer is made of, parsed while it streams: reasoning, content, tool calls.

Tool calls come in the styles of Hermes and Qwen (`<tool_call>{...}</tool_call>`), Llama 3 (the answer is
`{"name": ..., "parameters": ...}`, perhaps after `<|python_tag|>`) and Mistral (`[TOOL_CALLS]` and a list, or a name
and `[ARGS]`).
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass

from .json_scan import CallReader

STYLES = ("hermes", "llama3", "mistral", "none")
THINK, THOUGHT = "<think>", "</think>"
_OPENERS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": "<|python_tag|>"}
_MARKS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "llama3": ("<|python_tag|>",),
}
_CLOSERS = {"hermes": "</tool_call>", "mistral": "]"}
_UNMARKED = ("llama3", "hermes")  # an answer that is such an object is a call; small Qwen models forget the marks
_LONGEST_NAME = 300  # characters before a call's arguments
_SEPARATORS = {"hermes": "", "llama3": ";,", "mistral": ","}
_NAMED_ARGUMENTS = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")
_ALPHANUMERIC = string.ascii_letters + string.digits


def style_of(template: str) -> str:
    """Return the style of tool calls that a chat template teaches."""
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|eot_id|>" in template):
        return "llama3"
    return "none"


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


@dataclass(frozen=True)
class Style:
    """How answers of a request are to be read.

    Attributes:
        tools: one of `STYLES`; "none" where the request has no tools. names: the tools' names.
        thinks: whether an answer may begin with reasoning. is_thinking: the prompt has opened it already.
    """

    tools: str = "none"
    names: frozenset[str] = frozenset()
    thinks: bool = False
    is_thinking: bool = False

    @property
    def marks(self) -> Collection[str]:
        """The texts of tokens that parsing needs to see, even if they are special."""
        return (*_MARKS.get(self.tools, ()), *((THINK, THOUGHT) if self.thinks else ()))


class AnswerParser:
    """Turns one answer's text, piece by piece, into events."""

    def __init__(self, style: Style) -> None:
        self._style = style
        self._thinks, self._tools = style.thinks, style.tools
        self._buffer = ""
        self._step = self._think if style.is_thinking else self._start
        self._reader: CallReader | None = None
        self._is_marked = True  # whether what is read as a call was announced as one
        self.calls = 0

    def feed(self, text: str) -> list[Event]:
        """Take more text; return what is certain."""
        self._buffer += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """Return what was held back; a call that was broken off has been given as far as it went."""
        rest, self._buffer = self._buffer, ""
        if self._reader is not None:
            rest = "" if self._reader.has_started else self._reader.raw + rest
        closer = _CLOSERS.get(self._tools, "")
        is_cut_mark = self._step == self._between and closer.startswith(rest)
        if not rest or is_cut_mark or (self.calls and not rest.strip()):
            return []
        return [Reasoning(rest) if self._step == self._think else Content(rest)]

    def _start(self, events: list[Event]) -> bool:
        """Before the first character that is no space: will it be reasoning, a call or text?"""
        text = self._buffer.lstrip()
        if not text or (self._thinks and THINK.startswith(text) and text != THINK):
            return False
        if self._thinks and text.startswith(THINK):
            self._buffer, self._step = text[len(THINK) :], self._think
        elif self._tools in _UNMARKED and text.startswith("{"):
            self._buffer, self._is_marked, self._step = text, False, self._call
        else:
            self._step = self._text
        return True

    def _think(self, events: list[Event]) -> bool:
        before, found, after = self._buffer.partition(THOUGHT)
        if not found:
            before, after = _split(self._buffer, THOUGHT)
        if before:
            events.append(Reasoning(before))
        self._buffer = after
        if found:
            self._buffer, self._thinks, self._step = after.lstrip("\n"), False, self._after_thought
        return bool(found)

    def _after_thought(self, events: list[Event]) -> bool:
        """Drop the empty lines that part an answer from its reasoning."""
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer:
            self._step = self._start
        return bool(self._buffer)

    def _text(self, events: list[Event]) -> bool:
        opener = _OPENERS.get(self._tools)
        if opener is None:
            before, found, self._buffer = self._buffer, "", ""
        else:
            before, found, after = self._buffer.partition(opener)
            if not found:
                before, after = _split(before, opener)
            shown = before.rstrip()  # the space is kept: perhaps a call follows
            self._buffer = after if found else before[len(shown) :] + after
            before = shown
        if before:
            events.append(Content(before))
        if found:
            self._is_marked, self._step = True, self._call
        return bool(found)

    def _call(self, events: list[Event]) -> bool:
        if self._reader is None and not self._open():
            return self._step == self._text
        assert self._reader is not None
        text, self._buffer = self._buffer, ""
        progress = self._reader.feed(text)
        unknown = progress.name is not None and not self._is_marked and progress.name not in self._style.names
        if progress.is_wrong or unknown:
            # It only looked like a call: it is shown, and so is the rest.
            self._buffer, self._reader, self._tools, self._step = self._reader.raw, None, "none", self._text
            return True
        if progress.name is not None:
            events.append(CallStart(self.calls, call_id(self._tools), progress.name))
            self.calls += 1
        if progress.arguments:
            events.append(CallArguments(self.calls - 1, progress.arguments))
        if progress.rest is not None:
            self._buffer, self._reader, self._step = progress.rest, None, self._between
        return progress.rest is not None

    def _open(self) -> bool:
        """Find where the call's object begins, behind a list's bracket or a name; False if that is not there yet."""
        text = self._buffer.lstrip()
        if self._tools == "mistral":
            text = text.removeprefix("[").lstrip()
        if not text:
            return False
        if text.startswith("{"):
            self._buffer, self._reader = text, CallReader()
            return True
        if self._tools == "mistral":
            match = _NAMED_ARGUMENTS.match(text)
            if match:
                self._buffer, self._reader = text[match.end() :], CallReader(match[1])
                return True
            if len(text) < _LONGEST_NAME:
                return False
        self._tools, self._step = "none", self._text  # no object follows: it is no call
        return False

    def _between(self, events: list[Event]) -> bool:
        """Behind a call: another one, its end mark, or text."""
        text = self._buffer.lstrip(" \n\r\t" + _SEPARATORS.get(self._tools, ""))
        self._buffer = text
        if not text:
            return False
        closer = _CLOSERS.get(self._tools)
        if closer is not None and closer.startswith(text) and text != closer:
            return False
        if closer is not None and text.startswith(closer):
            self._buffer = text[len(closer) :]
            return True
        opens = text.startswith("{") and (self._tools != "hermes" or not self._is_marked)
        self._step = self._call if opens else self._text
        return True


def _split(text: str, mark: str) -> tuple[str, str]:
    """Return a text in two, the second part what may be the beginning of a mark."""
    longest = min(len(text), len(mark) - 1)
    size = next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
    return text[: len(text) - size], text[len(text) - size :]


def call_id(style: str) -> str:
    """Return a new id of a tool call; Mistral's templates want nine letters and digits."""
    if style == "mistral":
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
