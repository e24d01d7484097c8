"""Who holds what: ranges of heads, MLP columns and vocabulary rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from dllama_mpi.errors import UsageError
from dllama_mpi.parallel.partition import Range, Shard, cut, parse_split, shards

RANKS = range(1, 12)


def sizes(ranges: list[Range]) -> list[int]:
    """Return the ranges' sizes."""
    return [stop - start for start, stop in ranges]


def assert_covers(ranges: list[Range], units: int) -> None:
    """Check that ranges follow each other from 0 to `units`, none negative."""
    assert ranges[0][0] == 0
    assert ranges[-1][1] == units
    assert all(first[1] == second[0] for first, second in pairwise(ranges))
    assert all(start <= stop for start, stop in ranges)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("units", [0, 1, 2, 7, 16, 100, 4751])
def test_equal_shares_differ_by_one_at_most(units: int, ranks: int) -> None:
    ranges = cut(units, [1.0] * ranks)
    assert_covers(ranges, units)
    assert sizes(ranges) == sorted(sizes(ranges), reverse=True)
    assert max(sizes(ranges)) - min(sizes(ranges)) <= 1


def test_any_shares_cover_in_proportion() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        ranks, units = int(rng.integers(1, 10)), int(rng.integers(0, 200))
        shares = (10.0 ** rng.uniform(-2, 2, ranks)).tolist()
        ranges = cut(units, shares)
        assert_covers(ranges, units)
        for size, share in zip(sizes(ranges), shares, strict=True):
            assert abs(size - units * share / sum(shares)) < 1


def test_any_shares_leave_everybody_the_least() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        ranks, least = int(rng.integers(1, 10)), int(rng.integers(0, 4))
        units = ranks * least + int(rng.integers(0, 50))
        shares = (10.0 ** rng.uniform(-3, 3, ranks)).tolist()
        ranges = cut(units, shares, least)
        assert_covers(ranges, units)
        assert min(sizes(ranges)) >= least
        for (small, size), (large, other) in pairwise(sorted(zip(shares, sizes(ranges), strict=True))):
            assert small == large or size <= other + 1


@pytest.mark.parametrize(
    ("units", "shares", "least", "expected"),
    [
        (8, [3, 1], 0, [6, 2]),
        (8, [1, 3], 0, [2, 6]),
        (10, [1, 1, 1], 0, [4, 3, 3]),
        (10, [1, 2, 1], 0, [3, 5, 2]),  # a tie of remainders goes to the lower rank
        (4, [0.1, 0.1, 0.2], 0, [1, 1, 2]),
        (8, [100, 1, 1], 1, [6, 1, 1]),
        (3, [100, 1, 1], 1, [1, 1, 1]),
        (32, [3, 1], 1, [24, 8]),
        (1, [1, 1], 0, [1, 0]),
        (1, [1, 9], 0, [0, 1]),
    ],
)
def test_cut(units: int, shares: list[float], least: int, expected: list[int]) -> None:
    assert sizes(cut(units, shares, least)) == expected


def test_scale_of_shares_does_not_matter() -> None:
    assert cut(97, [3, 1, 2]) == cut(97, [0.3, 0.1, 0.2]) == cut(97, [3e9, 1e9, 2e9])


def test_too_few_units_for_the_least() -> None:
    with pytest.raises(UsageError, match="5 units cannot be cut into 3 parts of at least 2"):
        cut(5, [1, 1, 1], least=2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 3), (7, 1), (28, 4), (32, 8)])
@pytest.mark.parametrize(("inner", "vocab"), [(160, 160), (100, 163), (11008, 32000), (32, 16), (1, 1)])
def test_shards_cover_the_model(heads: int, kv_heads: int, inner: int, vocab: int) -> None:
    for ranks in range(1, heads + 1):
        for shares in ([1.0] * ranks, [float(rank + 1) for rank in range(ranks)], [0.05] + [1.0] * (ranks - 1)):
            parts = shards(heads, kv_heads, inner, vocab, shares)
            assert_covers([p.heads for p in parts], heads)
            assert_covers([p.intermediate for p in parts], inner)
            assert_covers([p.vocab for p in parts], vocab)
            check_units(parts, heads // kv_heads)


def check_units(parts: list[Shard], group: int) -> None:
    """Check that every rank has heads with exactly the KV heads they read, and ranges that begin at whole units."""
    for part in parts:
        assert part.heads[1] > part.heads[0]
        read = {head // group for head in range(*part.heads)}
        assert set(range(*part.kv_heads)) == read
        for start, stop in (part.intermediate, part.vocab):
            assert start <= stop
    for part in parts:
        empty = part.intermediate[0] == part.intermediate[1]
        assert empty or part.intermediate[0] % 32 == 0
        assert part.vocab[0] == part.vocab[1] or part.vocab[0] % 16 == 0


def test_shards_in_proportion() -> None:
    large, small = shards(32, 8, 11008, 32000, [3, 1])
    assert large == Shard(heads=(0, 24), kv_heads=(0, 6), intermediate=(0, 8256), vocab=(0, 24000))
    assert small == Shard(heads=(24, 32), kv_heads=(6, 8), intermediate=(8256, 11008), vocab=(24000, 32000))


def test_a_kv_head_cut_between_ranks_lives_on_both() -> None:
    first, second = shards(6, 3, 64, 64, [1, 1])
    assert (first.heads, second.heads) == ((0, 3), (3, 6))
    assert (first.kv_heads, second.kv_heads) == ((0, 2), (1, 3))


def test_ranks_without_columns_or_rows() -> None:
    parts = shards(4, 4, 40, 20, [1.0] * 4)
    assert [p.intermediate for p in parts] == [(0, 32), (32, 40), (40, 40), (40, 40)]
    assert [p.vocab for p in parts] == [(0, 16), (16, 20), (20, 20), (20, 20)]


def test_more_ranks_than_heads() -> None:
    with pytest.raises(UsageError, match="num_attention_heads is 28; 29 ranks asked for; use at most 28"):
        shards(28, 4, 64, 64, [1.0] * 29)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [(None, 3, [1, 1, 1]), ("3,1", 2, [3, 1]), ("1", 1, [1]), (" 0.5, 2e1 ,1", 3, [0.5, 20, 1])],
)
def test_parse_split(text: str | None, size: int, expected: list[float]) -> None:
    assert parse_split(text, size) == expected


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1;2", "0,1", "-1,2", "nan,1", "inf,1", "1,", "3:1"])
def test_a_split_that_is_no_list_of_positive_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="give positive numbers separated by commas, for example 3,1,1") as caught:
        parse_split(text, 2)
    assert f"--split {text}:" in str(caught.value)


def test_a_split_for_another_number_of_ranks() -> None:
    with pytest.raises(UsageError, match="--split 3,1 has 2 shares; the job has 3 ranks; give 3"):
        parse_split("3,1", 3)
