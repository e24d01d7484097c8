"""Shares by speed and memory."""

from __future__ import annotations

import random

import pytest

from dllama_mpi.errors import ClusterError, UsageError
from dllama_mpi.model.recipe import WeightRecipe
from dllama_mpi.model.tensors import heads_axis
from dllama_mpi.startup.memory import Need, fitting, usable_bytes
from dllama_mpi.startup.opening import model_config
from dllama_mpi.startup.options import Kept
from dllama_mpi.startup.shares import MemoryPlan, fitting_shares, most_ranks, shards_of, split_line
from tests.small_models import DENSE, HYBRID, STATE

GB = 10**9
ONE_B = model_config("random:llama3.2-1b")  # 0.70 GB in q40
KEPT = Kept.of(WeightRecipe.parse("q40").formats(ONE_B))
PLENTY = 64 * GB


def plan(max_seq_len: int | None = 1024) -> MemoryPlan:
    """Return what decides the memory of the 1B shape."""
    return MemoryPlan(ONE_B, KEPT, 257, 1, max_seq_len)


def shares(speeds: list[float], free: list[int], names: str = "", max_seq_len: int | None = 1024) -> list[float]:
    """Return the shares of ranks on hosts a, b, ... with so many bytes free, which must sum to 1."""
    hosts = list(zip(names or "abcdefgh"[: len(free)], free, strict=True))
    found, _ = plan(max_seq_len).shares(speeds, hosts)
    assert sum(found) == pytest.approx(1)
    return found


def needed(found: list[float], free: list[int], max_seq_len: int = 1024) -> list[int]:
    """Return the bytes that each rank needs."""
    hosts = [(f"x{i}", f) for i, f in enumerate(free)]
    return [n.fixed + n.cache(max_seq_len) for n in plan().needs(shards_of(ONE_B, found), hosts)]


@pytest.mark.parametrize("speeds", [[1.0], [1.0, 1.0], [2.0, 1.0], [1e10, 5e9, 2.5e9], [7.0, 1.0, 1.0, 3.0]])
def test_in_proportion_to_speed(speeds: list[float]) -> None:
    found = shares(speeds, [PLENTY] * len(speeds))
    assert found == pytest.approx([s / sum(speeds) for s in speeds])


def test_a_host_short_of_memory_gets_what_fits_and_the_others_the_rest() -> None:
    free = [PLENTY, GB // 6, PLENTY]
    found = shares([1.0, 1.0, 2.0], free)
    assert found[1] < 0.25
    assert found[2] == pytest.approx(2 * found[0])
    sizes = needed(found, free)
    assert 0.85 * 0.95 * free[1] < sizes[1] <= 0.95 * free[1]


def test_which_hosts_are_bound_is_told() -> None:
    _, bound = plan().shares([1.0, 1.0], [("a", PLENTY), ("b", GB // 6)])
    assert bound == {"b"}
    _, bound = plan().shares([1.0, 1.0], [("a", PLENTY), ("b", PLENTY)])
    assert bound == set()


def test_ranks_of_one_host_share_its_memory() -> None:
    free = [GB // 4, GB // 4, PLENTY]
    found = shares([1.0, 1.0, 1.0], free, "aab")
    assert found[0] == pytest.approx(found[1])
    assert sum(needed(found, free)[:2]) <= 0.95 * free[0]
    assert found[2] > 0.5


def test_what_one_bound_host_leaves_may_bind_the_next() -> None:
    free = [GB // 5, 3 * GB // 10, PLENTY]
    found = shares([1.0, 1.0, 1.0], free)
    for size, room in zip(needed(found, free), free, strict=True):
        assert size <= 0.95 * room
    assert found[0] < found[1] < found[2]


def test_every_rank_keeps_a_head() -> None:
    found = shares([1e12, 1.0, 1.0], [PLENTY] * 3)
    parts = shards_of(ONE_B, found)
    ranges = [p.units(heads_axis(ONE_B.attentions[0])) for p in parts]
    assert [last - first for first, last in ranges] == [30, 1, 1]


def test_the_most_ranks() -> None:
    assert most_ranks(ONE_B) == 32
    assert [most_ranks(c) for c in (DENSE, HYBRID, STATE)] == [8, 4, 8]
    with pytest.raises(UsageError, match="linear_num_value_heads is 4; 5 ranks asked for; use at most 4"):
        shards_of(HYBRID, [1.0] * 5)


def test_a_short_context_where_the_usual_one_does_not_fit() -> None:
    free = [GB // 2, GB // 2]  # the weights, but no 4096 positions
    found = shares([1.0, 1.0], free, max_seq_len=None)
    assert all(size <= 0.95 * room for size, room in zip(needed(found, free, 256), free, strict=True))


def test_where_nothing_fits_the_memory_check_says_so() -> None:
    hosts = [("a", GB // 10), ("b", GB // 10)]
    found, bound = plan().shares([3.0, 1.0], hosts)
    assert found == pytest.approx([0.75, 0.25])
    assert bound == set()
    with pytest.raises(ClusterError, match=r"rank 0 needs .* GB .*, a has 0\.10 GB free"):
        fitting(plan().needs(shards_of(ONE_B, found), hosts), plan().wish)


def test_the_same_everywhere() -> None:
    rng = random.Random(5)
    for _ in range(3):
        speeds = [rng.uniform(1, 50) for _ in range(5)]
        free = [int(rng.uniform(0.1, 1) * GB) for _ in range(5)]
        assert shares(speeds, free) == shares(speeds, free)


def test_what_fits_is_found_wherever_there_is_room() -> None:
    """Against arithmetic that is linear: shares of 1000 bytes."""

    def needs(given: list[float]) -> list[Need]:
        return [Need(name, int(1000 * s), 0, free) for name, s, free in zip("abc", given, rooms, strict=True)]

    rng = random.Random(6)
    for _ in range(50):
        rooms = [rng.randint(200, 900) for _ in range(3)]
        found, _ = fitting_shares([rng.uniform(1, 9) for _ in range(3)], [1], needs)
        fits = all(n.fixed <= usable_bytes([n]) for n in needs(found))
        assert fits or sum(rooms) * 0.95 < 1100


def test_the_line_says_speeds_and_shares() -> None:
    line = split_line(["n0", "n1"], [12.34e9, 6.17e9], [2 / 3, 1 / 3], {"n1"})
    assert line == ("split auto: rank 0 on n0 12.3 GB/s: 67%, rank 1 on n1 6.2 GB/s: 33% (all its memory holds)")
