"""config.json of both generations, read into a `ModelConfig`, and what is said of a wrong one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.architectures.registry import ARCHITECTURES, read_config, read_model_config
from dllama_mpi.errors import ModelError
from dllama_mpi.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig
from dllama_mpi.model.recipe import parameters
from dllama_mpi.model.rope import KINDS, Rope, RopeConfig
from dllama_mpi.startup.opening import model_config
from tests import naive_layers
from tests.tiny_models.case import Case
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model
from tests.tiny_models.tensors import head_dim, tensor_specs

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

LEAST: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def config(**changes: Any) -> dict[str, Any]:
    """Return the least that a Llama's config.json must say, with changes; None takes a key away."""
    return {key: value for key, value in (LEAST | changes).items() if value is not None}


def attention_of(c: ModelConfig) -> AttentionConfig:
    """Return the attention of the first layer, which all layers share but for their windows."""
    first = c.attentions[0]
    assert [replace(each, window=first.window) for each in c.attentions] == [first] * c.num_layers
    return first


def feed_of(c: ModelConfig) -> MLPConfig:
    """Return the feed-forward that all layers share."""
    feed = c.layers[0].feed
    assert isinstance(feed, MLPConfig)
    assert all(layer.feed == feed for layer in c.layers)
    return feed


def windows_of(c: ModelConfig) -> tuple[int, ...]:
    """Return each layer's window."""
    assert len(c.attentions) == c.num_layers
    return tuple(each.window for each in c.attentions)


def failure(parsed: dict[str, Any]) -> str:
    """Return the one line that a config is refused with."""
    with pytest.raises(ModelError) as caught:
        read_model_config(parsed, "here.json")
    text = str(caught.value)
    assert text.startswith("here.json: ")
    assert "\n" not in text
    return text.removeprefix("here.json: ")


# --------------------------------------------------------------------------------------------------------------------
# What is read
# --------------------------------------------------------------------------------------------------------------------


@every_case
def test_shapes_of_every_case(case: Case, tmp_path: Path) -> None:
    got, c = model_config(str(write_model(case, tmp_path))), case.config
    assert got == read_model_config(c)
    assert (got.model_type, got.vocab_size, got.hidden_size) == (c["model_type"], c["vocab_size"], c["hidden_size"])
    attention, feed = attention_of(got), feed_of(got)
    assert (feed.intermediate_size, got.num_layers) == (c["intermediate_size"], c["num_hidden_layers"])
    assert feed.activation == "silu"
    assert (attention.num_heads, attention.num_kv_heads) == (c["num_attention_heads"], c["num_key_value_heads"])
    assert attention.head_dim == head_dim(c)
    assert attention.scale == 1 / math.sqrt(head_dim(c))
    assert got.norm_eps == c["rms_norm_eps"]
    assert got.max_position_embeddings == c["max_position_embeddings"]
    assert got.tie_word_embeddings is c["tie_word_embeddings"]
    specs = tensor_specs(c)
    assert attention.qkv_bias is ("model.layers.0.self_attn.q_proj.bias" in specs)
    assert attention.o_bias is ("model.layers.0.self_attn.o_proj.bias" in specs)
    assert feed.bias is ("model.layers.0.mlp.down_proj.bias" in specs)
    assert attention.qk_norm == ("head" if "model.layers.0.self_attn.q_norm.weight" in specs else "")
    assert parameters(got) == sum(math.prod(shape) for shape in specs.values())


