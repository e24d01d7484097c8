"""The program that renders chat templates, in a process of its own; started by template_process.py.

A template is a program that a stranger wrote. Jinja's sandbox keeps it from Python's internals, not from using
time and memory. So it runs where it can be ended: with little memory, little processor time, and no files to open.

It reads requests from standard input and answers on standard output, each a length of 8 bytes and JSON. It imports
the standard library and jinja2 alone.
"""

from __future__ import annotations

import codecs
import contextlib
import html
import json
import os
import pprint
import resource
import signal
import sys
import textwrap
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.constants
import jinja2.debug
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_PROMPT = 16_000_000  # characters
# And of what it is made of: so many for each byte that a template is given, after so many of its own.
PER_BYTE, OF_ITS_OWN = 8, 300_000
MOST_MEMORY = 512 << 20  # bytes beyond what the program has when it starts
LONGEST_ERROR = 500  # characters
# Modules that jinja2 imports when a template first needs them, when no file can be opened any more.
PRELOADED = (
    jinja2.constants,
    jinja2.debug,
    html,
    pprint,
    textwrap,
    codecs.lookup("unicode_escape"),
    codecs.lookup("ascii"),
)


class _RefusedError(jinja2.TemplateError):
    """Raised by a template's own `raise_exception`."""


class _GenerationTag(Extension):
    """Accept `{% generation %}...{% endgeneration %}`, which marks answers for training, as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> Node | list[Node]:
        """Return the marked statements themselves."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Build the sandbox; it allows no access to Python's internals and no change to the messages."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = _strftime_now
    return found


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as models saw it in training: Jinja's own filter escapes <, >, & and ' for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class Renderer:
    """The templates that were compiled last, by name."""

    def __init__(self) -> None:
        self._environment = environment()
        self._templates: dict[str, jinja2.Template] = {}

    def answer(self, request: Mapping[str, Any], size: int) -> dict[str, Any]:
        """Compile or render what a request of so many bytes asks for; errors of the template are part of the answer."""
        try:
            if "sources" in request:
                compiled = {name: self._environment.from_string(text) for name, text in request["sources"].items()}
                self._templates = compiled
                return {}
            return self._render(
                request["name"], request["variables"], min(LONGEST_PROMPT, OF_ITS_OWN + PER_BYTE * size)
            )
        except jinja2.TemplateSyntaxError as error:
            return {"broken": f"is broken in line {error.lineno}: {_short(error.message)}"}
        except _RefusedError as error:
            return {"refused": _short(error.message)}
        except MemoryError:
            return {"exceeds": f"takes more than {MOST_MEMORY >> 20} MB of memory"}
        except Exception as error:  # the template is the model's program; the messages are the user's
            return {"failed": f"{type(error).__name__}: {_short(str(error))}"}

    def _render(self, name: str, variables: Mapping[str, Any], most: int) -> dict[str, Any]:
        pieces, length = [], 0
        for piece in self._templates[name].generate(variables):
            length += len(piece)
            if length > most:
                return {"exceeds": f"makes more than {most} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}


def _short(text: str | None) -> str:
    return str(text)[:LONGEST_ERROR]


def limit() -> None:
    """Give up, for good, more memory, other processes, opening files, and writing to any but the pipe that is open."""
    time.localtime()  # reads the time zone's file
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_AS, _memory_in_use() + MOST_MEMORY),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS takes no limit of the address space
            resource.setrlimit(what, (most, most))


def _memory_in_use() -> int:
    """Return the bytes of address space that the process has."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return MOST_MEMORY


def read_message(stream: BinaryIO) -> tuple[Any, int]:
    """Return what the next message says and its bytes, or None and 0 at the end of the stream."""
    length = int.from_bytes(stream.read(8), "little")
    return (json.loads(stream.read(length).decode("utf-8", "surrogatepass")) if length else None), length


def message(content: Any) -> bytes:
    """Return what `read_message` reads."""
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(8, "little") + body


def main(longest_seconds: float) -> None:
    """Answer requests until there are no more; one that takes longer, in processor time, ends the program."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    requests, answers = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    renderer = Renderer()
    limit()
    while True:
        request, size = read_message(requests)
        if request is None:
            return
        signal.setitimer(signal.ITIMER_PROF, longest_seconds)
        answer = renderer.answer(request, size)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(message(answer))
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(MemoryError):
        main(float(sys.argv[2]))
    sys.exit()
