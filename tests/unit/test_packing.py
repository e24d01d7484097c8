"""Tiles of weights and widened values, bit for bit as their twins in ``tests.naive_formats``, over odd shapes."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.kernels.quantize import BF16_BITS, PLAIN, pack_tiles, widen_rows
from tests import naive_formats
from tests.tiny_models.tensors import from_bfloat16
from tests.unit.kernel_inputs import SHAPES, Tiles, packed, random, uneven, unpacked

every_format = pytest.mark.parametrize("fmt", FORMATS)


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_tiles(fmt: str, shape: tuple[int, int]) -> None:
    for matrix in (random(1, *shape), uneven(2, *shape), np.zeros(shape, np.float32)):
        got = packed(matrix, fmt)
        np.testing.assert_array_equal(got.tiles, naive_formats.pack(matrix, fmt))
        if FORMATS[fmt].has_row_scales:
            np.testing.assert_array_equal(got.row_scales[: len(matrix)], naive_formats.row_scales(matrix, fmt))
            assert not got.row_scales[len(matrix) :].any()


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_tiles(fmt: str, shape: tuple[int, int]) -> None:
    for matrix in (random(1, *shape), uneven(2, *shape)):
        scales = packed(matrix, fmt).row_scales
        got = unpacked(Tiles(fmt, naive_formats.pack(matrix, fmt), scales))
        np.testing.assert_array_equal(got[: shape[0], : shape[1]], naive_formats.as_stored(matrix, fmt))
        assert not got[shape[0] :].any()
        assert fmt in ("q4m", "iq4nl") or not got[:, shape[1] :].any()  # which have no code for zero


@pytest.mark.parametrize("fmt", ["q40", "mxfp4", "q80", "f16", "f32"])
def test_requantising_gives_the_same_bytes(fmt: str) -> None:
    values = random(3, 160, 320) * 10.0 ** np.random.default_rng(3).uniform(-4, 4, (160, 1)).astype(np.float32)
    values[:, 32:64] = 0
    values[7] = 0
    tiles = packed(values, fmt)
    again = packed(unpacked(tiles), fmt)
    np.testing.assert_array_equal(
        unpacked(again) if fmt == "mxfp4" else again.tiles, unpacked(tiles) if fmt == "mxfp4" else tiles.tiles
    )


@pytest.mark.parametrize("fmt", ["q40", "q80"])
def test_the_largest_in_size_may_have_either_sign_or_both(fmt: str) -> None:
    values = np.zeros((16, 32), np.float32)
    for r in range(16):
        values[r, [3, 20]] = (1.5, -1.5) if r % 2 else (-1.5, 1.5)
    np.testing.assert_array_equal(packed(values, fmt).tiles, naive_formats.pack(values, fmt))
    got = unpacked(packed(values, fmt))
    assert (got[1::2, 3] == (1.5 if fmt == "q40" else got[1, 3])).all()
    assert (got[:, 3] * got[:, 20] < 0).all()


def test_q80_rounds_halves_away_from_zero() -> None:
    values = np.zeros((16, 32), np.float32)
    values[:, :5] = [127, 0.5, 1.5, -0.5, -2.5]  # the scale is 1
    got = unpacked(packed(values, "q80"))
    np.testing.assert_array_equal(got[0, :5], [127, 1, 2, -1, -3])


@pytest.mark.parametrize("tiles_across", [1, 3])
def test_pack_tiles_into_a_strided_view(tiles_across: int) -> None:
    matrix = random(4, 48, 32 * tiles_across)
    room = np.zeros((3, tiles_across + 2, 288), np.uint8)
    pack_tiles(FORMATS["q40"], matrix, room[:, 1:-1])
    np.testing.assert_array_equal(room[:, 1:-1], naive_formats.pack(matrix, "q40"))
    assert not room[:, [0, -1]].any()


def test_widening_f16_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    got = np.empty((256, 256), np.float32)
    widen_rows(bits, PLAIN, got)
    np.testing.assert_array_equal(got, bits.view(np.float16).astype(np.float32))


def test_widening_bf16_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    got = np.empty((256, 256), np.float32)
    widen_rows(bits, BF16_BITS, got)
    np.testing.assert_array_equal(got.view(np.uint32), from_bfloat16(bits).view(np.uint32))


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (16, 32)], ids=str)
def test_widening_fills_the_corner_only(shape: tuple[int, int]) -> None:
    whole = random(5, 20, 50)
    part = whole[2 : 2 + shape[0], 5 : 5 + shape[1]]
    got = np.full((16, 64), -7, np.float32)
    widen_rows(part, PLAIN, got)
    np.testing.assert_array_equal(got[: shape[0], : shape[1]], part)
    got[: shape[0], : shape[1]] = -7
    assert (got == -7).all()


def test_widening_from_an_odd_address() -> None:
    bits = random(6, 4, 32).astype(np.float16)
    shifted = np.frombuffer(b"x" + bits.tobytes(), np.uint16, offset=1).reshape(4, 32)
    got = np.empty((4, 32), np.float32)
    widen_rows(shifted, PLAIN, got)
    np.testing.assert_array_equal(got, bits.astype(np.float32))
