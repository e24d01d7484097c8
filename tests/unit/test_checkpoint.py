"""Reading safetensors directories, and cutting and quantising matrices while they are read."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.weights import tiles as tiles_module
from dllama_mpi.weights.checkpoint import LAYOUT, LAYOUT_KEY, TILES_KEY, Checkpoint, as_float32
from dllama_mpi.weights.tiles import TileMatrix, load_matrix, load_vector
from tests import naive
from tests.naive import Floats
from tests.tiny_models import CASES, from_bfloat16, tensors, to_bfloat16, write_model

DTYPES = ("F32", "F16", "BF16")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_format = pytest.mark.parametrize("fmt", FORMATS)
SHAPE = (51, 96)


def write(path: Path, values: Mapping[str, tuple[str, np.ndarray]], offset: int = 8, **metadata: str) -> Path:
    """Write tensors, each with safetensors' name of its type, and return the file's folder.

    offset: where the data begin, modulo 32.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, (dtype, data) in values.items():
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [start, start + data.nbytes]}
        start += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * ((offset - 8 - len(text)) % 32)
    content = len(text).to_bytes(8, "little") + text + b"".join(data.tobytes() for _, data in values.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path.parent


def random(seed: int, *shape: int) -> Floats:
    """Return normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(values: Floats, dtype: str) -> tuple[str, np.ndarray]:
    """Return values as a type of safetensors, ready for `write`."""
    return dtype, {"F32": values, "F16": naive.half(values).view(np.uint16), "BF16": to_bfloat16(values)}[dtype]


def read_back(values: Floats, dtype: str) -> Floats:
    """Return float32 values as they come back from a type of safetensors."""
    if dtype == "BF16":
        return from_bfloat16(to_bfloat16(values))
    return naive.half(values).astype(np.float32) if dtype == "F16" else values


def tile_folder(folder: Path, matrix: Floats, fmt: str) -> Checkpoint:
    """Return a checkpoint with one matrix "w" converted to tiles."""
    entry = ("U8", naive.pack(matrix, fmt))
    return Checkpoint(write(folder / "model.safetensors", {"w": entry}, 32, **{TILES_KEY: fmt, LAYOUT_KEY: LAYOUT}))


def failure(folder: Path) -> str:
    """Return the one line with which opening a directory fails."""
    with pytest.raises(ModelError) as caught:
        Checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "llama_f16", "llama3_gqa", "qwen3_bf16"])
def test_every_tensor_is_found_and_exact(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    checkpoint = Checkpoint(write_model(case, tmp_path))
    assert checkpoint.format_name is None
    ref = dict(tensors(case))
    assert sorted(checkpoint.names()) == sorted(ref)
    for key, values in ref.items():
        tensor = checkpoint[key]
        assert key in checkpoint
        assert (tensor.name, tensor.dtype, tensor.is_tiles) == (key, case.dtype, False)
        exact = from_bfloat16(values) if case.dtype == "BF16" else values.astype(np.float32)
        got = as_float32(tensor.data, tensor.dtype)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, exact)
        np.testing.assert_array_equal(tensor.rows(1, 5), exact[1:5])
        if exact.ndim == 2:
            np.testing.assert_array_equal(tensor.rows(2, 9, (3, 40)), exact[2:9, 3:40])


def test_a_tensor_that_is_written_to_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint = Checkpoint(write(path, {"v": stored(random(1, 8), "F32")}))
    before = path.read_bytes()
    checkpoint["v"].rows(0, 8)[:] = 7
    assert path.read_bytes() == before
    np.testing.assert_array_equal(checkpoint["v"].data, random(1, 8))


@every_dtype
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_data_may_lie_at_any_address(dtype: str, offset: int, tmp_path: Path) -> None:
    values = random(2, 40, 64)
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(values, dtype)}, offset))
    np.testing.assert_array_equal(source["w"].rows(3, 9), read_back(values, dtype)[3:9])
    got = load_matrix(source, "w", (40, 64), (3, 40), (32, 64), FORMATS["q80"])
    np.testing.assert_array_equal(got.tiles, naive.pack(read_back(values, dtype)[3:, 32:], "q80"))


def test_a_missing_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(CASES["llama2"], tmp_path))
    assert "lm_tail.weight" not in checkpoint
    with pytest.raises(ModelError, match=r"tensor lm_tail\.weight is missing; config\.json and the weights do not fit"):
        checkpoint["lm_tail.weight"]


def test_a_type_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "model.safetensors", {"w": ("I64", np.zeros(4, np.int64))})
    with pytest.raises(ModelError, match="tensor w is I64; only F32, F16, BF16, U32, U8 can be read"):
        Checkpoint(folder)["w"]


def test_a_missing_shard(tmp_path: Path) -> None:
    write_model(CASES["qwen3_bf16"], tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: the index names this file, but it is missing" in failure(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"v": stored(random(1, 9), "F32"), "w": stored(random(2, 5), "F32")})
    path = path / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "truncated or corrupt" in failure(tmp_path)
    path.write_bytes(whole + b"\0")
    assert "truncated or corrupt" in failure(tmp_path)
    path.write_bytes(whole)
    assert Checkpoint(tmp_path).names() == ["v", "w"]


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_shard(fraction: float, tmp_path: Path) -> None:
    write_model(CASES["qwen3_bf16"], tmp_path)
    path = tmp_path / "model-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    text = failure(tmp_path)
    assert "model-00001-of-00002.safetensors: truncated or corrupt" in text
    assert text.endswith("download it again")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"w": 1}',
        b'{"w": {"dtype": "F32", "shape": [2]}}',
        b'{"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "v": '
        b'{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_corrupt_header(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "truncated or corrupt" in failure(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_header_of_impossible_length(length: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(64))
    assert "truncated or corrupt" in failure(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"w": ["a"]}}',
        '{"weight_map": {"w": 5}}',
    ],
)
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json: not a safetensors index" in failure(tmp_path)


def test_an_index_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"\xff": "a"}}')
    assert "not a safetensors index" in failure(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert failure(tmp_path).endswith("no model.safetensors and no model.safetensors.index.json")
    for name in ("b.gguf", "a.bin", "readme.md"):
        (tmp_path / name).write_bytes(b"")
    assert failure(tmp_path).endswith("(found a.bin, b.gguf)")


def test_fingerprint_tells_other_files(tmp_path: Path) -> None:
    prints = {}
    for name, tensor, size in (("a", "v", 8), ("same", "v", 8), ("renamed", "u", 8), ("longer", "v", 9)):
        folder = write(tmp_path / name / "model.safetensors", {tensor: stored(random(1, size), "F32")})
        prints[name] = Checkpoint(folder).fingerprint()
    assert prints["a"] == prints["same"]
    assert len(set(prints.values())) == 3


def test_fingerprint_tells_other_values_in_the_same_places(tmp_path: Path) -> None:
    prints = set()
    for seed in range(3):
        values = {"large": stored(random(seed if seed < 2 else 0, 3000), "BF16"), "small": stored(random(5, 3), "F32")}
        if seed == 2:
            values["small"] = stored(random(6, 3), "F32")
        prints.add(Checkpoint(write(tmp_path / str(seed) / "model.safetensors", values)).fingerprint())
    assert len(prints) == 3


def test_tiles_of_another_layout(tmp_path: Path) -> None:
    entry = ("U8", naive.pack(random(1, 16, 32), "q40"))
    write(tmp_path / "model.safetensors", {"w": entry}, 32, **{TILES_KEY: "q40", LAYOUT_KEY: "0"})
    assert f"converted with layout 0, this is {LAYOUT}; convert again" in failure(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Matrices and vectors
# --------------------------------------------------------------------------------------------------------------------

ROWS = ((0, 51), (0, 16), (16, 48), (5, 6), (5, 40), (48, 51), (17, 51), (16, 16), (0, 0))
COLS = ((0, 96), (0, 32), (32, 96), (64, 64))


def assert_is(got: TileMatrix, ref: Floats, fmt: str) -> None:
    """Check that a matrix has the tiles and values of float32 `ref` in a format."""
    assert (got.rows, got.cols, got.format) == (*ref.shape, FORMATS[fmt])
    if ref.size:
        np.testing.assert_array_equal(got.tiles, naive.pack(ref, fmt))
        np.testing.assert_array_equal(got.to_float32(), naive.as_stored(ref, fmt))
    else:
        assert got.tiles.shape == FORMATS[fmt].shape(*ref.shape)


@every_dtype
@every_format
def test_slices_of_published_matrices(dtype: str, fmt: str, tmp_path: Path) -> None:
    values = random(3, *SHAPE)
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(values, dtype)}))
    whole = read_back(values, dtype)
    for rows in ROWS:
        for cols in COLS:
            got = load_matrix(source, "w", SHAPE, rows, cols, FORMATS[fmt])
            assert_is(got, whole[rows[0] : rows[1], cols[0] : cols[1]], fmt)
            assert not got.tiles.size or got.tiles.ctypes.data % 32 == 0  # as the matrix products load them


@every_format
def test_columns_that_end_inside_a_block(fmt: str, tmp_path: Path) -> None:
    values = random(4, 40, 100)
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(values, "F32")}))
    for cols in ((0, 100), (64, 100), (96, 100)):
        got = load_matrix(source, "w", (40, 100), (0, 40), cols, FORMATS[fmt])
        assert_is(got, values[:, cols[0] : cols[1]], fmt)


@every_format
def test_slices_of_converted_matrices(fmt: str, tmp_path: Path) -> None:
    values = random(5, *SHAPE)
    source = tile_folder(tmp_path, values, fmt)
    assert source.format_name == fmt
    for rows in ROWS:
        for cols in COLS:
            got = load_matrix(source, "w", SHAPE, rows, cols, FORMATS[fmt])
            assert_is(got, values[rows[0] : rows[1], cols[0] : cols[1]], fmt)


@every_format
def test_whole_tiles_are_copied_as_they_lie(fmt: str, tmp_path: Path) -> None:
    source = tile_folder(tmp_path, random(6, *SHAPE), fmt)
    for first, last in ((0, 51), (16, 48), (48, 51)):
        got = load_matrix(source, "w", SHAPE, (first, last), (32, 96), FORMATS[fmt])
        np.testing.assert_array_equal(got.tiles, source["w"].data[first // 16 : -(-last // 16), 1:3])
        assert got.tiles.flags.c_contiguous
        assert got.tiles.ctypes.data % 64 == 0


def test_converted_matrices_in_another_format(tmp_path: Path) -> None:
    values = random(7, *SHAPE)
    for held in FORMATS:
        source = tile_folder(tmp_path / held, values, held)
        for fmt in FORMATS:
            for rows, cols in (((0, 51), (0, 96)), ((5, 41), (32, 96)), ((16, 48), (0, 32))):
                got = load_matrix(source, "w", SHAPE, rows, cols, FORMATS[fmt])
                part = naive.as_stored(values, held)[rows[0] : rows[1], cols[0] : cols[1]]
                assert_is(got, part, fmt)


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
            got = load_matrix(source, "w", (203, 96), rows, (0, 96), FORMATS["q40"])
            assert_is(got, values[rows[0] : rows[1]], "q40")


@every_dtype
def test_memory_held_while_a_matrix_is_read(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "_CHUNK_BYTES", 1 << 16)
    shape = (4096, 256)  # 4 MB in float32
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(random(9, *shape), dtype)}))
    load_matrix(source, "w", shape, (0, 16), (0, 256), FORMATS["q40"])  # kernels are compiled or read here
    tracemalloc.start()
    try:
        got = load_matrix(source, "w", shape, (0, 4096), (0, 256), FORMATS["q40"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.tiles.nbytes < peak < got.tiles.nbytes + (1 << 16) + (1 << 16)


@pytest.mark.parametrize("shape", [(51, 95), (50, 96), (96, 51), (51, 96, 1), (51,)], ids=str)
def test_a_matrix_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(random(1, *shape), "F32")}))
    with pytest.raises(ModelError) as caught:
        load_matrix(source, "w", SHAPE, (0, 16), (0, 32), FORMATS["q40"])
    assert str(caught.value) == f"tensor w has shape {list(shape)}, but config.json implies [51, 96]"


def test_tiles_of_another_shape(tmp_path: Path) -> None:
    source = tile_folder(tmp_path, random(1, 51, 128), "q40")
    with pytest.raises(ModelError, match=r"tensor w has shape \[4, 4, 288\], but config\.json implies \[4, 3, 288\]"):
        load_matrix(source, "w", SHAPE, (0, 16), (0, 32), FORMATS["q40"])


def test_bytes_that_nobody_calls_tiles(tmp_path: Path) -> None:
    entry = ("U8", naive.pack(random(1, *SHAPE), "q40"))
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": entry}))
    with pytest.raises(ModelError, match="tensor w is U8 but the file does not say in which tile format"):
        load_matrix(source, "w", SHAPE, (0, 16), (0, 32), FORMATS["q40"])


def test_tiles_in_an_unknown_format(tmp_path: Path) -> None:
    entry = ("U8", naive.pack(random(1, *SHAPE), "q40"))
    folder = write(tmp_path / "model.safetensors", {"w": entry}, 32, **{TILES_KEY: "q20", LAYOUT_KEY: LAYOUT})
    with pytest.raises(ModelError):
        load_matrix(Checkpoint(folder), "w", SHAPE, (0, 16), (0, 32), FORMATS["q40"])


@every_dtype
def test_vectors(dtype: str, tmp_path: Path) -> None:
    values = random(1, 50)
    source = Checkpoint(write(tmp_path / "model.safetensors", {"v": stored(values, dtype)}))
    whole = read_back(values, dtype)
    np.testing.assert_array_equal(load_vector(source, "v", 50), whole)
    np.testing.assert_array_equal(load_vector(source, "v", 50, (3, 20)), whole[3:20])
    assert load_vector(source, "v", 50, (50, 50)).shape == (0,)
    with pytest.raises(ModelError, match=r"tensor v has shape \[50\], but config\.json implies \[51\]"):
        load_vector(source, "v", 51)
    with pytest.raises(ModelError, match="tensor u is missing"):
        load_vector(source, "u", 50)


def test_tiles_whose_rows_have_gaps_are_refused() -> None:
    room = np.zeros((2, 4, 288), np.uint8)
    with pytest.raises(ValueError, match="contiguous"):
        TileMatrix(room[:, ::2], 32, 64, FORMATS["q40"])
