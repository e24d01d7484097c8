"""Reading safetensors directories: files, their headers, and the tensors in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.startup.opening import open_model
from dllama_mpi.weights.checkpoint import LAYOUT, LAYOUT_KEY, TILES_KEY, Checkpoint
from dllama_mpi.weights.source import Range, Tensor, as_float32
from tests import naive_formats
from tests.naive_numbers import Floats
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model
from tests.tiny_models.tensors import from_bfloat16, tensors
from tests.unit.small_files import (
    every_dtype,
    load,
    random,
    read_back,
    stored,
    write,
)


def filled(tensor: Tensor, rows: Range, cols: Range) -> Floats:
    """Return rows and columns of a matrix as they are read to be quantised."""
    out = np.full((rows[1] - rows[0], cols[1] - cols[0]), 7, np.float32)
    assert tensor.fill(0, rows, cols, out) == 0
    return out


def failure(folder: Path) -> str:
    """Return the one line with which opening a directory fails."""
    with pytest.raises(ModelError) as caught:
        Checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


@pytest.mark.parametrize("name", ["llama2", "llama_f16", "llama3_gqa", "qwen3_bf16"])
def test_every_tensor_is_found_and_exact(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    checkpoint = Checkpoint(write_model(case, tmp_path))
    assert not checkpoint.formats
    assert not checkpoint.is_converted
    ref = dict(tensors(case))
    assert sorted(checkpoint.names()) == sorted(ref)
    for key, values in ref.items():
        tensor = checkpoint[key]
        assert key in checkpoint
        assert (tensor.name, tensor.dtype, type(tensor), tensor.shape) == (key, case.dtype, Tensor, values.shape)
        exact = from_bfloat16(values) if case.dtype == "BF16" else values.astype(np.float32)
        got = as_float32(tensor.data, tensor.dtype)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, exact)
        if exact.ndim == 1:
            np.testing.assert_array_equal(tensor.values(((1, 5),)), exact[1:5])
        else:
            np.testing.assert_array_equal(tensor.values(((1, 5), (0, exact.shape[1]))), exact[1:5])
            np.testing.assert_array_equal(tensor.values(((2, 9), (3, 40))), exact[2:9, 3:40])
            np.testing.assert_array_equal(filled(tensor, (2, 9), (3, 40)), exact[2:9, 3:40])


def test_a_tensor_that_is_written_to_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint = Checkpoint(write(path, {"v": stored(random(1, 8), "F32")}))
    before = path.read_bytes()
    checkpoint["v"].values(((0, 8),))[:] = 7
    np.testing.assert_array_equal(checkpoint["v"].data, random(1, 8))
    checkpoint["v"].data[:] = 7
    assert path.read_bytes() == before


@every_dtype
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_data_may_lie_at_any_address(dtype: str, offset: int, tmp_path: Path) -> None:
    values = random(2, 40, 64)
    source = Checkpoint(write(tmp_path / "model.safetensors", {"w": stored(values, dtype)}, offset))
    np.testing.assert_array_equal(source["w"].values(((3, 9), (0, 64))), read_back(values, dtype)[3:9])
    got = load(source, (40, 64), (3, 40), (32, 64), "q80")
    np.testing.assert_array_equal(got.tiles[0], naive_formats.pack(read_back(values, dtype)[3:, 32:], "q80"))


def test_a_missing_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(CASES["llama2"], tmp_path))
    assert "lm_tail.weight" not in checkpoint
    with pytest.raises(ModelError, match=r"tensor lm_tail\.weight is missing; config\.json and the weights do not fit"):
        checkpoint["lm_tail.weight"]


def test_a_type_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "model.safetensors", {"w": ("F64", np.zeros(4))})
    with pytest.raises(
        ModelError, match="tensor w is F64; only F32, F16, BF16, U32, U8, I64, I32, I8, F8_E4M3, F8_E5M2"
    ):
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
    entry = ("U8", naive_formats.pack(random(1, 16, 32), "q40"))
    write(tmp_path / "model.safetensors", {"w": entry}, 32, **{TILES_KEY: "q40", LAYOUT_KEY: "0"})
    assert f"converted with layout 0, this is {LAYOUT}; convert again" in failure(tmp_path)


def test_tiles_in_an_unknown_format(tmp_path: Path) -> None:
    entry = ("U8", naive_formats.pack(random(1, 51, 96), "q40"))
    folder = write(tmp_path / "model.safetensors", {"w": entry}, 32, **{TILES_KEY: "q20", LAYOUT_KEY: LAYOUT})
    assert "tensor w is in format 'q20'; known are q40, q4m, iq4nl, mxfp4, q80, f16, f32" in failure(folder)


@pytest.mark.parametrize(
    ("extra", "listed"),
    [
        (["model.layers.0.mlp.router.weight"], "tensor model.layers.0.mlp.router.weight;"),
        (["a", "b", "c"], "tensors a, b, c;"),
        (["a", "b", "c", "d", "e"], "tensors a, b, c and 2 more;"),
        (["model.layers.3.input_layernorm.weight"], "tensor model.layers.3.input_layernorm.weight;"),
    ],
)
def test_tensors_that_the_model_has_no_use_for(extra: list[str], listed: str, tmp_path: Path) -> None:
    case = CASES["llama2"]
    write_model(case, tmp_path)
    for names, fails in (([], False), (["model.layers.0.self_attn.rotary_emb.inv_freq"], False), (extra, True)):
        held = {name: (case.dtype, values) for name, values in tensors(case)}
        write(tmp_path / "model.safetensors", held | {name: stored(random(1, 4), "F32") for name in names})
        if not fails:
            assert open_model(str(tmp_path)).source is not None
            continue
        with pytest.raises(ModelError) as caught:
            open_model(str(tmp_path))
        assert str(caught.value).startswith(f"{tmp_path}: llama has no use for {listed} the result would be wrong")
        assert "\n" not in str(caught.value)


def test_a_tensor_of_the_model_that_the_files_lack(tmp_path: Path) -> None:
    case = CASES["llama2"]
    write_model(case, tmp_path)
    held = {name: (case.dtype, values) for name, values in tensors(case)}
    del held["model.layers.1.mlp.up_proj.weight"]
    write(tmp_path / "model.safetensors", held)
    with pytest.raises(ModelError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_model(str(tmp_path))
