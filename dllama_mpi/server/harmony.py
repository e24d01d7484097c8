"""gpt-oss's answers: messages in channels, each `<|channel|>NAME<|message|>TEXT<|end|>` behind `<|start|>assistant`.

The channel analysis is reasoning, final is the answer, commentary is for it too, unless it goes to a function: then the
message is a call (`commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`). The recipient may also
stand before the channel. `<|call|>` and `<|return|>` end the answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from .events import CallArguments, CallStart, Content, Event, Phase, Reasoning, call_id, split

MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
FINAL = re.compile(r"<\|channel\|>\s*final[^<]*(<\|constrain\|>[^<]*)?<\|message\|>")  # before the answer proper
_MESSAGE, _FUNCTIONS = "<|message|>", "functions."
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*([\w-]*)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_HEADS = ("<|start|>", "<|channel|>", "<|message|>", "to=", "assistant")  # what a message's header begins with
_LONGEST_HEADER = 1000  # characters


class HarmonyParser:
    """See `events.Parser`. names: of the tools; none: no message is a call."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._buffer = ""
        self._kind: Literal["header", "reasoning", "content", "call"] = "header"
        self._given: set[str] = set()  # kinds of which a message has had text
        self._told = False  # whether this message has had text
        self._calls = 0
        self.complete_calls = 0

    @property
    def phase(self) -> Phase:
        """What the next text is part of."""
        return "undecided" if self._kind == "header" else "reasoning" if self._kind == "reasoning" else "answer"

    def feed(self, text: str) -> list[Event]:
        """Take more text; return what is certain."""
        self._buffer += text
        events: list[Event] = []
        while self._header(events) if self._kind == "header" else self._body(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """Return what was held back; a header that was broken off is nothing."""
        rest, self._buffer = self._buffer, ""
        events: list[Event] = []
        if rest and self._kind != "header":
            self._tell(rest, events)
        if self._kind == "call":
            self._end_call(events)
        return events

    def _header(self, events: list[Event]) -> bool:
        header, found, after = self._buffer.partition(_MESSAGE)
        text = header.lstrip()
        begins = not text or any(text.startswith(head) or head.startswith(text) for head in _HEADS)
        if not begins or len(header) > _LONGEST_HEADER:
            self._kind, self._buffer = "content", text + found + after  # no message at all: it is shown
            return True
        if not found:
            return False
        self._buffer, self._told = after, False
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = recipient[1].removeprefix(_FUNCTIONS) if recipient is not None else ""
        if recipient is not None and self._names and (recipient[1].startswith(_FUNCTIONS) or name in self._names):
            self._kind = "call"
            events.append(CallStart(self._calls, call_id("harmony"), name))
            self._calls += 1
        elif recipient is not None or (channel is not None and channel[1] == "analysis"):
            self._kind = "reasoning"
        else:
            self._kind = "content"
        return True

    def _body(self, events: list[Event]) -> bool:
        places = [(at, mark) for mark in _ENDS if (at := self._buffer.find(mark)) >= 0]
        if not places:
            text, self._buffer = split(self._buffer, *_ENDS)
            self._tell(text, events)
            return False
        at, mark = min(places)
        self._tell(self._buffer[:at], events)
        if self._kind == "call":
            self._end_call(events)
        self._buffer = self._buffer[at if mark == "<|start|>" else at + len(mark) :]
        self._kind = "header"
        return True

    def _tell(self, text: str, events: list[Event]) -> None:
        if not text:
            return
        kind = self._kind
        if kind == "call":
            events.append(CallArguments(self._calls - 1, text))
        else:
            if not self._told and kind in self._given:
                text = "\n\n" + text
            events.append(Reasoning(text) if kind == "reasoning" else Content(text))
        self._told = True
        self._given.add(kind)

    def _end_call(self, events: list[Event]) -> None:
        if not self._told:
            events.append(CallArguments(self._calls - 1, "{}"))
        self.complete_calls = self._calls
