"""What ranks say to each other first, and what of it keeps them from working together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dllama_mpi import __version__
from dllama_mpi.doctor import probe
from dllama_mpi.parallel.handshake import Hello, unlike

PI = Hello("pi0", "0.1.0", "0123456789ab", "3.11.2", "little")


def test_what_a_rank_says_can_be_read() -> None:
    own = Hello.own("host")
    assert own == Hello.read(own.written())
    assert own.version == __version__
    assert len(Hello("h\u00f6" * 200, *["v" * 200] * 4).written()) == len(own.written())


def test_sources_are_those_that_doctor_compares() -> None:
    found = probe.package("")
    assert found is not None
    assert Hello.own("host").sources == found["digest"]


def test_a_program_of_another_time_can_be_read() -> None:
    said = json.dumps({"host": "pi1", "version": "9.0", "more": [1, 2]}).encode().ljust(1024, b"\0")
    assert Hello.read(said) == Hello("pi1", "9.0", "", "", "")


def test_hosts_and_pythons_may_differ() -> None:
    assert unlike([PI, replace(PI, host="pc", python="3.13.1")]) is None


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            [replace(PI, host="pi1"), replace(PI, host="pi2", version="0.2.0")],
            "hosts run different versions of dllama_mpi: 0.1.0 (sources 0123456789ab) for rank 0 on pi0 and rank 1 on"
            " pi1, 0.2.0 (sources 0123456789ab) for rank 2 on pi2; install the same on all (doctor says how)",
        ),
        (
            [replace(PI, sources="")] * 5,
            "hosts run different versions of dllama_mpi: 0.1.0 (sources 0123456789ab) for rank 0 on pi0, 0.1.0 (sources"
            " unknown) for rank 1 on pi0 and rank 2 on pi0 and 3 more; install the same on all (doctor says how)",
        ),
        (
            [replace(PI, host="s390x", byteorder="big", version="0.2.0")],
            "processors whose bytes are in different orders cannot work together: little-endian for rank 0 on pi0,"
            " big-endian for rank 1 on s390x",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(others: list[Hello], said: str) -> None:
    assert unlike([PI, *others]) == said
