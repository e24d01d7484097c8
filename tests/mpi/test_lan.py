"""Several hosts on a network: the right text, and no more bytes than the algorithms need."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from dllama_mpi.parallel.collective.table import PAYLOADS
from tests.mpi.lan import Lan, lan
from tests.mpi.launch import ROOT
from tests.mpi.pool import pool

pytestmark = [pytest.mark.slow, pytest.mark.lan]
JOB = str(ROOT / "tests/mpi/lan_job.py")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    with lan(4, tmp_path_factory.mktemp("lan")) as made:
        yield made


@functools.cache
def alone() -> str:
    """Return the text of one rank."""
    found: dict[str, Any] = json.loads(pool(1).run([JOB]).stdout)
    return str(found["text"])


def result(hosts: Lan, ranks: int, *options: str) -> dict[str, Any]:
    """Return what the job prints on so many ranks."""
    done = hosts.mpiexec(ranks, [JOB, *options])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["hosts"] == [f"h{rank % hosts.size}" for rank in range(ranks)]
    return found


def least(algorithm: str, ranks: int, payload: int) -> float:
    """Return the bytes that a rank must send in an all-reduce."""
    if algorithm == "scatter":
        return 2 * (ranks - 1) / ranks * payload
    return {2: 1, 4: 2}[ranks] * payload if algorithm == "doubling" else (ranks - 1) * payload


@pytest.mark.parametrize("algorithm", ["direct", "scatter", "doubling", "auto"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_text_and_bytes(hosts: Lan, ranks: int, algorithm: str) -> None:
    for payload in ("f32", "q80"):
        found = result(hosts, ranks, f"sync={algorithm}", f"buffer_float_type={payload}")
        size = found["hidden"] // 32 * PAYLOADS[payload]
        used = found["algorithms"][0]
        assert algorithm in ("auto", used)
        bound = 1.05 * 2 * found["layers"] * max(least(used, ranks, size), size if used == "mpi" else 0) + 2000
        assert all(0 < sent <= bound for sent in found["sent_per_token"]), (found, bound)
        if payload == "f32":
            assert found["text"] == alone()


def test_several_ranks_a_host(hosts: Lan) -> None:
    """Two-level: only the first rank of each host talks to others."""
    found = result(hosts, 6, "sync=two-level", "buffer_float_type=f32")
    assert found["text"] == alone()
    rest = found["sent_per_token"][4:]
    assert max(rest) < min(found["sent_per_token"][:4])
