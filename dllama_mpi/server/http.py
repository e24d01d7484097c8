"""What routes are made of: a call, its answer whole or as a stream of events, and what becomes of errors."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..log import say
from .errors import ApiError, invalid
from .metrics import Metrics
from .served import Served, State

T = TypeVar("T")
KEEP_ALIVE_SECONDS = 15.0  # of silence in a stream, before a comment
_TICK = 1.0
_LARGE = 1 << 16  # bytes of a body that is read beside the loop


@dataclass(frozen=True)
class Context:
    """What all routes share."""

    state: State
    metrics: Metrics
    store: Any = None  # of responses, see `responses.Store`
    cluster: Any = None  # see `cluster.ClusterView`


@dataclass(frozen=True)
class Call:
    """A request on its way: its body as the route's model has it, None for routes without one."""

    context: Context
    request: Request
    body: Any

    @property
    def served(self) -> Served:
        """The model."""
        return self.context.state.ready()[0]


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """A route and what the OpenAPI document says of it."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    is_open: bool = False  # without an API key


class JSONAnswer(Response):
    """A JSON object."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(dumps(content).encode("utf-8", "replace"), status, headers)


def dumps(value: Any) -> str:
    """Return a value as compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def event(data: Any, name: str | None = None) -> str:
    """Return one server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(data)}\n\n"


class EventStream(Response):
    """A stream of server-sent events, with comments where it is silent. `close` is called in any case.

    A client that has gone ends it; so does one that leaves what was sent unread, see `protocol.Bounds`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], path: str) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._path = events, close, path
        self._is_sending = False
        self._sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, receive, tasks.cancel_scope)
                tasks.start_soon(self._tend, send)
                await self._produce(send)
                tasks.cancel_scope.cancel()
        finally:
            self._close()

    async def _produce(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for text in self._events:
                await self._send(send, text)
        except ApiError as error:
            await self._send(send, self._failure(error))
        except Exception:
            say(traceback.format_exc().rstrip())
            await self._send(send, self._failure(ApiError(500, "the server has failed; its log says how")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _failure(self, error: ApiError) -> str:
        is_named = self._path.startswith(("/v1/messages", "/v1/responses"))
        return event(error.body(self._path), "error" if is_named else None)

    async def _send(self, send: Send, text: str) -> None:
        self._is_sending = True
        await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})
        self._sent, self._is_sending = time.monotonic(), False

    async def _watch(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _tend(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_TICK)
            if not self._is_sending and time.monotonic() - self._sent > KEEP_ALIVE_SECONDS:
                await self._send(send, ": keep-alive\n\n")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return what work comes to; it is cancelled if the client goes away.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watch.cancel()


async def answer_with(
    call: Call, close: Callable[[], None], events: Callable[[], AsyncIterator[str]], whole: Callable[[], Awaitable[Any]]
) -> Response:
    """Return a stream of events where the body asks for one, else one object. `close` is called once it is over."""
    if call.body.stream:
        return EventStream(events(), close, call.request.url.path)
    try:
        return JSONAnswer(await unless_gone(call.request, whole()))
    finally:
        close()


def endpoint(route: Route, context: Context, fields: frozenset[str]) -> Callable[[Request], Awaitable[Response]]:
    """Return a route as starlette calls it: the body checked, errors in the route's dialect."""

    async def call(request: Request) -> Response:
        try:
            body = None
            if route.body is not None:
                context.state.ready()
                body = await _body(await request.body(), route.body, fields)
            return await route.handler(Call(context, request, body))
        except ApiError as error:
            return JSONAnswer(error.body(route.path), error.status, error.headers)
        except ClientDisconnect:
            return Response(status_code=499)  # read by nobody
        except Exception:
            say(traceback.format_exc().rstrip())
            failure = ApiError(500, "the server has failed; its log says how")
            return JSONAnswer(failure.body(route.path), 500)

    return call


async def _body(data: bytes, model: type[BaseModel], fields: frozenset[str]) -> BaseModel:
    try:
        if len(data) > _LARGE:
            return await asyncio.to_thread(model.model_validate_json, data)
        return model.model_validate_json(data)
    except ValidationError as error:
        raise invalid(error, fields) from None
