"""The live view of the cluster: what each rank did lately."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.responses import Response

from .http import Call, JSONAnswer
from .metrics import plain
from .outbox import EngineLoop
from .served import Served

FRESH_SECONDS = 1.5  # how long what the ranks have told is told again


class ClusterView:
    """Asks the ranks, not more often than every few seconds, and remembers what they said."""

    def __init__(self) -> None:
        self._asked = -FRESH_SECONDS
        self._ranks: list[dict[str, Any]] = []
        self._lock = asyncio.Lock()

    async def ranks(self, served: Served, engine: EngineLoop) -> list[dict[str, Any]]:
        """Return each rank's host, share, and seconds of computing and waiting since the time before."""
        if served.ranks is None:
            return list(served.details.get("cluster", {}).get("ranks", []))
        async with self._lock:
            if time.monotonic() - self._asked >= FRESH_SECONDS:
                self._ranks = await engine.between(served.ranks)
                self._asked = time.monotonic()
            return self._ranks


async def cluster(call: Call) -> Response:
    """Tell what ranks and the engine are doing."""
    served, engine = call.context.state.ready()
    ranks = await call.context.cluster.ranks(served, engine)
    most = served.details.get("max_batch")
    return JSONAnswer({"ranks": ranks, "engine": plain(engine.engine.snapshot()), "max_batch": most})
