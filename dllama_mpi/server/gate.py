"""What stands before all routes: the Host and Origin checks, API keys, the limits on bodies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .http import JSONAnswer

DISCARD_SECONDS, DISCARDED = 2.0, 4  # of bodies that are refused: how long, and how many times the limit, they are read
LEAST_RATE = 1000.0  # bytes a second of a body, once it has taken longer than it may pause


@dataclass(frozen=True)
class GateOptions:
    """Who may come in, and with how much.

    Attributes:
        keys: API keys; none: everybody may. hosts: names that a Host header may have beside addresses; "*": any.
        origins: of pages elsewhere that may call; "*": any. open_paths: without a key.
        body_bytes: the most a body may have. body_seconds: that it may pause; besides, it must come at LEAST_RATE.
    """

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset({"localhost"})
    origins: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset()
    body_bytes: int = 10_000_000
    body_seconds: float = 30.0


class Gate:
    """ASGI middleware that lets in what may come in."""

    def __init__(self, app: ASGIApp, options: GateOptions, count: Callable[[int], None]) -> None:
        self._app, self._options, self._count = app, options, count
        self._digests = [_digest(key) for key in options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            self._check_origin(headers)
            if scope["path"] not in self._options.open_paths and scope["method"] != "OPTIONS":
                self._check_key(headers)
            self._check_length(headers)
        except ApiError as error:
            if "expect" not in headers:  # such a client waits, before it sends, for what is said here
                await self._discard(receive)
            answer = JSONAnswer(error.body(scope["path"]), error.status, {**error.headers, "Connection": "close"})
            await answer(scope, receive, counting)
            return
        await self._app(scope, self._limited(receive), counting)

    def _check_host(self, headers: Headers) -> None:
        """Refuse names that are not ours: a page elsewhere may have its name resolved to this address."""
        host = headers.get("host")
        if host is None or "*" in self._options.hosts:
            return
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name.lower() not in self._options.hosts and not _is_address(name):
            raise ApiError(403, f"the host {host[:200]!r} is not served here; start with --allow-host to add it")

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self._options.origins or origin in self._options.origins:
            return
        if origin.partition("://")[2] != headers.get("host"):
            raise ApiError(403, f"pages of {origin[:200]!r} may not call; start with --cors-origin to let them")

    def _check_key(self, headers: Headers) -> None:
        if not self._digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given)
        # Every key is compared, in the same time whatever they have in common.
        if not sum(hmac.compare_digest(digest, own) for own in self._digests):
            said = "this API key is not known" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._options.body_bytes):
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._options.body_bytes} bytes", code="body_too_large")

    async def _discard(self, receive: Receive) -> None:
        """Read the rest of a body that is refused, within bounds: a client that still sends may lose the answer."""

        async def read() -> None:
            size, more = 0, True
            while more and size <= DISCARDED * self._options.body_bytes:
                message = await receive()
                size, more = size + len(message.get("body", b"")), message.get("more_body", False)

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), DISCARD_SECONDS)

    def _limited(self, receive: Receive) -> Receive:
        read, more, began = 0, True, time.monotonic()

        async def limited() -> Any:
            nonlocal read, more
            if not more:
                return await receive()
            pause = self._options.body_seconds
            left = pause + read / LEAST_RATE - (time.monotonic() - began)
            try:
                message = await asyncio.wait_for(receive(), max(0.0, min(pause, left)))
            except asyncio.TimeoutError:
                raise ApiError(408, "the body has not come in time", headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                read, more = read + len(message.get("body", b"")), message.get("more_body", False)
                if read > self._options.body_bytes:
                    if more:
                        await self._discard(receive)
                    raise self._too_large()
            return message

        return limited


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def known_hosts(names: Collection[str], own: str) -> frozenset[str]:
    """Return the names that a Host header may have: this machine's and the given ones."""
    short = own.split(".")[0].lower()
    return frozenset({"localhost", short, own.lower(), f"{short}.local", *(name.lower() for name in names)})
