"""What an answer is made of, parsed while it streams: reasoning, content, tool calls.

Tool calls come in the styles of Hermes and Qwen (`<tool_call>{...}</tool_call>`), Llama 3 (the answer is
`{"name": ..., "parameters": ...}`, perhaps after `<|python_tag|>`), Mistral (`[TOOL_CALLS]` and a list, or a name
and `[ARGS]`), Qwen3-Coder (see `xml_calls`) and gpt-oss (see `harmony`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .events import CallArguments, CallStart, Content, Event, Parser, Phase, Reasoning, call_id, split
from .harmony import MARKS as HARMONY_MARKS
from .harmony import HarmonyParser
from .json_scan import CallReader
from .xml_calls import OPENER, XmlReader

STYLES = ("hermes", "llama3", "mistral", "qwen3_coder", "harmony", "none")
THINK, THOUGHT = "<think>", "</think>"
_OPENERS = {
    "hermes": ("<tool_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "llama3": ("<|python_tag|>",),
    "qwen3_coder": ("<tool_call>", OPENER),
}
_MARKS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "llama3": ("<|python_tag|>",),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "harmony": HARMONY_MARKS,
}
_CLOSERS = {"hermes": "</tool_call>", "mistral": "]", "qwen3_coder": "</tool_call>"}
_UNMARKED = ("llama3", "hermes")  # an answer that is such an object is a call; small Qwen models forget the marks
_LONGEST_NAME = 300  # characters before a call's arguments
_SEPARATORS = {"hermes": "", "llama3": ";,", "mistral": ","}
_NAMED_ARGUMENTS = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")


def style_of(template: str) -> str:
    """Return the style of tool calls that a chat template teaches."""
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    if OPENER in template and "<parameter=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|eot_id|>" in template):
        return "llama3"
    return "none"


@dataclass(frozen=True)
class Style:
    """How answers of a request are to be read.

    Attributes:
        tools: one of `STYLES`; "none" where the request has no tools, but for "harmony". names: the tools' names.
        schemas: of their parameters, by their names.
        thinks: whether an answer may begin with reasoning. is_thinking: the prompt has opened it already.
    """

    tools: str = "none"
    names: frozenset[str] = frozenset()
    thinks: bool = False
    is_thinking: bool = False
    schemas: Mapping[str, Any] = field(default_factory=dict)

    @property
    def marks(self) -> Collection[str]:
        """The texts of tokens that parsing needs to see, even if they are special."""
        return (*_MARKS.get(self.tools, ()), *((THINK, THOUGHT) if self.thinks else ()))


def parser_of(style: Style) -> Parser:
    """Return what reads an answer."""
    return HarmonyParser(style.names) if style.tools == "harmony" else AnswerParser(style)


class AnswerParser:
    """See `events.Parser`."""

    def __init__(self, style: Style) -> None:
        self._style = style
        self._thinks, self._tools = style.thinks, style.tools
        self._buffer = ""
        self._step = self._think if style.is_thinking else self._start
        self._reader: CallReader | XmlReader | None = None
        self._is_marked = True  # whether what is read as a call was announced as one
        self.calls = self.complete_calls = 0

    @property
    def phase(self) -> Phase:
        """What the next text is part of."""
        if self._step == self._think:
            return "reasoning"
        return "undecided" if self._thinks and self._step == self._start else "answer"

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
            before, after = split(self._buffer, THOUGHT)
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
        openers = _OPENERS.get(self._tools)
        if openers is None:
            before, found, self._buffer = self._buffer, "", ""
        else:
            _, found = min(((at, each) for each in openers if (at := self._buffer.find(each)) >= 0), default=(0, ""))
            before, _, after = self._buffer.partition(found) if found else (self._buffer, "", "")
            if not found:
                before, after = split(before, *openers)
            shown = before.rstrip()  # the space is kept: perhaps a call follows
            self._buffer = after if found else before[len(shown) :] + after
            before = shown
        if before:
            events.append(Content(before))
        if found:
            self._is_marked, self._step = found != OPENER, self._call
            self._buffer = self._buffer if self._is_marked else OPENER + self._buffer
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
            self.complete_calls = self.calls
            self._buffer, self._reader, self._step = progress.rest, None, self._between
        return progress.rest is not None

    def _open(self) -> bool:
        """Find where the call's object begins, behind a list's bracket or a name; False if that is not there yet."""
        text = self._buffer.lstrip()
        if self._tools == "mistral":
            text = text.removeprefix("[").lstrip()
        if not text:
            return False
        if self._tools == "qwen3_coder":
            if OPENER.startswith(text) and text != OPENER:
                return False
            if text.startswith(OPENER):
                self._buffer, self._reader = text, XmlReader(self._style.schemas)
                return True
        elif text.startswith("{"):
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
        unmarked = self._tools in ("llama3", "mistral") or (self._tools == "hermes" and not self._is_marked)
        opens = unmarked and text.startswith("{")
        self._step = self._call if opens else self._text
        return True


class ThoughtCounter:
    """Counts the tokens of an answer that are reasoning, the marks around it among them."""

    def __init__(self, style: Style) -> None:
        tools = "harmony" if style.tools == "harmony" else "none"  # in all others reasoning comes first, or never
        self._parser: Parser | None = parser_of(replace(style, tools=tools))
        self._ends_with_it = tools == "none"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._undecided = 0
        self.count = 0

    def take(self, token: bytes) -> None:
        """Take the bytes of the next token."""
        if self._parser is None:
            return
        before = self._parser.phase
        self._parser.feed(self._utf8.decode(token))
        after = self._parser.phase
        if after == "undecided" and before != "reasoning":
            self._undecided += 1
        elif "reasoning" in (before, after):
            self.count += self._undecided + 1
            self._undecided = 0
        else:
            self._undecided = 0
        if after == "answer" and self._ends_with_it:
            self._parser = None
