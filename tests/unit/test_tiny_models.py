"""Tests of the tiny models themselves, and of the reference files that belong to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests import sparse_tensors
from tests.all_cases import ALL_CASES
from tests.tiny_dense import DENSE_ABLATIONS, DENSE_CASES
from tests.tiny_models.case import Case
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model
from tests.tiny_models.references import GREEDY_TOKENS, REFERENCE_FOLDER, fingerprint, load_reference
from tests.tiny_models.tensors import from_bfloat16, head_dim, tensor_specs, tensors, text_config, to_bfloat16
from tests.tiny_sparse import FILLED, SPARSE_ABLATIONS, SPARSE_CASES
from tests.tiny_state import MTP_FAMILIES, STATE_ABLATIONS, STATE_CASES, STATE_FILLED

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

LENGTH_DEPENDENT = ("llama_dynamic", "phi3_longrope")
"""Cases whose rotary frequencies depend on the length of the pass."""

every_case = pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)


def read_json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def specs(case: Case) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the safetensors type and the shape of every tensor of a case."""
    if case.name in SPARSE_CASES:
        return {
            name: (dtype, shape)
            for name, (dtype, shape) in sparse_tensors.tensor_specs(case.config, case.dtype).items()
        }
    return {name: (case.dtype, shape) for name, shape in tensor_specs(case.config).items()}


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
                assert name not in found
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    assert found == specs(case)
    assert len(weight_files(folder)) == case.shards


@every_case
def test_configs(case: Case, tmp_path: Path) -> None:
    folder = write_model(case, tmp_path)
    config = read_json(folder / "config.json")
    assert config == case.config
    if case.name != "gpt_oss":  # the published one names no type
        assert config.get("torch_dtype", config.get("dtype")) == TORCH_DTYPES[case.dtype]
    text = text_config(config)
    assert ("rope_parameters" in text) != ("rope_theta" in text or "rope_scaling" in text)
    assert text["num_attention_heads"] % text["num_key_value_heads"] == 0
    assert head_dim(text) % 2 == 0
    generation = read_json(folder / "generation_config.json")
    assert generation["eos_token_id"] is not None
    for value in (made.get(key) for made in (config, text, generation) for key in ("bos_token_id", "eos_token_id")):
        for token in value if isinstance(value, list) else [value]:
            assert token is None or 0 <= token < text["vocab_size"]
    if case.name in SPARSE_CASES:
        assert ("bos_token_id" in config) == (config["model_type"] not in ("olmoe", "gpt_oss", "glm4_moe"))
    assert not list(folder.glob("tokenizer*"))


@every_case
def test_size(case: Case) -> None:
    count = sum(math.prod(shape) for _, shape in specs(case).values())
    assert count < 500_000


@pytest.mark.parametrize("case", [case for case in ALL_CASES.values() if case.shards > 1], ids=lambda case: case.name)
def test_sharded_index(case: Case, tmp_path: Path) -> None:
    folder = write_model(case, tmp_path)
    index = read_json(folder / "model.safetensors.index.json")
    names = [f"model-{number:05d}-of-{case.shards:05d}.safetensors" for number in range(1, case.shards + 1)]
    assert [path.name for path in weight_files(folder)] == names
    assert set(index["weight_map"]) == set(specs(case))
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


def test_mixed_types_survive_the_file(tmp_path: Path) -> None:
    for name in ("gpt_oss", "glm4_moe"):
        case = SPARSE_CASES[name]
        folder = write_model(case, tmp_path / name)
        content = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        for tensor, values in tensors(case):
            start, end = header[tensor]["data_offsets"]
            assert start % values.itemsize == 0
            assert data[start:end] == values.tobytes()
    types = {name: {dtype for dtype, _ in specs(case).values()} for name, case in SPARSE_CASES.items()}
    assert types["gpt_oss"] == {"BF16", "U8"}
    assert types["glm4_moe"] == {"BF16", "F32"}