@every_case
def test_angles_of_every_case(case: Case) -> None:
    attention = attention_of(read_model_config(case.config))
    positions = np.array([0, 1, 2, 17, 39, 63], np.int32)
    for length in (16, 33, 64):
        cos, sin = Rope(attention.rope)(positions, np.full(6, length, np.int32))
        assert cos.dtype == sin.dtype == np.float32
        angles, factor = naive_layers.rope_angles(case.config, attention.head_dim, positions.astype(np.int64), length)
        np.testing.assert_allclose(cos, factor * np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(sin, factor * np.sin(angles), atol=1e-5)


def test_the_least_llama() -> None:
    rope = RopeConfig("default", 16, 10000.0, original_positions=2048)
    assert read_model_config(LEAST) == ModelConfig(
        model_type="llama",
        vocab_size=100,
        hidden_size=64,
        max_position_embeddings=2048,
        norm_eps=1e-6,
        tie_word_embeddings=False,
        layers=(LayerConfig(AttentionConfig(4, 4, 16, rope, scale=0.25), MLPConfig(96)),) * 3,
    )


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "positions", "dim", "windows", "biases"),
    [
        ("llama", 32, 2048, 2, (0, 0, 0), (False, False)),
        ("mistral", 8, 131072, 2, (4096, 4096, 4096), (False, False)),
        ("qwen2", 32, 32768, 2, (0, 0, 0), (True, False)),
        ("qwen3", 32, 32768, 128, (0, 0, 0), (False, False)),
    ],
)
def test_defaults_of_an_architecture(
    model_type: str, kv_heads: int, positions: int, dim: int, windows: tuple[int, ...], biases: tuple[bool, bool]
) -> None:
    """Compare with the defaults of transformers' configuration classes."""
    c = read_model_config(config(model_type=model_type, num_attention_heads=32))
    attention = attention_of(c)
    assert (attention.num_kv_heads, c.max_position_embeddings, attention.head_dim) == (kv_heads, positions, dim)
    assert (windows_of(c), (attention.qkv_bias, attention.o_bias)) == (windows, biases)
    assert (feed_of(c).bias, attention.qk_norm) == (False, "head" if model_type == "qwen3" else "")
    assert (c.norm_eps, attention.rope.theta, c.tie_word_embeddings) == (1e-6, 10000.0, False)


def test_null_means_what_is_derived() -> None:
    nulls = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "rope_parameters": None}
    assert read_model_config(LEAST | nulls) == read_model_config(LEAST)
    assert read_model_config(LEAST | {"quantization_config": None}) == read_model_config(LEAST)


def test_both_generations_of_rope_say_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    older = read_model_config(config(rope_theta=500000.0, rope_scaling=scaling))
    newer = read_model_config(config(rope_parameters=scaling | {"rope_theta": 500000.0}))
    assert older == newer
    assert attention_of(newer).rope == RopeConfig(
        "llama3", 16, 500000.0, 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0
    )
    plain = read_model_config(config(rope_parameters={"rope_type": "default", "rope_theta": 7.0}))
    assert plain == read_model_config(config(rope_theta=7.0))


def test_the_kind_of_rope_may_be_called_type() -> None:
    for key in ("type", "rope_type"):
        c = read_model_config(config(rope_scaling={key: "linear", "factor": 4}))
        assert attention_of(c).rope == RopeConfig("linear", 16, 10000.0, 4.0, 2048)


