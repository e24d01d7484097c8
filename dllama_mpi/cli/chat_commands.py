"""The commands of a conversation: lines that begin with a slash."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RequestError, printable
from . import settings
from .conversation import Conversation

_ROLES = ("system", "user", "assistant")
_SHOWN = 60  # characters of a message


class Commands:
    """Does what a command says.

    Args:
        say: shows a line. reply: answers the conversation's last message; returns whether there was an answer.

    Attributes:
        keys: a line on keys for /help. is_over: whether the user wants to leave.
    """

    def __init__(self, conversation: Conversation, say: Callable[[str], None], reply: Callable[[], bool]) -> None:
        self._conversation, self._say, self._reply = conversation, say, reply
        self.keys, self.is_over = "", False
        self._table: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "show this", self._help),
            "/system": ("[TEXT]", "set the system message (none: have none), or show it", self._system),
            "/set": ("[NAME VALUE]", "set how tokens are chosen (default: reset it), or show it", self._set),
            "/save": ("FILE", "write the conversation into a file, as JSON", self._save),
            "/load": ("FILE", "go on with the conversation of a file", self._load),
            "/retry": ("", "answer the last message again", self._retry),
            "/undo": ("", "take back the last message and its answer", self._undo),
            "/reset": ("", "forget the conversation, but the system message", self._reset),
            "/stats": ("[steps]", "show figures of the last answer (steps: a line a token, too)", self._stats),
            "/quit": ("", "leave", self._quit),
        }

    @property
    def names(self) -> list[str]:
        """The commands' names, with their slashes."""
        return list(self._table)

    def run(self, line: str) -> None:
        """Do what a line says.

        Raises:
            RequestError: no such command, or it cannot be done.
        """
        name, _, rest = line.strip().partition(" ")
        if name not in self._table:
            first = name.split()[0]
            raise RequestError(f"unknown command {first}; /help lists them, a space before it makes it a message")
        self._table[name][2](rest.strip())

    def _help(self, _text: str) -> None:
        width = max(len(f"{command} {given}") for command, (given, _, _) in self._table.items())
        for command, (given, about, _) in self._table.items():
            self._say(f"{f'{command} {given}':<{width}}  {about}")
        self._say(self.keys)

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(None if text == "none" else text)
        else:
            self._say(self._conversation.system or "no system message; /system TEXT sets one")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            for line in settings.shown(self._conversation.settings()):
                self._say(line)
        elif not value:
            raise RequestError(f"/set {name} needs a value: /set NAME VALUE; /set alone shows all")
        else:
            self._conversation.take(settings.changed(self._conversation.args, name, value.strip()))

    def _save(self, name: str) -> None:
        path, messages = _path("/save", name), self._conversation.messages
        if not messages:
            raise RequestError("/save: nothing was said yet")
        try:
            _write(path, json.dumps(messages, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise RequestError(f"/save {name}: {error.strerror or error}") from None
        self._say(f"{path}: {len(messages)} messages")

    def _load(self, name: str) -> None:
        path = _path("/load", name)
        try:
            messages = _messages(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise RequestError(f"/load {name}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise RequestError(f"/load {name}: no conversation ({error})") from None
        conversation = self._conversation
        conversation.system = messages[0]["content"] if messages[0]["role"] == "system" else None
        conversation.messages = messages
        self._say(f"{path}: {len(messages)} messages; the last: {_short(messages[-1]['content'])}")

    def _retry(self, _: str) -> None:
        at = self._conversation.last_question()
        if at is None:
            raise RequestError("/retry: nothing was asked yet")
        before = self._conversation.cut(at + 1)
        if not self._reply():
            self._conversation.messages += before

    def _undo(self, _: str) -> None:
        at = self._conversation.last_question()
        if at is None:
            raise RequestError("/undo: nothing was asked yet")
        self._say(f"taken back: {_short(self._conversation.cut(at)[0]['content'])}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()

    def _stats(self, text: str) -> None:
        if text not in ("", "steps"):
            raise RequestError(f"/stats {text}: give steps or nothing")
        for line in self._conversation.figures(text == "steps"):
            self._say(line)

    def _quit(self, _: str) -> None:
        self.is_over = True


def _path(command: str, name: str) -> Path:
    if not name:
        raise RequestError(f"{command} needs a file: {command} FILE")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise RequestError(f"{command} {name}: {error}") from None


def _write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(number, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _messages(found: Any) -> list[dict[str, str]]:
    """Return a file's messages, a list or, as in a request, under "messages".

    Raises:
        ValueError: what is wrong with them.
    """
    if isinstance(found, dict):
        found = found.get("messages")
    if not isinstance(found, list) or not found:
        raise ValueError("it must be a list of messages")
    for number, each in enumerate(found, 1):
        if not isinstance(each, dict) or each.get("role") not in _ROLES:
            raise ValueError(f"message {number} needs a role: {', '.join(_ROLES)}")
        if not isinstance(each.get("content"), str):
            raise ValueError(f"message {number} needs a text as content")
        if each["role"] == "system" and number > 1:
            raise ValueError(f"message {number}: a system message must be the first")
    return [{"role": each["role"], "content": each["content"]} for each in found]


def _short(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
