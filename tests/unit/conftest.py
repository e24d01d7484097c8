"""Fixtures of tests that load tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.one_rank import OneRank
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model
from tests.unit.loaded import Load


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Return what gives the directory of a case, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(case: Case) -> Path:
        return root / case.name if (root / case.name).exists() else write_model(case, root / case.name)

    return folder


@pytest.fixture(scope="module")
def load(folders: Callable[[Case], Path]) -> Load:
    """Return what loads a case on one rank and one thread, with a context of 64 positions."""

    def loaded(case: Case, **options: Any) -> OneRank:
        given: dict[str, Any] = {"weights": "f32", "nthreads": 1, "max_seq_len": 64} | options
        return OneRank(folders(case), **given)

    return loaded
