"""Who holds what: ranges of heads, MLP columns and vocabulary rows."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from dllama_mpi.errors import UsageError
from dllama_mpi.parallel.partition import Axis, Range, Shard, cut, parse_split, shards

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


class Axes(NamedTuple):
    """The axes of a dense model; heads have 4 elements."""

    heads: Axis
    kv_heads: Axis
    inner: Axis
    vocab: Axis

    def cut(self, shares: list[float]) -> list[Shard]:
        """Return every rank's shard."""
        return shards([(self.heads, None), (self.kv_heads, self.heads), (self.inner, None), (self.vocab, None)], shares)


def axes(heads: int, kv_heads: int, inner: int, vocab: int) -> Axes:
    """Return the axes of a model."""
    return Axes(
        Axis("heads", heads, 4, 4 * heads, least=1, limit="num_attention_heads"),
        Axis("kv_heads", kv_heads, 4, 4 * kv_heads, group=heads // kv_heads),
        Axis.of("inner", inner, 32),
        Axis.of("vocab", vocab, 16),
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 3), (7, 1), (28, 4), (32, 8)])
@pytest.mark.parametrize(("inner", "vocab"), [(160, 160), (100, 163), (11008, 32000), (32, 16), (1, 1)])
def test_shards_cover_the_model(heads: int, kv_heads: int, inner: int, vocab: int) -> None:
    model = axes(heads, kv_heads, inner, vocab)
    for ranks in range(1, heads + 1):
        for shares in ([1.0] * ranks, [float(rank + 1) for rank in range(ranks)], [0.05] + [1.0] * (ranks - 1)):
            parts = model.cut(shares)
            assert [part.rank for part in parts] == list(range(ranks))
            for axis in (model.heads, model.inner, model.vocab):
                assert_covers([part.units(axis) for part in parts], axis.units)
                assert_covers([part.elements(axis) for part in parts], axis.total)
            for part in parts:
                check_units(part, model)


def check_units(part: Shard, model: Axes) -> None:
    """Check that a rank has heads with exactly the KV heads they read, and elements that are whole units."""
    first, last = part.units(model.heads)
    assert last > first
    group = model.heads.units // model.kv_heads.units
    assert set(range(*part.units(model.kv_heads))) == {head // group for head in range(first, last)}
    for axis in model:
        (first, last), (start, stop) = part.units(axis), part.elements(axis)
        assert 0 <= first <= last <= axis.units
        assert start == stop if first == last else start % axis.size == 0
        assert stop - start == sum(min(axis.size, axis.total - axis.size * unit) for unit in range(first, last))


def test_shards_in_proportion() -> None:
    model = axes(32, 8, 11008, 32000)
    large, small = model.cut([3, 1])
    assert [large.elements(axis) for axis in model] == [(0, 96), (0, 24), (0, 8256), (0, 24000)]
    assert [small.elements(axis) for axis in model] == [(96, 128), (24, 32), (8256, 11008), (24000, 32000)]
    assert [large.units(axis) for axis in model] == [(0, 24), (0, 6), (0, 258), (0, 1500)]


def test_a_kv_head_cut_between_ranks_lives_on_both() -> None:
    model = axes(6, 3, 64, 64)
    first, second = model.cut([1, 1])
    assert (first.units(model.heads), second.units(model.heads)) == ((0, 3), (3, 6))
    assert (first.units(model.kv_heads), second.units(model.kv_heads)) == ((0, 2), (1, 3))


def test_ranks_without_columns_or_rows() -> None:
    model = axes(4, 4, 40, 20)
    parts = model.cut([1.0] * 4)
    assert [part.elements(model.inner) for part in parts] == [(0, 32), (32, 40), (40, 40), (40, 40)]
    assert [part.elements(model.vocab) for part in parts] == [(0, 16), (16, 20), (20, 20), (20, 20)]


def test_axes_of_the_same_units_are_cut_alike() -> None:
    """Whatever a unit's size is in a tensor, the units are whose they are."""
    wide, narrow = Axis("heads", 7, 24, 7 * 24, least=1), Axis("heads", 7, 1, 7, least=1)
    for part in shards([(wide, None), (narrow, None)], [1, 5, 2]):
        assert part.units(wide) == part.units(narrow) == part.elements(narrow)


def test_more_ranks_than_heads() -> None:
    with pytest.raises(UsageError, match="num_attention_heads is 28; 29 ranks asked for; use at most 28"):
        axes(28, 4, 64, 64).cut([1.0] * 29)


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
