"""What the whole test run shares: two workers, the order of tests, and the end of MPI jobs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.mpi.launch import dismiss_guard
from tests.mpi.pool import close_pools

# On a busy machine anything may take so long that it would be told, between lines that tests look at.
os.environ["DLLAMA_MPI_PROGRESS"] = "off"

# The same examples in every run, so that what passes once passes again.
hypothesis.settings.register_profile("tests", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

WORKERS = 2
FIRST = ("unit/test_convert.py", "unit/test_model.py", "unit/test_families.py")
"""Tests that compile what others need, and those that take longest."""


MANY, EVERY = 8, 4
"""Of a test with more cases than that, a tier tries every fourth, the next tier of the rest again every fourth."""


SHARING = ("mpi", "end_to_end", "documents")
"""Folders whose tests share jobs of ranks, or files."""

CHEAP = ("test_imports.py", "test_commands.py")
"""Files whose cases take next to no time each, or are few where they do."""


def thin_out(items: list[pytest.Item]) -> None:
    """Spread long lists of cases over the tiers: quick, slow, long. What is long is slow as well."""
    for tier, next_tier in ((None, "slow"), ("slow", "long")):
        cases: dict[tuple[str, str], list[pytest.Item]] = {}
        for item in items:
            of_tier = "long" if item.get_closest_marker("long") else "slow" if item.get_closest_marker("slow") else None
            if isinstance(item, pytest.Function) and of_tier == tier and item.path.name not in CHEAP:
                cases.setdefault((str(item.path), item.originalname), []).append(item)
        for some in cases.values():
            for i, item in enumerate(some if len(some) > MANY else ()):
                if i % EVERY:
                    item.add_marker(next_tier)
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")


def is_with_mpi(item: pytest.Item) -> bool:
    """Return whether a test starts MPI jobs."""
    return item.path.parent.name != "unit"


def place(item: pytest.Item) -> tuple[int, int]:
    """Return what tests are sorted by: one process compiles kernels before a job's ranks want them."""
    file = "/".join(item.path.parts[-2:])
    return (0, FIRST.index(file)) if file in FIRST else (1 + is_with_mpi(item), 0)


def pytest_configure() -> None:
    """Have the jobs of tests obey signals that this run ignores, as in the background: handlers end with exec."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Have two workers for a run of all tests of a tier; a few tests start sooner with none. -n says otherwise."""
    is_whole = config.args == config.getini("testpaths") and not config.option.keyword
    is_worker = hasattr(config, "workerinput")
    if getattr(config.option, "numprocesses", 0) is None and is_whole and not is_worker:
        config.option.numprocesses = 0 if config.option.usepdb or config.option.collectonly else WORKERS
        config.option.dist, config.option.loadscopereorder = "loadscope", False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests in order."""
    thin_out(items)
    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With workers, have a file's tests stay together, and those of a folder whose tests share jobs of ranks."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            return path.parent.name if path.parent.name in SHARING else str(path)

    return Scheduling(config, log)


def pytest_unconfigure() -> None:
    """End the jobs that tests have shared, then whatever else is left."""
    close_pools()
    dismiss_guard()