def test_ablations_of_sparse_cases_change_something() -> None:
    for name, changes in SPARSE_ABLATIONS.items():
        config = SPARSE_CASES[name].config
        assert all(config.get(key) != value for change in changes for key, value in change.items())
    for name, ends in FILLED.items():
        for end, _ in ends:
            assert any(tensor.endswith(end) for tensor in specs(SPARSE_CASES[name]))
    assert set(SPARSE_ABLATIONS) == set(SPARSE_CASES)


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
    vocab = text_config(case.config)["vocab_size"]
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
    if case.name not in LENGTH_DEPENDENT:
        assert reference.logits[case.prompt - 1].argmax() == reference.greedy[0]


@every_case
def test_reference_belongs_to_the_model(case: Case) -> None:
    assert load_reference(case).fingerprint == fingerprint(case), "run python -m tests.make_reference"


def test_dense_families() -> None:
    assert not set(CASES) & set(DENSE_CASES)
    assert set(DENSE_ABLATIONS) == set(DENSE_CASES)
    families = {text_config(case.config)["model_type"] for case in DENSE_CASES.values()}
    assert families > {"gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2", "olmo3"}
    assert families > {"ministral3", "seed_oss", "ernie4_5", "hunyuan_v1_dense"}


@pytest.mark.parametrize("case", DENSE_CASES.values(), ids=DENSE_CASES)
def test_windows_are_shorter_than_the_sequence(case: Case) -> None:
    window = text_config(case.config).get("sliding_window")
    assert window is None or window < case.length // 2 or window > 1000  # as good as none, as published for Phi


@pytest.mark.parametrize("name", ["phi3_longrope", "phi4_mini"])
def test_longrope_on_both_sides_of_the_original_length(name: str) -> None:
    case = DENSE_CASES[name]
    original, generated = case.config["original_max_position_embeddings"], case.prompt + GREEDY_TOKENS
    assert case.length > original
    assert generated <= original if name == "phi3_longrope" else case.prompt > original
    rotated = int(head_dim(case.config) * case.config.get("partial_rotary_factor", 1.0))
    for key in ("short_factor", "long_factor"):
        assert len(case.config["rope_scaling"][key]) == rotated // 2


def test_multimodal_files_hold_vision_tensors() -> None:
    for name in ("gemma3", "gemma3_renamed", "mistral3", "mistral_small"):
        names = tensor_specs(DENSE_CASES[name].config)
        decoder = "model.language_model." if name == "gemma3_renamed" else "language_model."
        others = [tensor for tensor in names if not tensor.startswith(decoder)]
        assert any("vision_tower" in tensor for tensor in others)
        assert all("vision_tower" in tensor or "multi_modal_projector" in tensor for tensor in others)


def test_state_families() -> None:
    assert not set(CASES | DENSE_CASES) & set(STATE_CASES)
    assert set(STATE_ABLATIONS) == set(STATE_CASES)
    assert set(STATE_FILLED) < set(STATE_CASES)
    families = {case.config["model_type"] for case in STATE_CASES.values()}
    assert families == {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "lfm2"}


@pytest.mark.parametrize("case", STATE_CASES.values(), ids=STATE_CASES)
def test_state_files_hold_what_is_to_be_skipped(case: Case) -> None:
    names = list(tensor_specs(case.config))
    assert any(name.startswith("mtp.") for name in names) == (case.config["model_type"] in MTP_FAMILIES)
    assert any(name.startswith("model.visual.") for name in names) == ("vision_config" in case.config)
    assert any(name.startswith("model.language_model.layers.0.") for name in names) == ("vision_config" in case.config)
    for end, value in STATE_FILLED.get(case.name, []):
        chosen = [values for name, values in tensors(case) if name.endswith(end)]
        assert chosen, end
        assert all((values != value).any() for values in chosen)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_next_mixed", "qwen3_5_text", "qwen3_5_moe_text"])
def test_states_fade_and_remember(name: str) -> None:
    rates = np.concatenate([values for tensor, values in tensors(STATE_CASES[name]) if tensor.endswith(".A_log")])
    decay = np.exp(-np.exp(rates) * np.log1p(np.exp(np.linspace(-2, 2, 9)))[:, None])
    assert decay.min() < 0.8
    assert decay.max() > 0.95


def test_reference_folder() -> None:
    files = {path.name: path.stat().st_size for path in REFERENCE_FOLDER.iterdir()}
    assert set(files) == {f"{name}.npz" for name in ALL_CASES} | {"VERSIONS.txt"}
    assert sum(files.values()) < 2_500_000