def test_yarn_without_a_factor_takes_it_from_the_positions() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    rope = attention_of(read_model_config(config(max_position_embeddings=4096, rope_scaling=scaling))).rope
    assert (rope.factor, rope.original_positions) == (4.0, 1024)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, (16, 16, 16)),
        ({"model_type": "mistral", "sliding_window": 0}, (0, 0, 0)),
        ({"model_type": "qwen2", "sliding_window": 16}, (0, 0, 0)),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, (0, 0, 0)),
        (
            {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            (0, 16, 16),
        ),
        ({"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, (16,) * 3),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (16, 0, 16),
        ),
    ],
)
def test_windows(changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert windows_of(read_model_config(config(num_key_value_heads=4, **changes))) == windows


def test_a_null_window_of_mistral_is_none() -> None:
    given = config(model_type="mistral", num_key_value_heads=4) | {"sliding_window": None}
    assert windows_of(read_model_config(given)) == (0, 0, 0)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_attention_bias(model_type: str) -> None:
    c = read_model_config(config(model_type=model_type, num_key_value_heads=4, attention_bias=True))
    attention = attention_of(c)
    assert (attention.qkv_bias, attention.o_bias, feed_of(c).bias) == (True, True, False)


# --------------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "gpt2", "", 3, ["llama"], {"a": 1}])
def test_an_unknown_architecture(kind: Any) -> None:
    text = failure(LEAST | {"model_type": kind})
    assert text == f"model_type {kind!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"


@pytest.mark.parametrize("key", [key for key in LEAST if key != "model_type"])
def test_a_missing_key(key: str) -> None:
    assert failure(config(**{key: None})) == f"{key} is missing"


@pytest.mark.parametrize("value", [0, -4, "many", None, [4]])
@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_a_size_that_cannot_be(key: str, value: Any) -> None:
    failure(LEAST | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 0}, "intermediate_size is 0; it must be a whole number from 1 to 16777216"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "num_attention_heads 4 is not a multiple of num_key_value_heads 8"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2; it must be a whole number from 1 to 16384"),
        ({"head_dim": 15}, "head_dim 15 is odd; rotary embedding needs pairs"),
        (
            {"hidden_act": "gelu"},
            "hidden_act 'gelu' is not supported; supported are silu, swish, gelu_pytorch_tanh, gelu_new",
        ),
        (
            {"sliding_window": 16},
            "sliding_window (16) is not known for llama, and may change what is computed; if it does not, remove it"
            " from the file",
        ),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "weights quantised by 'hqq' cannot be read, but those by awq, compressed-tensors, fbgemm_fp8, fp8, gptq;"
            " get such a model, a GGUF file, or the BF16, F16 or F32 model",
        ),
        (
            {
                "model_type": "qwen3",
                "num_key_value_heads": 4,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"],
            },
            "layer_types has 1 entries for 3 layers",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
            "layer_types is ['full_attention', 'full_attention', 'full_attention']; mistral is supported without it"
            " only",
        ),
    ],
)
def test_values_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    assert failure(config(**changes)) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 2}},
            f"rope scaling 'ntk' is not supported; supported are {', '.join(KINDS[1:])}",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2}},
            "rope scaling 'longrope': short_factor must be a list of 8 numbers above 0, half the rotated dimensions",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' has no factor"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope scaling 'dynamic' has no factor"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' has no factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "high_freq_factor": 4}},
            "rope scaling 'llama3': low_freq_factor is missing",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1; llama rotates whole heads"),
    ],
)
def test_rope_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    assert failure(config(**changes)) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": "linear"},
        {"rope_scaling": ["linear", 2.0]},
        {"rope_scaling": {"type": ["linear"], "factor": 2}},
        {"rope_scaling": {"type": "linear", "factor": "two"}},
        {"rope_scaling": {"type": "linear", "factor": [2]}},
        {"rope_theta": "large"},
        {"rope_theta": [1]},
        {"max_position_embeddings": "long"},
        {"rms_norm_eps": {}},
        {"quantization_config": "gptq"},
        {"hidden_act": ["silu"]},
        {"num_key_value_heads": {}, "head_dim": "x"},
    ],
    ids=str,
)
def test_values_of_another_type_are_a_users_error(changes: dict[str, Any]) -> None:
    failure(config(**changes))


@pytest.mark.parametrize("theta", [0, -10000.0])
def test_a_theta_that_no_angle_comes_from(theta: float) -> None:
    assert "rope_theta" in failure(config(rope_theta=theta))


# --------------------------------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": }', b"\xff\xfe", b"not json", b"{'model_type': 'llama'}"])
def test_a_file_that_is_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON: ") as caught:
        model_config(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"llama"'])
def test_a_file_that_is_not_an_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: not a JSON object"):
        read_config(tmp_path)


def test_no_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no such model directory; give --model a folder"):
        model_config(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"not a model directory \(no config\.json\)"):
        model_config(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"not a model directory"):
        model_config(str(tmp_path / "file"))


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(vocab_size=None)))
    with pytest.raises(ModelError) as caught:
        model_config(str(tmp_path))
    assert str(caught.value) == f"{tmp_path / 'config.json'}: vocab_size is missing"
