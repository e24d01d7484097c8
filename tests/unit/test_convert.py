"""Converted directories load to the same numbers."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.engine.llm import LLM
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.build import load
from dllama_mpi.model.recipe import WeightRecipe, slice_parts
from dllama_mpi.model.tensors import TABLE, Kind
from dllama_mpi.model.tensors import tensors as table
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.startup.opening import model_config, open_folder, open_model
from dllama_mpi.startup.shares import shards_of
from dllama_mpi.weights import convert as module
from dllama_mpi.weights.checkpoint import Checkpoint, name_of
from dllama_mpi.weights.source import TileTensor, WeightSource
from dllama_mpi.weights.tiles import TileMatrix
from tests.tiers import all_but
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model, write_safetensors
from tests.tiny_models.references import load_reference
from tests.tiny_models.tensors import tensor_specs, tensors
from tests.unit.conversions import contents, run, write_source

SHAPES = ("llama32_tied", "qwen3_bf16", "qwen2", "llama_bias", "llama_f16", "llama_heads6", "deepseek_distill_like")


def shapes(folder: Path, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors of a kind."""
    return {spec.name: spec.shape for spec in table(model_config(str(folder))) if spec.kind is kind}


def opened(folder: Path) -> WeightSource:
    """Return a model directory's weights."""
    return open_folder(folder, model_config(str(folder))).whole


def without_lineage(folder: Path) -> dict[str, Any]:
    """Return a directory's contents; in place of model.safetensors its header, but for the lineage, and its data."""
    files: dict[str, Any] = contents(folder)
    data = files.pop("model.safetensors")
    start, entries = header(folder / "model.safetensors")
    del entries["__metadata__"]["dllama_mpi.lineage"]
    return {**files, "header": entries, "data": data[start:]}


