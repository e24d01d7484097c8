"""The tile layout, byte by byte as the docstring of ``kernels/layout.py`` tells it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS, ceil_div, ceil_to
from dllama_mpi.kernels.quantize import pack_tiles
from tests import naive_formats, naive_numbers
from tests.naive_numbers import Bytes, Floats

SCALES = np.float32(2.0) ** np.arange(-6, 10, dtype=np.float32)  # one a row, exact in float16


def tile(matrix: Floats, fmt: str) -> Bytes:
    """Return the one tile of a matrix (16, 32) by the kernel."""
    tiles = np.zeros((1, 1, FORMATS[fmt].tile_bytes), np.uint8)
    pack_tiles(FORMATS[fmt], matrix.astype(np.float32), tiles)
    return tiles[0, 0]


def halves(data: Bytes) -> list[float]:
    """Return bytes as float16 values."""
    return np.frombuffer(data.tobytes(), "<f2").astype(float).tolist()


@pytest.mark.parametrize(
    ("fmt", "tile_bytes", "bits"),
    [(fmt, 288, 4.5) for fmt in ("q40", "q4m", "iq4nl", "mxfp4")]
    + [("q80", 544, 8.5), ("f16", 1024, 16), ("f32", 2048, 32)],
)
def test_sizes(fmt: str, tile_bytes: int, bits: float) -> None:
    assert (ROWS, BLOCK) == (naive_formats.ROWS, naive_formats.BLOCK) == (16, 32)
    assert FORMATS[fmt].name == fmt
    assert FORMATS[fmt].tile_bytes == naive_formats.TILE_BYTES[fmt] == tile_bytes
    assert FORMATS[fmt].bits == bits
    assert FORMATS[fmt].shape(17, 32) == (2, 1, tile_bytes)
    assert FORMATS[fmt].shape(16, 33) == (1, 2, tile_bytes)
    assert FORMATS[fmt].shape(0, 64) == (0, 2, tile_bytes)


@pytest.mark.parametrize(("value", "unit", "rounded"), [(0, 16, 0), (1, 16, 16), (16, 16, 16), (17, 16, 32)])
def test_rounding_up(value: int, unit: int, rounded: int) -> None:
    assert ceil_to(value, unit) == rounded
    assert ceil_div(value, unit) == rounded // unit


def test_q40_bytes() -> None:
    nibbles = np.array([[(5 * r + 7 * c) % 16 for c in range(BLOCK)] for r in range(ROWS)])  # each row holds a 0
    got = tile(SCALES[:, None] * (nibbles - 8), "q40")
    assert halves(got[:32]) == SCALES.tolist()
    for r in range(ROWS):
        for j in range(4):
            for c in range(4):
                byte = got[32 + 64 * j + 4 * r + c]
                assert byte & 15 == nibbles[r, 4 * j + c]
                assert byte >> 4 == nibbles[r, 16 + 4 * j + c]


def test_q80_bytes() -> None:
    codes = np.array([[(11 * r + 37 * c) % 255 - 127 for c in range(BLOCK)] for r in range(ROWS)])
    codes[:, 5] = 127
    got = tile(SCALES[:, None] * codes, "q80")
    assert halves(got[:32]) == SCALES.tolist()
    for r in range(ROWS):
        for column in range(BLOCK):
            j, c = divmod(column, 4)
            assert got[32 + 64 * j + 4 * r + c : 32 + 64 * j + 4 * r + c + 1].view(np.int8)[0] == codes[r, column]


@pytest.mark.parametrize(("fmt", "dtype"), [("f16", "<f2"), ("f32", "<f4")])
def test_float_bytes(fmt: str, dtype: str) -> None:
    values = np.arange(ROWS * BLOCK, dtype=np.float32).reshape(ROWS, BLOCK) / np.float32(8)
    got = np.frombuffer(tile(values, fmt).tobytes(), dtype)
    for r in range(ROWS):
        for c in range(BLOCK):
            assert got[16 * c + r] == values[r, c]


def test_q40_block_by_hand() -> None:
    values = np.zeros((ROWS, BLOCK), np.float32)
    values[2, [0, 1, 16, 31]] = [-1.0, 0.5, 0.99, -0.07]  # scale 1/8: codes 0, 12, 15 (not 16), 7
    got = tile(values, "q40")
    assert halves(got[:32])[2] == 0.125
    row = [got[32 + 64 * j + 4 * 2 + c] for j in range(4) for c in range(4)]
    assert row == [0xF0, 0x8C] + [0x88] * 13 + [0x78]


def test_q80_block_by_hand() -> None:
    values = np.zeros((ROWS, BLOCK), np.float32)
    values[2, [0, 1, 31]] = [-254.0, 3.0, 100.0]  # scale 2: codes -127, 1.5 and so 2, 50
    got = tile(values, "q80")
    assert halves(got[:32])[2] == 2.0
    row = [got[32 + 64 * j + 4 * 2 + c] for j in range(8) for c in range(4)]
    assert row == [256 - 127, 2] + [0] * 29 + [50]


def test_fma_of_the_twins_rounds_once() -> None:
    x = np.float32(1 + 2**-12)
    assert naive_numbers.fma(x, x, np.float32(-1)) == 2**-11 + 2**-24
    # 1 + 2^-24 is half way between float32 neighbours; what lies beyond in the product must decide, not be lost.
    y = np.float32(2**-24) * np.float32(1 + 2**-23)
    assert naive_numbers.fma(y, np.float32(1 + 2**-23), np.float32(1)) == np.float32(1 + 2**-23)
    assert naive_numbers.fma(y, np.float32(1 - 2**-22), np.float32(1)) == 1
    assert naive_numbers.fma(np.float32(2**-40), np.float32(2**-45), np.float32(1 + 2**-23)) == np.float32(1 + 2**-23)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_was_sent_is_the_same_object(name: str) -> None:
    assert pickle.loads(pickle.dumps(FORMATS[name])) is FORMATS[name]
