"""Uvicorn's protocol, with bounds on what a connection may take: time for a head, bytes of it, time left unread."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from .errors import ApiError, unavailable
from .http import JSONAnswer, dumps

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
except ImportError:  # the parser in C is not there
    from uvicorn.protocols.http.h11_impl import H11Protocol as Base  # type: ignore[assignment]

LARGEST_HEAD = 1 << 16  # bytes, or as many more as come at once
_TELLS = hasattr(Base, "on_body")  # what it has parsed; the one in Python bounds heads itself
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_LOOKS = 4  # at what is unread, in the time that it may stay so


@dataclass(frozen=True)
class Bounds:
    """What a connection may take.

    Attributes:
        head_seconds: for a request's head. unread_seconds: that what was sent may stay unread without any progress.
        connections: at once; more are told to come back.
    """

    head_seconds: float = 15.0
    unread_seconds: float = 60.0
    connections: int = 2048


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer every request with 503."""
    error = unavailable("too many connections are open; try again later")
    answer = JSONAnswer(error.body(scope["path"]), error.status, {**error.headers, "Connection": "close"})
    await answer(scope, receive, send)


def _without_upgrade(data: bytes) -> bytes:
    """Return a request without its wish for another protocol: the parser in C would take its body for that."""
    head, found, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + found + rest if found else data


def bounded_protocol(bounds: Bounds) -> type[asyncio.Protocol]:
    """Return the protocol class that closes connections which take more."""

    class BoundedProtocol(Base):
        _limit: asyncio.TimerHandle | None = None
        _look: asyncio.TimerHandle | None = None
        _unread = _still = 0  # bytes at the last look, and how many looks they have been as many
        _is_within = not _TELLS  # whether a request has begun, and not ended
        _unparsed = 0  # bytes since a head or some of a body was complete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > bounds.connections:
                self.app = _overloaded
            self._expect()
            self._look_later()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expected()
            if self._look is not None:
                self._look.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._unparsed += len(data) if _TELLS else 0
            super().data_received(data if self._is_within else _without_upgrade(data))
            if self._unparsed > LARGEST_HEAD and not self.transport.is_closing():
                self._refuse(ApiError(431, f"the request's head is larger than {LARGEST_HEAD} bytes"))
            elif self.cycle is None or self.cycle.response_complete:
                if self._limit is None:
                    self._expect()
            else:
                self._expected()

        def on_message_begin(self) -> None:
            self._is_within = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._unparsed = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._unparsed = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._unparsed, self._is_within = 0, False
            super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, "this is no valid HTTP request"))

        def _refuse(self, error: ApiError) -> None:
            """Answer what is no request, unless another is being answered, and close."""
            if self.cycle is None or self.cycle.response_complete:
                body = dumps(error.openai()).encode()
                reason = {400: "Bad Request", 431: "Request Header Fields Too Large"}[error.status]
                head = f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json\r\n"
                head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                self.transport.write(head.encode() + body)
            self.transport.close()

        def _expect(self) -> None:
            self._limit = self.loop.call_later(bounds.head_seconds, self._expire)

        def _expected(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _expire(self) -> None:
            self._limit = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

        def _look_later(self) -> None:
            self._look = self.loop.call_later(bounds.unread_seconds / _LOOKS, self._look_at_unread)

        def _look_at_unread(self) -> None:
            unread = self.transport.get_write_buffer_size()
            self._still = self._still + 1 if unread and unread == self._unread else 0
            self._unread = unread
            if self._still >= _LOOKS:
                self.transport.abort()  # closing it would wait for the reader
            else:
                self._look_later()

    return BoundedProtocol
