"""What ranks did, told to several who want to know, each of whom gets all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from dllama_mpi.server import cluster
from dllama_mpi.server.cluster import ClusterView
from dllama_mpi.server.metrics import Metrics, RankSeconds

T = TypeVar("T")


@dataclass
class Loop:
    """Steps like the engine's loop: two ranks compute and wait some milliseconds in each."""

    steps: int = 0
    asked: int = 0
    since: int = 0  # steps since they were asked
    is_busy: bool = False
    calls: list[Callable[[], Any]] = field(default_factory=list)

    def step(self, count: int = 1) -> None:
        self.steps, self.since = self.steps + count, self.since + count

    def ranks(self) -> list[dict[str, Any]]:
        self.asked += 1
        n, self.since = self.since, 0
        return [{"rank": r, "host": f"pi{r}", "compute_ms": 3.0 * n, "wait_ms": 1.0 * n, "share": 0.5} for r in (0, 1)]

    async def between(self, function: Callable[[], T]) -> T:
        while self.is_busy:
            await asyncio.sleep(0.001)
        return function()


@pytest.fixture(autouse=True)
def _never_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "FRESH_SECONDS", 0.0)


def started() -> tuple[Any, Any, ClusterView]:
    """Return an engine's loop, the model that is served, and a view of them."""
    loop = Loop()
    return loop, SimpleNamespace(ranks=loop.ranks, details={}), ClusterView()


def test_view_and_scrape_do_not_take_from_each_other() -> None:
    async def run() -> None:
        loop, served, view = started()
        loop.step(2)
        assert [each.compute for each in await view.sums(served, loop)] == [pytest.approx(0.006)] * 2
        loop.step(3)
        assert [(e["compute_ms"], e["wait_ms"]) for e in await view.ranks(served, loop)] == [pytest.approx((15, 5))] * 2
        loop.step(1)
        assert [each.wait for each in await view.sums(served, loop)] == [pytest.approx(0.006)] * 2
        assert (await view.ranks(served, loop))[1]["compute_ms"] == pytest.approx(3)
        assert (await view.ranks(served, loop))[1]["compute_ms"] == pytest.approx(0)

    asyncio.run(run())


def test_a_scrape_leaves_an_idle_cluster_in_peace() -> None:
    async def run() -> None:
        loop, served, view = started()
        assert await view.sums(served, loop) == []
        loop.step()
        first = await view.sums(served, loop)
        assert await view.sums(served, loop) == first
        assert loop.asked == 1

    asyncio.run(run())


def test_a_scrape_does_not_wait_for_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SCRAPE_SECONDS", 0.01)

    async def run() -> None:
        loop, served, view = started()
        loop.step()
        known = await view.sums(served, loop)
        loop.step()
        loop.is_busy = True
        assert await view.sums(served, loop) == known
        loop.is_busy = False
        assert [each.compute for each in await view.sums(served, loop)] == [pytest.approx(0.006)] * 2

    asyncio.run(run())


def test_as_prometheus_reads_it() -> None:
    text = Metrics().text(None, [RankSeconds(1, "pi1", 2.5, 0.5)]).decode()
    assert 'dllama_rank_compute_seconds_total{host="pi1",rank="1"} 2.5' in text
    assert 'dllama_rank_wait_seconds_total{host="pi1",rank="1"} 0.5' in text
    assert "dllama_rank" not in Metrics().text(None).decode()
