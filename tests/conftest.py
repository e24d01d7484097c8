"""What the whole test run shares: the order of tests, and the end of its MPI jobs."""

from __future__ import annotations

import hypothesis
import pytest

from tests.mpi.launch import dismiss_guard
from tests.mpi.pool import close_pools

# The same examples in every run, so that what passes once passes again.
hypothesis.settings.register_profile("tests", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

ORDER = ("unit", "mpi", "end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests of one process first: where kernels have to be compiled, it is done once, not by every rank."""
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(item.config.rootpath).parts[1]))


def pytest_unconfigure() -> None:
    """End the jobs that tests have shared, then whatever else is left."""
    close_pools()
    dismiss_guard()
