"""What each rank did: lately, for the live view of the cluster, and in all, for Prometheus.

Asking the ranks begins their stopwatches anew. So what they say is added up, once, in the engine's thread; whoever
wants to know what happened since they were told last takes the difference of two sums.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from starlette.responses import Response

from .http import Call, JSONAnswer
from .metrics import RankSeconds, plain
from .outbox import EngineLoop
from .served import Served

FRESH_SECONDS = 1.5  # how long what the ranks have told is told again
SCRAPE_SECONDS = 2.0  # how long a scrape waits for a step to end, before it tells the sums as they were


class ClusterView:
    """Asks the ranks, not more often than every few seconds, and remembers what they said."""

    def __init__(self) -> None:
        self._asked = self._viewed = -FRESH_SECONDS
        self._steps = 0  # of the engine, when the ranks were asked
        self._latest: list[dict[str, Any]] = []
        self._sums: dict[int, RankSeconds] = {}
        self._told: dict[int, RankSeconds] = {}  # the sums when they were viewed last
        self._view: list[dict[str, Any]] = []
        self._lock = asyncio.Lock()

    async def ranks(self, served: Served, engine: EngineLoop) -> list[dict[str, Any]]:
        """Return each rank's host, share, and seconds of computing and waiting since the time before."""
        if served.ranks is None:
            return list(served.details.get("cluster", {}).get("ranks", []))
        async with self._lock:
            if time.monotonic() - self._viewed >= FRESH_SECONDS:
                await self._ask(served, engine)
                self._view = [each | self._since(each["rank"]) for each in self._latest]
                self._told, self._viewed = dict(self._sums), time.monotonic()
            return self._view

    async def sums(self, served: Served, engine: EngineLoop) -> list[RankSeconds]:
        """Return what each rank did since the server is ready, as far as it is known without waiting for long.

        Ranks are asked only where there were steps since the last time: those of an idle cluster are left in peace.
        """
        if served.ranks is not None and self._steps != engine.steps:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._locked(served, engine), SCRAPE_SECONDS)
        return list(self._sums.values())

    async def _locked(self, served: Served, engine: EngineLoop) -> None:
        async with self._lock:
            await self._ask(served, engine)

    async def _ask(self, served: Served, engine: EngineLoop) -> None:
        ask = served.ranks
        assert ask is not None

        def take() -> None:  # whole or not at all, whatever becomes of the call that wanted it
            steps, told = engine.steps, ask()
            sums = {each["rank"]: _added(self._sums.get(each["rank"]), each) for each in told}
            self._latest, self._sums, self._steps, self._asked = told, sums, steps, time.monotonic()

        if time.monotonic() - self._asked >= FRESH_SECONDS:
            await engine.between(take)

    def _since(self, rank: int) -> dict[str, float]:
        now, before = self._sums[rank], self._told.get(rank)
        return {
            "compute_ms": 1e3 * (now.compute - (before.compute if before is not None else 0.0)),
            "wait_ms": 1e3 * (now.wait - (before.wait if before is not None else 0.0)),
        }


def _added(before: RankSeconds | None, told: dict[str, Any]) -> RankSeconds:
    compute, wait = 1e-3 * told["compute_ms"], 1e-3 * told["wait_ms"]
    if before is not None:
        compute, wait = before.compute + compute, before.wait + wait
    return RankSeconds(told["rank"], told["host"], compute, wait)


async def cluster(call: Call) -> Response:
    """Tell what ranks and the engine are doing."""
    served, engine = call.context.state.ready()
    ranks = await call.context.cluster.ranks(served, engine)
    most = served.details.get("max_batch")
    return JSONAnswer({"ranks": ranks, "engine": plain(engine.engine.snapshot()), "max_batch": most})
