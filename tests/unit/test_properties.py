"""What holds for any numbers: partition, the table's cuts, the bytes of a step, tiles."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dllama_mpi.engine.step import BIAS, ROW, Step, Want
from dllama_mpi.errors import UsageError
from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS, TileFormat, ceil_to
from dllama_mpi.kernels.quantize import NO_SCALES, pack_tiles, unpack_tiles, update_row_scales
from dllama_mpi.model.batch import Batch
from dllama_mpi.model.tensors import Cut, Kind, TensorSpec, part
from dllama_mpi.parallel.partition import Axis, Range, cut, shards
from tests import naive_formats
from tests.naive_numbers import Bytes, Floats

SHARES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)
every_format = pytest.mark.parametrize(
    "fmt", [FORMATS[name] for name in naive_formats.TILE_BYTES], ids=lambda fmt: fmt.name
)


def sizes(ranges: list[Range]) -> list[int]:
    """Return the ranges' sizes."""
    return [stop - start for start, stop in ranges]


# --------------------------------------------------------------------------------------------------------------------
# Partition
# --------------------------------------------------------------------------------------------------------------------


@given(units=st.integers(0, 5000), shares=SHARES)
def test_a_cut_is_contiguous_complete_and_in_proportion(units: int, shares: list[float]) -> None:
    ranges = cut(units, shares)
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert ranges[-1][1] == units
    for size, share in zip(sizes(ranges), shares, strict=True):
        assert abs(size - units * share / sum(shares)) < 1 + 1e-6


@given(spare=st.integers(0, 500), least=st.integers(0, 5), shares=SHARES)
def test_a_cut_leaves_everybody_the_least_and_more_to_larger_shares(
    spare: int, least: int, shares: list[float]
) -> None:
    ranges = cut(least * len(shares) + spare, shares, least)
    assert sum(sizes(ranges)) == least * len(shares) + spare
    assert min(sizes(ranges)) >= least
    for (small, fewer), (large, more) in pairwise(sorted(zip(shares, sizes(ranges), strict=True))):
        assert small == large or fewer <= more + 1


