"""How well weights are rounded to 4 bits, and codes that are given and must come through as they are."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS
from dllama_mpi.kernels.quantize import (
    NO_SCALES,
    pack_codes,
    pack_mxfp4,
    pack_tiles,
    unpack_tiles,
    update_row_scales,
)
from tests import naive_formats
from tests.naive_numbers import Bytes, Doubles, Floats, Ints
from tests.unit.kernel_inputs import packed, random, unpacked


def relative_error(matrix: Floats, fmt: str) -> float:
    """Return the squared error of storing a matrix, relative to its squares."""
    exact = matrix.astype(np.float64)
    return float(((unpacked(packed(matrix, fmt)) - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize(
    ("fmt", "gaussian", "student"),
    [("q40", 0.0075, 0.0120), ("q4m", 0.0049, 0.0066), ("iq4nl", 0.0055, 0.0075), ("mxfp4", 0.0135, 0.0165)],
)
def test_error_of_usual_weights(fmt: str, gaussian: float, student: float) -> None:
    rng = np.random.default_rng(1)
    assert 0.85 * gaussian < relative_error(rng.standard_normal((64, 1024)).astype(np.float32), fmt) < gaussian
    assert 0.85 * student < relative_error(rng.standard_t(5, (64, 1024)).astype(np.float32), fmt) < student


def least_q4m_error(weights: Doubles, scale: float) -> float:
    """Return the least squared error of one block (32,) over all s and m."""
    u, m = weights / scale, np.arange(256)[:, None]
    least = np.inf
    for s in range(1, 256):
        codes = np.clip(np.rint((u + 8 * m) / s), 0, 15)
        least = min(least, ((s * codes - 8 * m - u) ** 2).sum(axis=1).min())
    return float(least * scale**2)


def test_q4m_is_near_the_best_of_all_scales_and_minima() -> None:
    matrix = random(2, ROWS, BLOCK)
    tiles = packed(matrix, "q4m")
    error = ((unpacked(tiles) - matrix.astype(np.float64)) ** 2).sum()
    least = sum(least_q4m_error(w.astype(np.float64), float(d)) for w, d in zip(matrix, tiles.row_scales, strict=True))
    assert least <= error < 1.03 * least


@pytest.mark.parametrize("fmt", ["q4m", "iq4nl", "mxfp4"])
def test_extreme_blocks(fmt: str) -> None:
    """Constant blocks, single values, one sign, ends of float32: what comes out is finite and near."""
    matrix = random(3, ROWS, 4 * BLOCK)
    matrix[0], matrix[1], matrix[2] = 0.5, np.abs(matrix[1]), -np.abs(matrix[2])
    matrix[3], matrix[3, 70] = 0, -3
    matrix[4], matrix[4, 70] = 0, 3
    matrix[5] *= np.float32(1e-30)
    matrix[6] = 1e-42
    if fmt != "iq4nl":  # whose scale is a float16
        matrix[7] *= np.float32(1e36)
    got = unpacked(packed(matrix, fmt))
    assert np.isfinite(got).all()
    near = np.abs(got - matrix).max(axis=1) <= 0.26 * np.abs(matrix).max(axis=1)
    assert near[[row for row in range(ROWS) if row != 6 and (row != 5 or fmt != "iq4nl")]].all()


@pytest.mark.parametrize("fmt", ["q4m", "mxfp4"])
def test_row_scales_of_parts_are_those_of_the_whole(fmt: str) -> None:
    matrix = random(4, 24, 200) * 10.0 ** np.random.default_rng(4).uniform(-30, 4, (24, 1)).astype(np.float32)
    matrix[5] = 0
    scales = np.zeros(24, np.float32)
    for start in (96, 0, 160, 32):
        columns = np.ascontiguousarray(matrix[:, start : start + 64])
        update_row_scales(FORMATS[fmt], columns[:10], scales)
        update_row_scales(FORMATS[fmt], columns[10:], scales[10:])
    np.testing.assert_array_equal(scales, naive_formats.row_scales(matrix, fmt))
    assert scales[5] == 0


def test_formats_without_row_scales_leave_them() -> None:
    scales = np.zeros(3, np.float32)
    update_row_scales(FORMATS["q40"], random(1, 3, 32), scales)
    assert not scales.any()


@pytest.mark.parametrize(
    ("fmt", "values", "scales"),
    [("q40", (16, 32), 16), ("q4m", (16, 32), 0), ("q40", (17, 32), 0), ("q80", (16, 64), 0)],
)
def test_shapes_that_do_not_go_together_are_refused(fmt: str, values: tuple[int, int], scales: int) -> None:
    tiles = np.zeros((1, 1, FORMATS[fmt].tile_bytes), np.uint8)
    with pytest.raises(ValueError, match=rf"do not go with {fmt} tiles \(1, 1, "):
        pack_tiles(FORMATS[fmt], np.zeros(values, np.float32), tiles, np.zeros(scales, np.float32))
    with pytest.raises(ValueError, match=rf"do not go with {fmt} tiles"):
        unpack_tiles(FORMATS[fmt], tiles, np.zeros(scales, np.float32), np.zeros(values, np.float32))


# --------------------------------------------------------------------------------------------------------------------
# Codes that are given
# --------------------------------------------------------------------------------------------------------------------

ROWS_HERE, BLOCKS = 21, 3


def nibbles(seed: int) -> Ints:
    """Return random codes (rows, blocks, 32) from 0 to 15."""
    return np.random.default_rng(seed).integers(0, 16, (ROWS_HERE, BLOCKS, BLOCK))


def two_a_byte(codes: Ints, apart: int) -> Bytes:
    """Return codes as `pack_codes` takes them."""
    out = np.zeros((*codes.shape[:2], 16), np.uint8)
    for k in range(16):
        low, high = (2 * k, 2 * k + 1) if apart == 1 else (k, k + 16)
        out[:, :, k] = codes[:, :, low] + 16 * codes[:, :, high]
    return out


def values_of(tiles: Bytes, fmt: str, row_scales: Floats = NO_SCALES) -> Floats:
    """Return the values of tiles, padding checked and taken away, as (rows, blocks, 32)."""
    got = np.full((ROWS * len(tiles), BLOCK * tiles.shape[1]), np.nan, np.float32)
    unpack_tiles(FORMATS[fmt], tiles, row_scales, got)
    assert not got[ROWS_HERE:].any()
    return got[:ROWS_HERE].reshape(ROWS_HERE, -1, BLOCK)


def empty(fmt: str, blocks: int = BLOCKS) -> Bytes:
    """Return tiles filled with what must not survive."""
    return np.full(FORMATS[fmt].shape(ROWS_HERE, BLOCK * blocks), 99, np.uint8)


@pytest.mark.parametrize("apart", [1, 16])
@pytest.mark.parametrize("fmt", ["q40", "iq4nl"])
def test_given_codes_with_float16_scales(fmt: str, apart: int) -> None:
    codes, scales = nibbles(1), random(2, ROWS_HERE, BLOCKS).astype(np.float16)
    tiles = empty(fmt)
    pack_codes(two_a_byte(codes, apart), (scales,), tiles, apart)
    numbers = codes - 8 if fmt == "q40" else naive_formats.IQ4NL[codes]
    np.testing.assert_array_equal(values_of(tiles, fmt), scales.astype(np.float32)[:, :, None] * numbers)


def test_given_codes_with_scales_and_minima() -> None:
    codes, rng, tiles = nibbles(3), np.random.default_rng(3), empty("q4m")
    s, m = (rng.integers(0, 256, (ROWS_HERE, BLOCKS)).astype(np.uint8) for _ in range(2))
    scales = np.zeros(2 * ROWS, np.float32)
    scales[:ROWS_HERE] = np.abs(random(4, ROWS_HERE))
    pack_codes(two_a_byte(codes, 16), (s, m), tiles)
    numbers = s[:, :, None].astype(int) * codes - 8 * m[:, :, None].astype(int)
    np.testing.assert_array_equal(
        values_of(tiles, "q4m", scales), scales[:ROWS_HERE, None, None] * numbers.astype("f4")
    )
    assert tiles[1, 2, 4] == s[20, 2]
    assert tiles[1, 2, 16 + 4] == m[20, 2]
    assert tiles[1, 2, 32 + 64 * 3 + 4 * 4 + 1] == codes[20, 2, 13] + 16 * codes[20, 2, 29]


@pytest.mark.parametrize("apart", [1, 16])
@pytest.mark.parametrize("cols", [(0, 96), (32, 96), (64, 70)], ids=str)
def test_given_mxfp4_blocks_are_exact(apart: int, cols: tuple[int, int]) -> None:
    codes, exponents = nibbles(5), np.random.default_rng(5).integers(-19, 20, (ROWS_HERE, BLOCKS))
    exponents[0], exponents[1], codes[2], codes[3, 1] = 120, -120, 0, 8
    blocks = slice(cols[0] // BLOCK, -(-cols[1] // BLOCK))
    tiles, scales = empty("mxfp4", blocks.stop - blocks.start), np.full(2 * ROWS, 7, np.float32)
    pack_mxfp4(two_a_byte(codes, apart), exponents, cols, tiles, scales, apart)
    exact = np.ldexp(naive_formats.E2M1[codes], exponents[:, :, None])[:, blocks]
    np.testing.assert_array_equal(values_of(tiles, "mxfp4", scales), exact.astype(np.float32))
    whole = np.full(2 * ROWS, 7, np.float32)
    pack_mxfp4(two_a_byte(codes, apart), exponents, (0, 96), empty("mxfp4"), whole, apart)
    np.testing.assert_array_equal(scales, whole)


def test_an_mxfp4_block_far_below_its_rows_largest_becomes_zero() -> None:
    codes, exponents = np.full((ROWS_HERE, BLOCKS, BLOCK), 7), np.zeros((ROWS_HERE, BLOCKS), int)
    exponents[:, 1], exponents[:, 2] = -39, -40
    tiles, scales = empty("mxfp4"), np.zeros(2 * ROWS, np.float32)
    pack_mxfp4(two_a_byte(codes, 1), exponents, (0, 96), tiles, scales)
    got = values_of(tiles, "mxfp4", scales)
    assert (got[:, 0] == 6).all()
    assert (got[:, 1] == 6 * 2.0**-39).all()
    assert not got[:, 2].any()


def test_mxfp4_rounds_as_the_specification_tells() -> None:
    """The largest value's power of two is E2M1's 4; what lies in the middle goes to the even code; 6 is the most."""
    matrix = np.zeros((ROWS, BLOCK), np.float32)
    given = [4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7.9, -0.25, -0.26, -5, -5.1, 0.24, -7]
    wanted = [4, 0, 1, 1, 2, 2, 4, 4, 6, 0, -0.5, -4, -6, 0, -6]
    powers = 2.0 ** np.arange(-8, 8)[:, None]
    matrix[:, : len(given)] = powers * given
    np.testing.assert_array_equal(unpacked(packed(matrix, "mxfp4"))[:, : len(given)], powers * wanted)
