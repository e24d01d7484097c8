"""The process that renders chat templates: one for all, begun with the first template, ended when it takes too much."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

PROGRAM = Path(__file__).with_name("template_program.py")
# Isolated, then with the paths of this process, so that it finds the same jinja2.
START = "import runpy, sys; sys.path[:] = sys.argv[3:]; runpy.run_path(sys.argv[1], run_name='__main__')"
# What it may know of this process's environment.
ENVIRONMENT = ("PATH", "HOME", "TZ", "LANG", "LC_ALL", "LC_CTYPE", "LC_TIME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
LONGEST_SECONDS = 5.0  # of processor time
LONGEST_WAIT = 60.0  # seconds for an answer, of a process that has no processor, or has been stopped
LONGEST_ANSWER = 256 << 20  # bytes


class EndedError(Exception):
    """The process was ended before it answered, or not started; the message says why: "takes longer than ..."."""


class TemplateProcess:
    """Ask for templates to be compiled and rendered; safe to use from any thread, one question at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sources: dict[str, str] = {}

    def check(self, sources: Mapping[str, str]) -> dict[str, Any]:
        """Compile templates and return the program's answer: {} if they can be used.

        Raises:
            EndedError: compiling takes too long.
        """
        with self._lock:
            return self._compile(sources)

    def render(self, sources: Mapping[str, str], name: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Render one of the templates and return the program's answer, whose "text" is the prompt.

        Raises:
            EndedError: it takes too long, or the process died of it.
            TypeError, ValueError: the variables are more than JSON can say.
        """
        request = _message({"name": name, "variables": variables})
        with self._lock:
            if self._process is None or self._sources != sources:
                broken = self._compile(sources)
                if broken:
                    return broken
            return self._ask(request)

    def close(self) -> None:
        """End the process; it starts again when it is needed."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _compile(self, sources: Mapping[str, str]) -> dict[str, Any]:
        self._sources = {}
        answer = self._ask(_message({"sources": dict(sources)}))
        if not answer:
            self._sources = dict(sources)
        return answer

    def _ask(self, request: bytes) -> dict[str, Any]:
        process = self._process
        if process is None:
            process = self._process = _started()
        try:
            answer = _exchange(process, request)
        except (EOFError, BrokenPipeError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LONGEST_WAIT)
            status = process.returncode
            self.close()
            if status == -signal.SIGPROF:
                raise EndedError(f"takes longer than {LONGEST_SECONDS:g} s") from None
            how = f"by signal {-status}" if status is not None and status < 0 else f"with status {status}"
            raise EndedError(f"ends the process that renders it, {how}") from None
        except TimeoutError:
            self.close()
            raise EndedError(f"takes longer than {LONGEST_WAIT:g} s") from None
        except BaseException:  # such as Ctrl-C: the answer would be taken for that of the next question
            self.close()
            raise
        if "exceeds" in answer:  # and has the memory now
            self.close()
        return answer


def _started() -> subprocess.Popen[bytes]:
    """Start the program, in a session of its own: what a terminal sends to this one does not reach it.

    Raises:
        EndedError: it cannot be started.
    """
    command = [sys.executable, "-I", "-c", START, str(PROGRAM), str(LONGEST_SECONDS), *sys.path]
    environment = {name: value for name, value in os.environ.items() if name in ENVIRONMENT}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nothing, bufsize=0, env=environment, start_new_session=True
        )
    except OSError as error:
        raise EndedError(f"needs a process of its own, which cannot be started: {error}") from None
    for end in (process.stdin, process.stdout):
        if end is not None:
            os.set_blocking(end.fileno(), False)
    return process


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> dict[str, Any]:
    """Send a message and return the answer.

    Raises:
        EOFError, BrokenPipeError: the process ended. TimeoutError: it did not answer.
    """
    if process.stdin is None or process.stdout is None:
        raise EOFError
    end = time.monotonic() + LONGEST_WAIT
    rest = memoryview(request)
    while rest:
        _wait(process.stdin.fileno(), selectors.EVENT_WRITE, end)
        rest = rest[os.write(process.stdin.fileno(), rest) :]
    answer = bytearray()
    while len(answer) < 8 or len(answer) < 8 + int.from_bytes(answer[:8], "little"):
        if len(answer) >= 8 and int.from_bytes(answer[:8], "little") > LONGEST_ANSWER:
            raise TimeoutError
        _wait(process.stdout.fileno(), selectors.EVENT_READ, end)
        piece = os.read(process.stdout.fileno(), 1 << 20)
        if not piece:
            raise EOFError
        answer += piece
    found: dict[str, Any] = json.loads(answer[8:].decode("utf-8", "surrogatepass"))
    return found


def _wait(descriptor: int, event: int, end: float) -> None:
    """Return when a pipe can be used.

    Raises:
        TimeoutError: that is not before `end`.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, event)
        if not selector.select(max(0.0, end - time.monotonic())):
            raise TimeoutError


def _message(content: Any) -> bytes:
    body = json.dumps(content, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(8, "little") + body


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a template cannot be given a {type(value).__name__}")


PROCESS = TemplateProcess()
atexit.register(PROCESS.close)