@given(units=st.integers(0, 40), least=st.integers(1, 5), shares=SHARES)
def test_a_cut_is_refused_just_when_there_is_too_little(units: int, least: int, shares: list[float]) -> None:
    if units >= least * len(shares):
        cut(units, shares, least)
        return
    with pytest.raises(UsageError, match=f"{units} units cannot be cut"):
        cut(units, shares, least)


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 6), head_dim=st.integers(1, 128), shares=SHARES)
def test_a_rank_holds_the_kv_heads_that_its_heads_read(
    kv_heads: int, group: int, head_dim: int, shares: list[float]
) -> None:
    units = kv_heads * group
    heads = Axis("heads", units, head_dim, units * head_dim, least=1, limit="heads")
    kv = Axis("kv_heads", kv_heads, head_dim, kv_heads * head_dim, group=group)
    axes = ((heads, None), (kv, heads))
    if len(shares) > units:
        with pytest.raises(UsageError, match=f"heads is {units}; {len(shares)} ranks"):
            shards(axes, shares)
        return
    found = shards(axes, shares)
    assert [shard.rank for shard in found] == list(range(len(shares)))
    assert found[0].units(heads)[0] == 0
    assert found[-1].units(heads)[1] == units
    assert all(a.units(heads)[1] == b.units(heads)[0] for a, b in pairwise(found))
    for shard in found:
        first, last = shard.units(heads)
        assert first < last
        assert shard.units(kv) == (first // group, (last - 1) // group + 1)
        assert shard.elements(heads) == (first * head_dim, last * head_dim)


# --------------------------------------------------------------------------------------------------------------------
# The table's cuts
# --------------------------------------------------------------------------------------------------------------------


@given(total=st.integers(1, 3000), size=st.sampled_from([1, 16, BLOCK, 40, 96]), shares=SHARES)
def test_rows_are_cut_once_and_completely(total: int, size: int, shares: list[float]) -> None:
    axis = Axis.of("inner", total, size)
    found = shards(((axis, None),), shares)
    for shape, kind in (((total,), Kind.VECTOR), ((total, 64), Kind.MATRIX), ((3, total, 64), Kind.MATRIX)):
        spec = TensorSpec("it", shape, kind, Cut.ROWS, axis)
        along = len(shape) - (2 if kind is Kind.MATRIX else 1)
        parts = [part(spec, shard) for shard in found]
        assert np.concatenate([np.arange(*p.ranges[along]) for p in parts]).tolist() == list(range(total))
        for p in parts:
            assert p.shape == shape
            assert all(p.ranges[i] == (0, n) for i, n in enumerate(shape) if i != along)


@given(units=st.integers(1, 40), size=st.sampled_from([8, 24, BLOCK, 40, 96, 128]), shares=SHARES)
def test_columns_begin_at_blocks_and_are_all_held(units: int, size: int, shares: list[float]) -> None:
    total = units * size
    axis = Axis("heads", units, size, total)
    spec = TensorSpec("it", (16, total), Kind.MATRIX, Cut.COLUMNS, axis)
    held = np.zeros(total, np.int64)
    for shard in shards(((axis, None),), shares):
        rows, (first, last) = part(spec, shard).ranges
        assert rows == (0, 16)
        assert first % BLOCK == 0
        assert last % BLOCK == 0 or last == total
        own = shard.elements(axis)
        if own[0] == own[1]:  # a rank without units holds no columns, not the block in which the axis ends
            assert first == last
            continue
        assert own[0] - BLOCK < first <= own[0]
        assert own[1] <= last < own[1] + BLOCK
        held[first:last] += own[0] < own[1]
    assert held.min() >= 1


# --------------------------------------------------------------------------------------------------------------------
# The bytes of a step
# --------------------------------------------------------------------------------------------------------------------

INTEGERS = st.integers(-(2**31), 2**31 - 1)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Return any batch."""
    tokens, rows = draw(st.integers(0, 20)), draw(st.integers(0, 8))
    columns = [draw(arrays(np.int32, size, elements=INTEGERS)) for size in (tokens, tokens, tokens, tokens, rows)]
    table = st.lists(st.integers(0, 2**20) | st.integers(5, 9), max_size=9)
    tables = draw(st.dictionaries(st.integers(0, 99), table | st.integers(0, 5).map(range), max_size=5))
    copies = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3)
    return Batch.of(columns[:4], columns[4], tables, draw(copies), draw(copies))


def assert_same(first: Batch, second: Batch) -> None:
    """Check that batches are equal."""
    for column in fields(Batch):
        np.testing.assert_array_equal(getattr(first, column.name), getattr(second, column.name))
        assert getattr(second, column.name).dtype == np.int32


@given(batch=batches(), rest=st.binary(max_size=40))
def test_a_batch_comes_back_from_its_bytes(batch: Batch, rest: bytes) -> None:
    found, left = Batch.from_bytes(batch.to_bytes() + rest)
    assert_same(batch, found)
    assert left == rest


@given(
    batch=batches(),
    biases=array_shapes(min_dims=1, max_dims=1, max_side=8).flatmap(lambda shape: arrays(BIAS, shape)),
    want=st.sampled_from(Want),
    data=st.data(),
)
def test_a_step_comes_back_from_its_bytes(
    batch: Batch, biases: npt.NDArray[np.void], want: Want, data: st.DataObject
) -> None:
    rows = data.draw(arrays(ROW, len(batch.logit_rows)))
    found = Step.from_bytes(Step(batch, rows, want, biases).to_bytes())
    assert found.biases.tobytes() == biases.tobytes()
    assert_same(batch, found.batch)
    assert found.rows.dtype == ROW
    assert found.rows.tobytes() == rows.tobytes()  # bits: a NaN is not equal to itself
    assert found.want is want


# --------------------------------------------------------------------------------------------------------------------
# Tiles
# --------------------------------------------------------------------------------------------------------------------


@st.composite
def matrices(draw: st.DrawFn) -> Floats:
    """Return a matrix of any shape, with rows of any size within float16's range and any share of zeros.

    Its values are numpy's: hypothesis's own, of which there are thousands, take seconds.
    """
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = sorted((draw(st.integers(-80, 12)), draw(st.integers(-80, 12))))
    exponents = rng.uniform(low, high, (rows, 1))
    values = rng.standard_normal((rows, cols)) * 2.0**exponents
    values[rng.random(values.shape) < draw(st.sampled_from([0, 0.1, 0.9, 0.99, 1]))] = 0
    return values.astype(np.float32)


def row_scales(matrix: Floats, fmt: TileFormat) -> Floats:
    """Return the row scales of a padded matrix, empty for a format without."""
    if not fmt.has_row_scales:
        return NO_SCALES
    scales = np.zeros(len(matrix), np.float32)
    update_row_scales(fmt, matrix, scales)
    return scales


def pack(matrix: Floats, fmt: TileFormat, scales: Floats) -> Bytes:
    """Return the tiles of a padded matrix by the kernel."""
    tiles = np.zeros(fmt.shape(*matrix.shape), np.uint8)
    pack_tiles(fmt, matrix, tiles, scales)
    return tiles


@every_format
@given(matrix=matrices())
def test_any_matrix_is_packed_as_by_the_twin(fmt: TileFormat, matrix: Floats) -> None:
    whole = naive_formats.padded(matrix, ROWS, BLOCK)
    scales = row_scales(whole, fmt)
    tiles = pack(whole, fmt, scales)
    np.testing.assert_array_equal(tiles, naive_formats.pack(matrix, fmt.name))
    values = np.full_like(whole, np.nan)
    unpack_tiles(fmt, tiles, scales, values)
    np.testing.assert_array_equal(
        values[: matrix.shape[0], : matrix.shape[1]], naive_formats.as_stored(matrix, fmt.name)
    )
    if fmt.name not in ("q4m", "iq4nl"):  # which have no zero; what padding is multiplied with is zero
        assert not values[matrix.shape[0] :].any()
        assert not values[:, matrix.shape[1] :].any()


@every_format
@given(matrix=matrices(), data=st.data())
def test_tiles_of_a_cut_are_a_cut_of_the_tiles(fmt: TileFormat, matrix: Floats, data: st.DataObject) -> None:
    """Cut at tiles of rows and blocks of columns; what a row has once is that of the whole row."""
    whole = naive_formats.padded(matrix, ROWS, BLOCK)
    scales = row_scales(whole, fmt)
    tiles = pack(whole, fmt, scales)
    (a, b), (c, d) = (
        sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count)))) for count in tiles.shape[:2]
    )
    part = np.ascontiguousarray(whole[a * ROWS : b * ROWS, c * BLOCK : d * BLOCK])
    own = scales[a * ROWS : b * ROWS] if fmt.has_row_scales else NO_SCALES
    np.testing.assert_array_equal(pack(part, fmt, own), tiles[a:b, c:d])


@every_format
@given(matrix=matrices(), at=st.integers(0, 4))
def test_row_scales_do_not_depend_on_how_columns_come(fmt: TileFormat, matrix: Floats, at: int) -> None:
    whole = naive_formats.padded(matrix, ROWS, BLOCK)
    middle = min(at * BLOCK, whole.shape[1])
    found = np.zeros(len(whole), np.float32)
    for columns in (whole[:, :middle], whole[:, middle:]):
        if columns.size:
            update_row_scales(fmt, np.ascontiguousarray(columns), found)
    expected = row_scales(whole, fmt) if fmt.has_row_scales else np.zeros(len(whole), np.float32)
    np.testing.assert_array_equal(found, expected)


@given(value=st.integers(0, 10**6), unit=st.integers(1, 1000))
def test_rounding_up_is_the_least_multiple(value: int, unit: int) -> None:
    assert ceil_to(value, unit) % unit == 0
    assert 0 <= ceil_to(value, unit) - value < unit
