"""Cutting and quantising matrices while they are read."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.weights import tiles as tiles_module
from dllama_mpi.weights.checkpoint import Checkpoint
from dllama_mpi.weights.source import Range, TileTensor
from dllama_mpi.weights.tiles import TileMatrix, load_vector
from tests import naive_formats
from tests.naive_numbers import Floats
from tests.unit.small_files import (
    SHAPE,
    every_dtype,
    every_format,
    load,
    random,
    read_back,
    scales_of,
    stored,
    tile_folder,
    write,
)

ROWS = ((0, 51), (0, 16), (16, 48), (5, 6), (5, 40), (48, 51), (17, 51), (16, 16), (0, 0))
COLS = ((0, 96), (0, 32), (32, 96), (64, 64))


def assert_is(got: TileMatrix, rows: Floats, cols: Range, fmt: str) -> None:
    """Check that a matrix has the tiles and values of columns of float32 `rows` in a format.

    Row scales are those of whole rows, whichever columns are held.
    """
    assert (got.rows, got.cols, got.format) == (len(rows), cols[1] - cols[0], FORMATS[fmt])
    assert got.tiles.shape == (1, *FORMATS[fmt].shape(got.rows, got.cols))
    if rows.size and got.cols:
        np.testing.assert_array_equal(got.tiles[0], naive_formats.pack(rows, fmt)[:, cols[0] // 32 : -(-cols[1] // 32)])
        np.testing.assert_array_equal(got.row_scales[0], scales_of(rows, fmt))
        np.testing.assert_array_equal(got.to_float32(), naive_formats.as_stored(rows, fmt)[:, slice(*cols)])


@every_dtype
@every_format
def test_slices_of_published_matrices(dtype: str, fmt: str, tmp_path: Path) -> None:
    values = random(3, *SHAPE)
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(values, dtype)}))
    whole = read_back(values, dtype)
    for rows in ROWS:
        for cols in COLS:
            got = load(source, SHAPE, rows, cols, fmt)
            assert_is(got, whole[slice(*rows)], cols, fmt)
            assert not got.tiles.size or got.tiles.ctypes.data % 32 == 0  # as the matrix products load them


@every_format
def test_columns_that_end_inside_a_block(fmt: str, tmp_path: Path) -> None:
    values = random(4, 40, 100)
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(values, "F32")}))
    for cols in ((0, 100), (64, 100), (96, 100)):
        assert_is(load(source, (40, 100), (0, 40), cols, fmt), values, cols, fmt)


@every_format
def test_slices_of_converted_matrices(fmt: str, tmp_path: Path) -> None:
    values = random(5, *SHAPE)
    source = tile_folder(tmp_path, values, fmt)
    assert source.formats == {"w": FORMATS[fmt]}
    assert source.is_converted
    for rows in ROWS:  # what cuts through tiles keeps its codes
        for cols in COLS:
            assert_is(load(source, SHAPE, rows, cols, fmt), values[slice(*rows)], cols, fmt)


@every_format
def test_whole_tiles_are_copied_as_they_lie(fmt: str, tmp_path: Path) -> None:
    source = tile_folder(tmp_path, random(6, *SHAPE), fmt)
    for first, last in ((0, 51), (16, 48), (48, 51)):
        tensor, got = source["w"], load(source, SHAPE, (first, last), (32, 96), fmt)
        assert isinstance(tensor, TileTensor)
        np.testing.assert_array_equal(got.tiles[0], tensor.data[first // 16 : -(-last // 16), 1:3])
        assert got.tiles.flags.c_contiguous
        assert got.tiles.ctypes.data % 64 == 0


def test_converted_matrices_in_another_format(tmp_path: Path) -> None:
    values = random(7, *SHAPE)
    for held in FORMATS:
        source = tile_folder(tmp_path / held, values, held)
        for fmt in FORMATS:
            for rows, cols in (((0, 51), (0, 96)), ((5, 41), (32, 96)), ((16, 48), (0, 32))):
                part = (values if fmt == held else naive_formats.as_stored(values, held))[slice(*rows)]
                assert_is(load(source, SHAPE, rows, cols, fmt), part, cols, fmt)


@pytest.mark.parametrize("is_converted", [False, True])
def test_matrices_are_read_in_chunks(is_converted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random(8, 203, 96)
    source = (
        tile_folder(tmp_path, values, "f32")
        if is_converted
        else Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(values, "F32")}))
    )
    for chunk in (1, 4 * 96 * 16, 4 * 96 * 40, 4 * 96 * 203):
        monkeypatch.setattr(tiles_module, "_CHUNK_BYTES", chunk)
        for rows in ((0, 203), (7, 100), (16, 203)):
            for fmt in ("q40", "q4m"):
                assert_is(load(source, (203, 96), rows, (0, 96), fmt), values[slice(*rows)], (0, 96), fmt)


@every_dtype
def test_memory_held_while_a_matrix_is_read(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "_CHUNK_BYTES", 1 << 16)
    shape = (4096, 256)  # 4 MB in float32
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(random(9, *shape), dtype)}))
    load(source, shape, (0, 16), (0, 256))  # kernels are compiled or read here
    tracemalloc.start()
    try:
        got = load(source, shape, (0, 4096), (0, 256))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (1 << 16) <= peak < (1 << 16) + (1 << 16)  # beside the tiles, which lie in the arena
    assert got.tiles.nbytes > 2 << 16


@pytest.mark.parametrize("shape", [(51, 95), (50, 96), (96, 51), (51, 96, 1), (51,)], ids=str)
def test_a_matrix_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(random(1, *shape), "F32")}))
    with pytest.raises(ModelError) as caught:
        load(source)
    assert str(caught.value) == f"tensor w has shape {list(shape)}, but config.json implies [51, 96]"


def test_tiles_of_another_shape(tmp_path: Path) -> None:
    source = tile_folder(tmp_path, random(1, 51, 128), "q40")
    with pytest.raises(ModelError, match=r"tensor w has shape \[4, 4, 288\], but config\.json implies \[4, 3, 288\]"):
        load(source)


@pytest.mark.parametrize("dtype", ["U8", "U32"])
@pytest.mark.parametrize("shape", [(4, 3, 288), SHAPE, (51,)], ids=str)
def test_bytes_that_nobody_calls_tiles(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    entry = (dtype, np.ones(shape, {"U8": np.uint8, "U32": np.uint32}[dtype]))
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": entry}))
    ranges = ((0, 51),)
    with pytest.raises(ModelError, match=f"tensor w is {dtype}, but nothing says in which format; get the BF16"):
        load_vector(source["w"], shape, ranges) if len(shape) == 1 else load(source)


@every_dtype
def test_vectors(dtype: str, tmp_path: Path) -> None:
    values = random(1, 50)
    source = Checkpoint(write(tmp_path / "model.safetensors", {"v": stored(values, dtype)}))
    whole = read_back(values, dtype)
    np.testing.assert_array_equal(load_vector(source["v"], (50,), ((0, 50),)), whole)
    np.testing.assert_array_equal(load_vector(source["v"], (50,), ((3, 20),)), whole[3:20])
    assert load_vector(source["v"], (50,), ((50, 50),)).shape == (0,)
    with pytest.raises(ModelError, match=r"tensor v has shape \[50\], but config\.json implies \[51\]"):
        load_vector(source["v"], (51,), ((0, 50),))
    with pytest.raises(ModelError, match="tensor u is missing"):
        load_vector(source["u"], (50,), ((0, 50),))


def test_tiles_whose_rows_have_gaps_are_refused() -> None:
    room = np.zeros((1, 2, 4, 288), np.uint8)
    with pytest.raises(ValueError, match="contiguous"):
        TileMatrix(room[:, :, ::2], np.zeros((1, 0), np.float32), 32, 64, FORMATS["q40"])


@every_dtype
@pytest.mark.parametrize("fmt", ["q40", "q4m", "f32"])
@pytest.mark.parametrize("wrong", [[np.nan], [np.inf], [-np.inf, np.nan]], ids=str)
def test_values_of_a_matrix_that_are_no_numbers(dtype: str, fmt: str, wrong: list[float], tmp_path: Path) -> None:
    values = random(1, *SHAPE)
    values[20, 40 : 40 + len(wrong)] = wrong
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(values, dtype)}))
    message = f"tensor w has {len(wrong)} values that are NaN or infinite in rows 16 to 47; get it again"
    with pytest.raises(ModelError) as caught:
        load(source, SHAPE, (16, 48), (32, 96), fmt)
    assert str(caught.value) == message
    assert_is(load(source, SHAPE, (32, 48), (32, 96), fmt), read_back(values, dtype)[32:48], (32, 96), fmt)


@every_dtype
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_of_a_vector_that_are_no_numbers(dtype: str, wrong: float, tmp_path: Path) -> None:
    values = random(1, 50)
    values[7] = wrong
    source = Checkpoint(write(tmp_path / "model.safetensors", {"v": stored(values, dtype)}))
    with pytest.raises(ModelError, match="tensor v has values that are NaN or infinite; get it again"):
        load_vector(source["v"], (50,), ((0, 50),))
    np.testing.assert_array_equal(load_vector(source["v"], (50,), ((8, 50),)), read_back(values, dtype)[8:])
