"""The table of ranks: whom the others waited for, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dllama_mpi.engine.rank_report import (
    RankTimes,
    Stopwatch,
    pi_flags,
    reports,
    table_lines,
)
from dllama_mpi.parallel.star import StarLink

FAST = RankTimes(
    share=0.25,
    seconds=10.0,
    compute_seconds=8.0,
    wait_seconds=1.0,
    cpu_seconds=9.0,
    host_busy_seconds=9.0,
    host_stolen_seconds=0.0,
    processors=4,
    frequency_ghz=2.4,
    most_ghz=2.4,
)
SLOW = replace(FAST, compute_seconds=9.0, wait_seconds=0.1)
EAGER = replace(FAST, compute_seconds=5.0, wait_seconds=4.1)
HOSTS = ["pi0", "pi1", "pi2"]


def _remarks(times: list[RankTimes], links: list[StarLink | None] | None = None) -> list[str]:
    return [report.remark for report in reports(HOSTS[: len(times)], times, links)]


@pytest.mark.parametrize(
    ("slow", "words"),
    [
        (SLOW, "computes slowly"),
        (replace(SLOW, frequency_ghz=1.5), "computes slowly; at 1.5 of 2.4 GHz"),
        (replace(SLOW, slowed=("undervoltage", "throttled")), "computes slowly; undervoltage; throttled"),
        (replace(SLOW, host_busy_seconds=29.0), "computes slowly; other programs take 50% of its processors"),
        (replace(SLOW, host_stolen_seconds=8.0), "computes slowly; other virtual machines take 20%"),
        (replace(SLOW, frequency_ghz=None, most_ghz=None), "computes slowly"),
    ],
)
def test_the_slow_one_is_marked_with_the_cause(slow: RankTimes, words: str) -> None:
    assert _remarks([EAGER, slow, EAGER]) == ["", words, ""]


def test_the_slow_link_is_marked_when_all_wait() -> None:
    waiting = replace(FAST, compute_seconds=3.0, wait_seconds=6.0)
    links: list[StarLink | None] = [None, StarLink(50e-6, 118e6), StarLink(300e-6, 11.8e6)]
    assert _remarks([waiting] * 3, links) == ["", "", "slowest link: 94 Mbit/s, 300 us"]
    assert _remarks([EAGER, SLOW, EAGER], links) == ["", "computes slowly", ""]


def test_equals_are_told_so() -> None:
    assert _remarks([FAST, replace(FAST, compute_seconds=8.1)]) == ["", "slowest by a little"]


def test_alone_nobody_is_the_slowest() -> None:
    assert _remarks([FAST]) == [""]


def test_ranks_of_one_host_are_not_each_others_other_load() -> None:
    shared = replace(FAST, cpu_seconds=18.0, host_busy_seconds=36.0)
    assert [r.other_load for r in reports(["pi0", "pi0"], [shared, shared], None)] == [0.0, 0.0]
    assert [r.other_load for r in reports(["pi0", "pi1"], [shared, shared], None)] == [0.45, 0.45]


def test_the_table_has_a_line_for_each_rank() -> None:
    head, *rows = table_lines(
        reports(HOSTS, [EAGER, SLOW, EAGER], [None, StarLink(50e-6, 118e6), StarLink(60e-6, 117e6)])
    )
    assert head.split()[:3] == ["rank", "host", "share"]
    assert [row.split()[1] for row in rows] == HOSTS
    assert rows[1].endswith("944 Mbit/s 50 us  computes slowly")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("throttled=0x0\n", ()),
        ("throttled=0x50005\n", ("undervoltage", "throttled")),
        ("50000", ()),
        ("f", ("undervoltage", "frequency capped", "throttled", "temperature limit")),
        ("", ()),
        ("VCHI initialization failed", ()),
    ],
)
def test_firmware_flags(text: str, flags: tuple[str, ...]) -> None:
    assert pi_flags(text) == flags


def test_the_stopwatch_parts_compute_from_wait() -> None:
    watch = Stopwatch(0.5)
    watch.start()
    sum(range(10000))
    watch.gathered(1e-6)
    watch.stop(2e-6, is_decode=True)
    first, second = watch.report(), watch.report()
    assert first.share == 0.5
    assert first.wait_seconds == pytest.approx(3e-6)
    assert 0 < first.compute_seconds <= first.seconds
    assert second.compute_seconds == second.wait_seconds == 0
