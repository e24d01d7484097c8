"""The weights that the comparison with llama.cpp writes for both programs are the same numbers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dllama_mpi.errors import UsageError
from dllama_mpi.model.tensors import Kind, tensors
from dllama_mpi.startup.opening import open_model
from dllama_mpi.weights.tiles import load_matrix, load_vector
from tests.mpi.launch import ROOT

gguf: Any = pytest.importorskip("gguf")


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("twins", None)
    return importlib.import_module("twins")


def theirs(path: Path) -> dict[str, np.ndarray]:
    """Return all values of a GGUF file, shaped as this program's."""
    found = {}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        found[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type)
    return found


@pytest.mark.parametrize("shape", ["tiny:2", "tiny-sparse:2"])
def test_both_files_hold_the_same_numbers(shape: str, twins: ModuleType, tmp_path: Path) -> None:
    twins.make(shape, tmp_path, seed=3)
    opened, other = open_model(str(tmp_path / "q40")), theirs(tmp_path / "model.gguf")
    assert opened.config.num_layers == 2
    assert len(other) == len(tensors(opened.config))
    formats, mixer = opened.formats(None), opened.config.attentions[0]
    for spec in tensors(opened.config):
        values, whole = other[twins.gguf_name(spec.name)], tuple((0, n) for n in spec.shape)
        assert values.shape == spec.shape
        if spec.kind is not Kind.MATRIX:
            source = opened.whole[spec.name]
            own = source.values(whole) if spec.kind is Kind.TABLE else load_vector(source, spec.shape, whole)
            np.testing.assert_array_equal(own, values)
            continue
        matrix = load_matrix(opened.whole[spec.name], spec.shape, whole, formats[spec.name])
        own = np.stack([matrix.to_float32(e) for e in range(spec.experts)]).reshape(spec.shape)
        assert formats[spec.name].name == ("f16" if spec.role == "router" else "q40")
        assert own.std() > 0.01
        if spec.role in ("q", "k") and opened.config.model_type == "llama":  # GGUF has rotary pairs side by side
            values = values.reshape(-1, mixer.head_dim // 2, 2, spec.shape[1]).swapaxes(1, 2).reshape(spec.shape)
        np.testing.assert_array_equal(own, values)


def test_experts_are_told(twins: ModuleType, tmp_path: Path) -> None:
    twins.make("tiny-sparse:2", tmp_path)
    fields = gguf.GGUFReader(str(tmp_path / "model.gguf")).fields
    told = {name.removeprefix("qwen3moe."): field.contents() for name, field in fields.items()}
    assert told["general.architecture"] == "qwen3moe"
    assert (told["expert_count"], told["expert_used_count"], told["expert_feed_forward_length"]) == (16, 4, 256)
    assert told["block_count"] == 2
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_what_gguf_is_not_written_for(twins: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="qwen3_next is not written as GGUF"):
        twins.make("tiny-state", tmp_path)