def logits(folder: Path, weights: str | None, tokens: list[int]) -> np.ndarray:
    """Return the logits after each token."""
    model = LLM(str(folder), group=TensorParallelGroup(None), weights=weights, nthreads=1)
    found = model.logits(tokens)
    assert found is not None
    return found


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where a safetensors file's data begins, and its header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with sizes that are no multiples of a tile's, an odd number of tiles, and the files beside it."""
    return write_source(tmp_path / "source")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_and_shapes_are_those_of_the_checkpoint(case: Any) -> None:
    expected = tensor_specs(case.config)
    found = {spec.name: spec.shape for spec in table(read_model_config(case.config))}
    assert found == {**expected, "lm_head.weight": expected[TABLE]}


@pytest.mark.parametrize(
    ("name", "weights"),
    all_but(
        [("llama32_tied", "q4m"), ("qwen3_bf16", "f32")],
        [*product(SHAPES[:1], FORMATS), *product(SHAPES, ("q4m", "f32"))],
    ),
)
def test_logits_are_those_of_quantising_while_loading(name: str, weights: str, tmp_path: Path) -> None:
    case, reference = CASES[name], load_reference(CASES[name])
    folder = write_model(case, tmp_path / "source")
    tokens = reference.tokens[:12].tolist()
    converted = run(folder, tmp_path / "new", weights)
    assert name_of(Checkpoint(converted).formats) == weights
    np.testing.assert_array_equal(logits(converted, None, tokens), logits(folder, weights, tokens))


def test_f32_of_an_f32_source_equals_the_reference(tmp_path: Path) -> None:
    reference = load_reference(CASES["llama_heads6"])
    converted = run(write_model(CASES["llama_heads6"], tmp_path / "source"), tmp_path / "new", "f32")
    found = logits(converted, None, reference.tokens.tolist())
    np.testing.assert_allclose(found, reference.logits, rtol=0, atol=2e-5 * np.abs(reference.logits).max())


def test_f32_tiles_hold_the_source_exactly(source: Path, tmp_path: Path) -> None:
    old, new = dict(tensors(CASES["llama_heads6"])), Checkpoint(run(source, tmp_path / "new", "f32"))
    for name, (rows, cols) in shapes(source, Kind.MATRIX).items():
        matrix = TileMatrix(new[name].data[None], np.zeros((1, 0), np.float32), rows, cols, FORMATS["f32"])
        np.testing.assert_array_equal(matrix.to_float32(), old[name])


@pytest.mark.parametrize("weights", FORMATS)
def test_file_is_good_safetensors_and_tiles_are_aligned(weights: str, source: Path, tmp_path: Path) -> None:
    path = run(source, tmp_path / "new", weights) / "model.safetensors"
    start, entries = header(path)
    assert start % 64 == 0
    metadata = entries.pop("__metadata__")
    lineage = f"{Checkpoint(source).fingerprint()}>{weights}"
    assert metadata == {"dllama_mpi.weights": weights, "dllama_mpi.layout": "1", "dllama_mpi.lineage": lineage}
    with safe_open(path, framework="numpy") as opened:
        assert sorted(opened.keys()) == sorted(entries)
        for name, shape in shapes(source, Kind.MATRIX).items():
            tiles = opened.get_tensor(name)
            assert tiles.dtype == np.uint8
            assert tiles.shape == FORMATS[weights].shape(*shape)
            assert (start + entries[name]["data_offsets"][0]) % 64 == 0
    assert any(name.startswith("padding.") for name in entries) == FORMATS[weights].quantised_activations
    for name in shapes(source, Kind.MATRIX):
        assert (f"{name}.row_scales" in entries) == FORMATS[weights].has_row_scales


@pytest.mark.parametrize("name", ["llama32_tied", "llama_f16", "llama_bias"])
def test_what_is_not_a_matrix_stays_as_it_is(name: str, tmp_path: Path) -> None:
    folder = write_model(CASES[name], tmp_path / "source")
    old, new = Checkpoint(folder), Checkpoint(run(folder, tmp_path / "new", "q40"))
    assert new[TABLE].dtype == old[TABLE].dtype == CASES[name].dtype
    np.testing.assert_array_equal(new[TABLE].data, old[TABLE].data)
    for tensor, shape in shapes(folder, Kind.VECTOR).items():
        whole = tuple((0, size) for size in shape)
        assert new[tensor].dtype == "F32"
        np.testing.assert_array_equal(new[tensor].values(whole), old[tensor].values(whole))


def test_files_beside_the_weights_are_copied(source: Path, tmp_path: Path) -> None:
    old, new = contents(source), contents(run(source, tmp_path / "new", "q40"))
    assert set(old) - set(new) == {"pytorch_model.bin"}
    assert {name: data for name, data in new.items() if name != "model.safetensors"} == {
        name: data for name, data in old.items() if name not in ("model.safetensors", "pytorch_model.bin")
    }


def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(CASES["llama_heads6"], tmp_path / "source")
    whole = run(folder, tmp_path / "whole", "q80")
    monkeypatch.setattr(module, "_FILE_BYTES", 40_000)
    monkeypatch.setattr(module, "PIECE_BYTES", 16 * 144 * 4)
    cut = run(folder, tmp_path / "cut", "q80")
    paths = sorted(cut.glob("*.safetensors"))
    assert len(paths) > 3
    assert [path.name for path in paths] == [
        f"model-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, 1 + len(paths))
    ]
    for path in paths:
        assert path.stat().st_size < 45_000 or len(header(path)[1]) == 2  # the metadata and one large tensor
    index = json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]
    assert {(cut / name) for name in index.values()} == set(paths)
    one, many = Checkpoint(whole), Checkpoint(cut)
    for name in (spec.name for spec in table(model_config(str(folder)))):
        assert name in header(cut / index[name])[1]
        np.testing.assert_array_equal(one[name].data, many[name].data)


def test_tied_table_may_be_called_lm_head(tmp_path: Path) -> None:
    case = CASES["llama32_tied"]
    folder = write_model(case, tmp_path / "source")
    expected = without_lineage(run(folder, tmp_path / "new", "q40"))
    values = dict(tensors(case))
    values["lm_head.weight"] = values.pop(TABLE)
    write_safetensors(folder / "model.safetensors", values, case.dtype)
    assert without_lineage(run(folder, tmp_path / "other", "q40")) == expected


@pytest.mark.parametrize(
    ("name", "first"), [(n, f) for n in ("qwen3_bf16", "llama_f16") for f in ("q40", "f16", "f32")]
)
def test_converting_again_gives_the_same_bytes(name: str, first: str, tmp_path: Path) -> None:
    folder = write_model(CASES[name], tmp_path / "source")
    again = run(run(folder, tmp_path / first, first), tmp_path / "again", "q40")
    assert without_lineage(again) == without_lineage(run(folder, tmp_path / "direct", "q40"))


@pytest.mark.parametrize("recipe", ["q4m,lm_head=q80", "q80,down=q4m,attention=f16", "mxfp4,v=f32"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mixed_formats_are_those_of_quantising_while_loading(recipe: str, ranks: int, tmp_path: Path) -> None:
    folder = write_model(CASES["llama_heads6"], tmp_path / "source")
    converted, config = run(folder, tmp_path / "new", recipe), model_config(str(folder))
    formats = WeightRecipe.parse(recipe).formats(config)
    held = open_model(str(converted)).formats(None)
    assert held == formats
    for shard in shards_of(config, [1.0] * ranks):
        old, new = (load(opened(each), config, shard, formats) for each in (folder, converted))
        assert old.held.keys() == new.held.keys() == slice_parts(config, shard).keys() - {TABLE}
        for name, tensor in old.held.items():
            other = new.held[name]
            if isinstance(tensor, TileMatrix):
                assert isinstance(other, TileMatrix)
                np.testing.assert_array_equal(tensor.tiles, other.tiles)
                np.testing.assert_array_equal(tensor.row_scales, other.row_scales)
            else:
                np.testing.assert_array_equal(tensor, np.asarray(other))
    assert all(isinstance(opened(converted)[name], TileTensor) for name in formats)


def test_nothing_is_printed_without_a_terminal(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "new", "q40")
    assert capfd.readouterr() == ("", "")
