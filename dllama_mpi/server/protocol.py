"""Uvicorn's protocol, with a time limit on the head of a request."""

from __future__ import annotations

import asyncio
from typing import Any

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
except ImportError:  # the parser in C is not there
    from uvicorn.protocols.http.h11_impl import H11Protocol as Base  # type: ignore[assignment]


def timed_protocol(seconds: float) -> type[asyncio.Protocol]:
    """Return the protocol class that closes a connection whose request's head takes longer than this."""

    class TimedProtocol(Base):
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expected()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                if self._limit is None:
                    self._expect()
            else:
                self._expected()

        def _expect(self) -> None:
            self._limit = self.loop.call_later(seconds, self._expire)

        def _expected(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _expire(self) -> None:
            self._limit = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return TimedProtocol
