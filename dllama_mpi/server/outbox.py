"""Between the engine's thread and HTTP's loop: requests go in, each call's outputs come out at its reader's pace."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..engine.request import Output, Request
from .errors import ApiError, unavailable

T = TypeVar("T")
MOST_HELD = 4096  # outputs that wait for a reader; one that is further behind is cancelled
_IDLE_SECONDS = 0.5  # how long the engine sleeps before it looks whether the server is to end


class EngineLike(Protocol):
    """What the server needs of an engine, see `engine.engine.Engine`."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""

    def add(self, request: Request) -> int:
        """Queue a request; safe from any thread."""

    def cancel(self, id: int) -> None:
        """End a request; safe from any thread."""

    def step(self) -> list[Output]:
        """Do one step on all ranks."""

    def wait(self, timeout: float) -> Any:
        """Sleep until there is something to do."""

    def snapshot(self) -> Any:
        """Return what the engine is doing."""


@dataclass
class Task:
    """A request that is unfinished, for /slots.

    Attributes:
        started: as time.time() has it. output_tokens: so far. last: when its last output came, perf_counter seconds.
    """

    id: int
    prompt_tokens: int
    outbox: Outbox
    started: float = field(default_factory=time.time)
    output_tokens: int = 0
    last: float | None = None


class Outbox:
    """What has come of the requests of one HTTP call, for one reader on the loop."""

    def __init__(self, cancel: Callable[[int], None]) -> None:
        self._cancel = cancel
        self.ids: list[int] = []
        self._left: dict[int, int] = {}  # unfinished requests, and which of the call's they are
        self._held: deque[tuple[int, Output]] = deque()
        self._ready = asyncio.Event()
        self._error: ApiError | None = None

    def expect(self, id: int) -> None:
        """Await one more request's outputs."""
        self._left[id] = len(self.ids)
        self.ids.append(id)

    def put(self, output: Output) -> None:
        """Take an output of the engine."""
        if len(self._held) >= MOST_HELD:
            self.fail(unavailable("the client reads too slowly; the request was cancelled"))
            return
        index = self._left[output.id] if output.finish_reason is None else self._left.pop(output.id)
        self._held.append((index, output))
        self._ready.set()

    async def get(self) -> tuple[int, Output] | None:
        """Return the next (index, output), or None when every request has finished.

        Raises:
            ApiError: the reader was too slow, or the engine has failed.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._held:
                return self._held.popleft()
            if not self._left:
                return None
            self._ready.clear()
            await self._ready.wait()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        while (item := await self.get()) is not None:
            yield item

    def stop(self, index: int) -> None:
        """Cancel one request, whose last output will say so."""
        if self.ids[index] in self._left:
            self._cancel(self.ids[index])

    def close(self) -> None:
        """Cancel whatever has not finished."""
        for id in self._left:
            self._cancel(id)

    def fail(self, error: ApiError) -> None:
        """End with an error; whatever has not finished is cancelled."""
        self._error = self._error or error
        self._held.clear()
        self.close()
        self._ready.set()


class EngineLoop:
    """Runs an engine in its own thread, which alone calls MPI, and hands outputs to a loop's outboxes.

    Attributes:
        steps: how many steps there were.

    Methods but `run` and `end` belong to the loop's thread. `observe` sees every output, with the seconds since the
    request's last one (None for its first, and for those of a reader that has gone).
    """

    def __init__(
        self, engine: EngineLike, loop: asyncio.AbstractEventLoop, observe: Callable[[Output, float | None], None]
    ) -> None:
        self.engine, self._observe = engine, observe
        self._loop = loop
        self.steps = 0
        self._open: dict[int, Task] = {}
        self._between: deque[Callable[[], None]] = deque()
        self._ended = threading.Event()

    def submit(self, requests: Sequence[Request]) -> Outbox:
        """Queue requests and return where their outputs come; `release` it in the end.

        Raises:
            RequestError: the engine does not take one of them; none is queued then.
        """
        outbox = Outbox(self.engine.cancel)
        try:
            for request in requests:
                id = self.engine.add(request)
                outbox.expect(id)  # no output has come before: `_deliver` runs on this thread
                self._open[id] = Task(id, len(request.token_ids), outbox)
        except BaseException:
            self.release(outbox)
            raise
        return outbox

    def release(self, outbox: Outbox) -> None:
        """Cancel what has not finished, and await nothing more."""
        outbox.close()
        for id in outbox.ids:
            self._open.pop(id, None)

    @property
    def tasks(self) -> list[Task]:
        """The requests that are unfinished, oldest first."""
        return list(self._open.values())

    def _deliver(self, outputs: Sequence[Output]) -> None:
        now = time.perf_counter()
        for output in outputs:
            task = self._open.get(output.id)
            self._observe(output, None if task is None or task.last is None else now - task.last)
            if task is not None:
                task.last = now
                task.output_tokens += len(output.token_ids)
                if output.finish_reason is not None:
                    del self._open[output.id]
                task.outbox.put(output)

    def _fail(self, error: ApiError) -> None:
        for task in self.tasks:
            task.outbox.fail(error)
        self._open.clear()

    async def between(self, function: Callable[[], T]) -> T:
        """Return what a function returns that the engine's thread calls between two steps."""
        waiting: Future[T] = Future()

        def call() -> None:
            if waiting.set_running_or_notify_cancel():
                try:
                    waiting.set_result(function())
                except Exception as error:
                    waiting.set_exception(error)

        self._between.append(call)
        return await asyncio.wrap_future(waiting)

    def cancel_all(self) -> None:
        """Cancel every request; their outputs say so."""
        for id in list(self._open):
            self.engine.cancel(id)

    def run(self) -> None:
        """Step until `end`, then until every request is done. In the engine's thread."""
        engine = self.engine
        try:
            while not (self._ended.is_set() and engine.is_idle):
                if engine.is_idle and not self._between:
                    engine.wait(_IDLE_SECONDS)
                while self._between:
                    self._between.popleft()()
                self.steps += not engine.is_idle
                outputs = engine.step()
                if outputs:
                    self._call(self._deliver, outputs)
        except BaseException:
            self._call(self._fail, ApiError(500, "the engine has failed; the server ends"))
            raise

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(function, argument)

    def end(self) -> None:
        """Have `run` return once nothing is left to do. From any thread."""
        self._ended.set()
