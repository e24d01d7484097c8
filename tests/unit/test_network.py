"""Links as curves, and which hosts are measured."""

from __future__ import annotations

import pytest

from dllama_mpi.parallel.network import LinkCurve, host_pairs, interpolate, measure_links


def test_a_straight_link() -> None:
    link = LinkCurve.of(2e-3, 1e6)
    assert link.latency == 2e-3
    assert link.bytes_per_second == pytest.approx(1e6)
    assert link.seconds(0) == 2e-3
    assert link.seconds(500) == pytest.approx(2.5e-3)
    assert link.seconds(4e6) == pytest.approx(4.002)


def test_a_link_of_several_pieces() -> None:
    link = LinkCurve(((64.0, 1e-5), (1024.0, 2e-5), (2048.0, 6e-5)))
    assert link.seconds(1) == 1e-5
    assert link.seconds(544) == pytest.approx(1.5e-5)
    assert link.seconds(1024) == pytest.approx(2e-5)
    assert link.seconds(1536) == pytest.approx(4e-5)
    assert link.seconds(3072) == pytest.approx(1e-4)
    assert link.bytes_per_second == pytest.approx(1984 / 5e-5)


def test_one_point_is_a_constant() -> None:
    assert interpolate(((8.0, 3.0),), 1) == interpolate(((8.0, 3.0),), 99) == 3.0


def test_pairs_of_hosts() -> None:
    assert host_pairs(["a"]) == []
    assert host_pairs(["b", "a"]) == [("a", "b")]
    assert host_pairs(["b", "a", "b"]) == [("a", "b"), ("b", "b")]
    assert len(host_pairs("abcd")) == 6


def test_one_process_has_no_links() -> None:
    assert measure_links(None, ["a"]) == {}
