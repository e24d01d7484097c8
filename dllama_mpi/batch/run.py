"""Answering a batch: the server's routes, called without HTTP, in a thread beside the engine's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from ..engine.request import Output
from ..errors import UsageError
from ..server.app import build
from ..server.gate import GateOptions
from ..server.metrics import Metrics
from ..server.outbox import EngineLike, EngineLoop
from ..server.served import Served, State
from .answers import Answers, answer, failure
from .lines import BadLine, Line, Requests, parse
from .progress import Progress

_BODY_BYTES = 1 << 30
_TICK = 1.0
_UNAVAILABLE = 503  # what a request gets that came too late: it is asked again


@dataclass(frozen=True)
class BatchOptions:
    """How a batch is answered.

    Attributes:
        width: lines that are asked at once. is_ordered: whether answers are in the order of the lines.
        drain_timeout: seconds that running answers have when the batch is told to end.
    """

    width: int
    is_ordered: bool = False
    drain_timeout: float = 30.0


@dataclass
class _Made:
    """A line's answer, not yet on the disk; None: it could not be had, and is asked again in the next run."""

    data: bytes | None
    is_error: bool = False


class Batch:
    """A run over the lines that have no answer yet."""

    def __init__(
        self, requests: Requests, todo: Sequence[Line], answers: Answers, progress: Progress, options: BatchOptions
    ) -> None:
        self._requests, self._todo, self._answers = requests, todo, answers
        self._progress, self._options = progress, options
        self._state, self._metrics = State(), Metrics()
        self._app: ASGIApp = build(self._state, self._metrics, GateOptions(body_bytes=_BODY_BYTES))
        self._next = 0  # which of `todo` is asked next
        self._waiting: dict[int, _Made] = {}  # answers, by their place in `todo`
        self._written = 0  # of `todo`, where answers are in order
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._error: BaseException | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every line has its answer."""
        return self._progress.answered >= self._progress.total

    def run(self, engine: EngineLike, served: Served) -> None:
        """Answer all lines, or as many as there is time for before SIGTERM or SIGINT; in the engine's thread.

        Raises:
            UsageError: answers cannot be written.
        """
        started = threading.Event()

        def work() -> None:
            try:
                asyncio.run(self._work(engine, served, started))
            except BaseException as error:
                self._error = error
            finally:
                started.set()
                if self._state.engine is not None:
                    self._state.engine.end()

        thread = threading.Thread(target=work, name="batch", daemon=True)
        with self._signals():
            thread.start()
            started.wait()
            if self._state.engine is not None:
                self._state.engine.run()
            thread.join()
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """End early at SIGTERM and SIGINT."""

        def handler(_number: int, _frame: Any) -> None:
            if self._loop is not None and self._stop is not None:
                with contextlib.suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._stop.set)

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)

    async def _work(self, engine: EngineLike, served: Served, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._state.served, self._state.engine = served, EngineLoop(engine, self._loop, self._observe)
        self._state.phase = "ready"
        started.set()
        new = asyncio.Event()  # there is an answer to write
        askers = [asyncio.create_task(self._ask_all(new)) for _ in range(min(self._options.width, len(self._todo)))]
        asking: asyncio.Future[Any] = asyncio.gather(*askers)
        writing = asyncio.create_task(self._write_all(new))
        stopping = asyncio.create_task(self._stop.wait())
        ticking = asyncio.create_task(self._tick())
        try:
            working: set[asyncio.Future[Any]] = {asking, writing}
            await asyncio.wait({*working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not writing.done():
                await asyncio.wait(working, timeout=self._options.drain_timeout,
                                   return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
            for each in askers:
                each.cancel()
            await asyncio.gather(*askers, return_exceptions=True)
            self._next = len(self._todo) + 1  # nothing comes any more
            new.set()
            await writing
            for each in askers:
                if not each.cancelled() and each.exception() is not None:
                    raise each.exception()  # type: ignore[misc]  # it is not None
        finally:
            for task in (*askers, writing, stopping, ticking):
                task.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self._progress.tick()

    def _observe(self, output: Output, seconds: float | None) -> None:
        self._progress.output += len(output.token_ids)
        if output.usage is not None:
            self._progress.prompt += output.usage.prompt_tokens
        self._metrics.observe(output, seconds)

    # ---- asking

    async def _ask_all(self, new: asyncio.Event) -> None:
        assert self._stop is not None
        while self._next < len(self._todo) and not self._stop.is_set():
            at = self._next
            self._next += 1
            self._waiting[at] = await self._ask(self._todo[at])
            new.set()

    async def _ask(self, line: Line) -> _Made:
        data = await asyncio.to_thread(self._requests.read, line)
        try:
            ask = await asyncio.to_thread(parse, data, line.is_repeated)
        except BadLine as error:
            return _Made(failure(line.id, line.custom_id, error.code, str(error)), True)
        status, body = await post(self._app, ask.url, ask.body)
        if status == _UNAVAILABLE:
            return _Made(None)
        return _Made(answer(line.id, line.custom_id, status, json.loads(body)), status != 200)

    # ---- writing

    async def _write_all(self, new: asyncio.Event) -> None:
        while True:
            await new.wait()
            new.clear()
            is_last = self._next > len(self._todo)
            made = self._ready()
            lines = [each.data for each in made if each.data is not None]
            if lines:
                await asyncio.to_thread(self._answers.append, lines)
                self._progress.add(len(lines), sum(each.is_error for each in made))
            if is_last or self.is_whole:
                return

    def _ready(self) -> list[_Made]:
        """Take the answers that may be written."""
        if not self._options.is_ordered:
            found = list(self._waiting.values())
            self._waiting.clear()
            return found
        found = []
        while (made := self._waiting.get(self._written)) is not None and made.data is not None:
            found.append(self._waiting.pop(self._written))
            self._written += 1
        return found


async def post(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """Send a request to an application in this process; return the status and the body of its answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
        "client": None, "server": None,
    }  # fmt: skip
    is_sent, status, pieces = False, 500, []

    async def receive() -> dict[str, Any]:
        nonlocal is_sent
        if is_sent:
            await asyncio.get_running_loop().create_future()  # a client that stays
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(pieces)


def unanswered(requests: Requests, answers: Answers) -> list[Line]:
    """Return the lines that have no answer yet.

    Raises:
        UsageError: there are answers to other requests.
    """
    known = {line.id for line in requests.lines}
    strange = next((name for id, name in answers.done.items() if id not in known), None)
    if strange is not None:
        raise UsageError(
            f"--output {answers.path} answers {strange[:80]!r}, which the input does not ask, or no longer in"
            " these words; give another file"
        )
    return [line for line in requests.lines if line.id not in answers.done]
