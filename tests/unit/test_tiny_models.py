"""Tests of the tiny models themselves, and of the reference files that belong to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.tiny_models import (
    CASES,
    GREEDY_TOKENS,
    REFERENCE_FOLDER,
    Case,
    fingerprint,
    from_bfloat16,
    head_dim,
    load_reference,
    tensor_specs,
    tensors,
    to_bfloat16,
    write_model,
)

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def read_json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, in their order."""
    return sorted(folder.glob("*.safetensors"))


@every_case
def test_files_hold_the_specified_tensors(case: Case, tmp_path: Path) -> None:
    folder = write_model(case, tmp_path / "model")
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                part = file.get_slice(name)
                assert part.get_dtype() == case.dtype
                assert name not in found
                found[name] = tuple(part.get_shape())
    assert found == tensor_specs(case.config)
    assert len(weight_files(folder)) == case.shards


@every_case
def test_configs(case: Case, tmp_path: Path) -> None:
    folder = write_model(case, tmp_path)
    config = read_json(folder / "config.json")
    assert config == case.config
    assert config.get("torch_dtype", config.get("dtype")) == TORCH_DTYPES[case.dtype]
    assert ("rope_parameters" in config) != ("rope_theta" in config or "rope_scaling" in config)
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert head_dim(config) % 2 == 0
    generation = read_json(folder / "generation_config.json")
    ids = [generation["eos_token_id"], config["eos_token_id"], config["bos_token_id"], generation["bos_token_id"]]
    for value in ids:
        for token in value if isinstance(value, list) else [value]:
            assert 0 <= token < config["vocab_size"]
    assert not list(folder.glob("tokenizer*"))


@every_case
def test_size(case: Case) -> None:
    count = sum(math.prod(shape) for shape in tensor_specs(case.config).values())
    assert count < 500_000


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.shards > 1], ids=lambda case: case.name)
def test_sharded_index(case: Case, tmp_path: Path) -> None:
    folder = write_model(case, tmp_path)
    index = read_json(folder / "model.safetensors.index.json")
    names = [f"model-{number:05d}-of-{case.shards:05d}.safetensors" for number in range(1, case.shards + 1)]
    assert [path.name for path in weight_files(folder)] == names
    assert set(index["weight_map"]) == set(tensor_specs(case.config))
    assert set(index["weight_map"].values()) == set(names)
    for path in weight_files(folder):
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == {name for name, shard in index["weight_map"].items() if shard == path.name}
    assert index["metadata"]["total_size"] == sum(values.nbytes for _, values in tensors(case))


def test_single_file_has_no_index(tmp_path: Path) -> None:
    write_model(CASES["llama2"], tmp_path)
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()


@every_case
def test_same_seed_gives_same_bytes(case: Case, tmp_path: Path) -> None:
    first, second = write_model(case, tmp_path / "first"), write_model(case, tmp_path / "second")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_values_survive_the_file(dtype: str, tmp_path: Path) -> None:
    case = next(case for case in CASES.values() if case.dtype == dtype)
    write_model(case, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        for name, values in tensors(case):
            np.testing.assert_array_equal(file.get_tensor(name), values)
            assert np.isfinite(values).all()
            assert values.std() > 0.01


def test_bfloat16_values_survive_the_file(tmp_path: Path) -> None:
    case = next(case for case in CASES.values() if case.dtype == "BF16" and case.shards == 1)
    write_model(case, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    assert size % 8 == 0
    for name, values in tensors(case):
        start, end = header[name]["data_offsets"]
        assert data[start:end] == values.tobytes()


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F807FFF, 0x3F80),  # just below the middle
        (0x3F808000, 0x3F80),  # the middle, down to even
        (0x3F808001, 0x3F81),  # just above the middle
        (0x3F818000, 0x3F82),  # the middle, up to even
        (0xBF818000, 0xBF82),  # the same, negative
        (0x3FFFFFFF, 0x4000),  # carries into the exponent
        (0x7F7FFFFF, 0x7F80),  # the largest float32 becomes infinity
        (0x7F800000, 0x7F80),  # infinity
        (0xFF800000, 0xFF80),
        (0x80000000, 0x8000),  # negative zero
        (0x00000001, 0x0000),  # the smallest subnormal number
        (0x7F800001, 0x7FC0),  # not a number stays so
        (0xFFFFFFFF, 0xFFFF),
    ],
)
def test_bfloat16_rounding(bits: int, expected: int) -> None:
    values = np.array([bits], dtype=np.uint32).view(np.float32)
    assert to_bfloat16(values).tolist() == [expected]


def test_bfloat16_takes_the_nearest() -> None:
    values = np.random.RandomState(0).standard_normal(10_000).astype(np.float32)
    bits = to_bfloat16(values)
    rounded = from_bfloat16(bits)
    np.testing.assert_array_equal(to_bfloat16(rounded), bits)
    error = np.abs(rounded.astype(np.float64) - values)
    for step in (-1, 1):
        neighbour = from_bfloat16((bits.astype(np.int32) + step).astype(np.uint16))
        assert (error <= np.abs(neighbour.astype(np.float64) - values)).all()


@pytest.mark.parametrize("name", ["llama31", "llama32_tied"])
def test_llama3_scaling_touches_all_bands(name: str) -> None:
    config = CASES[name].config
    rope = config.get("rope_parameters") or config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
    dim = head_dim(config)
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    assert (wavelengths < high).any()
    assert ((wavelengths > high) & (wavelengths < low)).any()
    assert (wavelengths > low).any()


@every_case
def test_reference(case: Case) -> None:
    reference = load_reference(case)
    vocab = case.config["vocab_size"]
    assert reference.tokens.shape == (case.length,)
    assert reference.tokens.dtype == np.int64
    assert reference.logits.shape == (case.length, vocab)
    assert reference.logits.dtype == np.float32
    assert reference.greedy_prompt.tolist() == reference.tokens[: case.prompt].tolist()
    assert reference.greedy.shape == (GREEDY_TOKENS,)
    assert reference.greedy.dtype == np.int64
    for tokens in (reference.tokens, reference.greedy):
        assert ((tokens >= 0) & (tokens < vocab)).all()
    assert 1 < reference.logits.std() < 3
    if case.name != "llama_dynamic":  # its frequencies depend on the length of the pass
        assert reference.logits[case.prompt - 1].argmax() == reference.greedy[0]


@every_case
def test_reference_belongs_to_the_model(case: Case) -> None:
    assert load_reference(case).fingerprint == fingerprint(case), "run python -m tests.make_reference"


def test_reference_folder() -> None:
    files = {path.name: path.stat().st_size for path in REFERENCE_FOLDER.iterdir()}
    assert set(files) == {f"{name}.npz" for name in CASES} | {"VERSIONS.txt"}
    assert sum(files.values()) < 1_500_000
