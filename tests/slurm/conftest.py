"""One cluster for all tests of the scripts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from numba import config

from dllama_mpi.kernels import runtime
from tests.mpi import guard
from tests.slurm.cluster import Cluster, cluster

NODES = 4


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    """Four nodes. Their kernels are those of this user's cache: compiling takes half a minute a node."""
    kernels = Path(config.CACHE_DIR).parents[1]  # type: ignore[attr-defined]  # set by `runtime`
    assert runtime.ISA
    with (
        tempfile.TemporaryDirectory(prefix=guard.folder_prefix(), ignore_cleanup_errors=True) as folder,
        cluster(NODES, Path(folder)) as made,
    ):
        made.env["DLLAMA_LOCAL"] = str(made.local / "dllama")
        for node in made.nodes:
            os.mkdir(made.own(node) / "dllama", 0o700)
            (made.own(node) / "dllama/kernels").symlink_to(kernels)
        yield made


@pytest.fixture
def place(tmp_path: Path, hosts: Cluster) -> Path:
    """A folder to submit from, whose name has a space."""
    folder = tmp_path / "my jobs"
    folder.mkdir()
    return folder
