"""Conversations with a server that runs elsewhere: chat --url."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ..errors import RequestError, UsageError

KEY_VARIABLE = "DLLAMA_MPI_API_KEY"
_SECONDS = 600.0  # without a byte, after which the server counts as lost; it sends comments meanwhile


class Remote:
    """A server with OpenAI's API.

    Raises:
        UsageError: the URL is none.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {url} is no address of a server; give one such as http://127.0.0.1:9990")
        self.url = url
        self._parts, self._path = parts, parts.path.rstrip("/").removesuffix("/v1")
        key = key or os.environ.get(KEY_VARIABLE)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._socket: socket.socket | None = None
        self._is_stopped = False

    def _open(self, method: str, path: str, body: Any = None) -> tuple[http.client.HTTPConnection, Any]:
        make = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        try:
            connection = make(str(self._parts.hostname), self._parts.port, timeout=_SECONDS)
            data = None if body is None else json.dumps(body).encode("utf-8", "replace")
            connection.request(method, self._path + path, data, self._headers)
            self._socket = connection.sock
            answer = connection.getresponse()
        except (OSError, ssl.SSLError, http.client.HTTPException) as error:
            raise RequestError(f"{self.url} cannot be reached: {error}") from None
        if answer.status != 200:
            said = answer.read()
            connection.close()
            raise RequestError(_message(answer.status, said))
        return connection, answer

    def model(self) -> str:
        """Return the name of the model that is served.

        Raises:
            RequestError: the server cannot be reached, or refuses.
        """
        connection, answer = self._open("GET", "/v1/models")
        with contextlib.closing(connection):
            try:
                return str(json.loads(answer.read())["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise RequestError(f"{self.url} has no models; is it a server of this kind?") from None

    def stream(self, body: Mapping[str, Any], timings: dict[str, Any]) -> Iterator[tuple[str, bool]]:
        """Yield an answer's text as it comes, each piece with whether it is more than reasoning.

        timings: filled with what the server tells of times.

        Raises:
            RequestError: the server cannot be reached, refuses, or breaks off.
        """
        self._is_stopped = False
        connection, answer = self._open("POST", "/v1/chat/completions", {**body, "stream": True})
        with contextlib.closing(connection):
            try:
                for line in answer:
                    if line == b"data: [DONE]\n":
                        return
                    if line.startswith(b"data: "):
                        yield from _text(json.loads(line[6:]), timings)
            except (OSError, ValueError, http.client.HTTPException) as error:
                if not self._is_stopped:
                    raise RequestError(f"{self.url} has broken off: {error}") from None
            if not self._is_stopped:
                raise RequestError(f"{self.url} has broken off")

    def stop(self) -> None:
        """End the answer that is being read. Safe in a signal handler."""
        self._is_stopped = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _text(chunk: dict[str, Any], timings: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    if "error" in chunk:
        raise RequestError(str(chunk["error"].get("message")))
    timings.update(chunk.get("timings") or {})
    for choice in chunk["choices"]:
        delta = choice["delta"]
        for name in ("reasoning_content", "content"):
            if text := delta.get(name):
                yield text, name == "content"


def _message(status: int, said: bytes) -> str:
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the server answers {status}"
