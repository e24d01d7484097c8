"""config.json of the dense families: their defaults, what is refused by its name, and absurd values."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dllama_mpi.architectures.registry import read_config, read_model_config
from dllama_mpi.errors import ModelError
from dllama_mpi.model.config import AttentionConfig, MLPConfig, ModelConfig
from dllama_mpi.model.rope import RopeConfig
from dllama_mpi.text.files import read_json
from tests.tiny_dense import DENSE_CASES
from tests.tiny_dense.common import FULL, SLIDING
from tests.tiny_models.case import Config
from tests.tiny_models.cases import CASES

ALL = CASES | DENSE_CASES


def failure(config: Any) -> str:
    """Return the one line that a config is refused with."""
    with pytest.raises(ModelError) as caught:
        read_model_config(config, "here.json")
    text = str(caught.value)
    assert text.startswith("here.json: ")
    assert "\n" not in text
    assert len(text) < 600
    return text.removeprefix("here.json: ")


def changed(name: str, change: Config) -> Config:
    """Return a case's config with changes, in text_config where the key is there; `...` takes a key away."""
    config = dict(ALL[name].config)
    if "text_config" in config:
        config["text_config"] = _without(config["text_config"] | change)
        return config
    return _without(config | change)


def _without(config: Config) -> Config:
    return {key: value for key, value in config.items() if value is not ...}


def attention(config: ModelConfig, layer: int = 0) -> AttentionConfig:
    """Return a layer's attention."""
    mixer = config.layers[layer].mixer
    assert isinstance(mixer, AttentionConfig)
    return mixer


# ---- defaults

LEAST: Config = {
    "vocab_size": 100,
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
}


@pytest.mark.parametrize(
    ("kind", "kv_heads", "dim", "positions", "eps", "theta", "tied", "windows", "biases"),
    [
        ("gemma2", 4, 256, 8192, 1e-6, 1e4, True, (4096, 0, 4096, 0), (False, False, False)),
        ("gemma3_text", 4, 256, 131072, 1e-6, 1e4, True, (4096, 4096, 4096, 4096), (False, False, False)),
        ("phi3", 16, 32, 4096, 1e-5, 1e4, False, (0, 0, 0, 0), (False, False, False)),
        ("granite", 16, 32, 2048, 1e-6, 1e4, False, (0, 0, 0, 0), (False, False, False)),
        ("smollm3", 4, 32, 32768, 1e-6, 2e6, True, (0, 0, 0, 0), (False, False, False)),
        ("olmo2", 16, 32, 2048, 1e-5, 1e4, False, (0, 0, 0, 0), (False, False, False)),
        ("olmo3", 16, 32, 2048, 1e-5, 5e5, False, (4096, 4096, 4096, 0), (False, False, False)),
        ("ministral3", 8, 128, 262144, 1e-5, 1e6, False, (0, 0, 0, 0), (False, False, False)),
        ("seed_oss", 8, 128, 524288, 1e-6, 1e4, False, (0, 0, 0, 0), (True, False, False)),
        ("ernie4_5", 2, 128, 131072, 1e-5, 5e5, True, (0, 0, 0, 0), (False, False, False)),
        ("hunyuan_v1_dense", 16, 32, 2048, 1e-5, 1e4, False, (0, 0, 0, 0), (False, False, False)),
    ],
)
def test_defaults_are_those_of_the_configuration_class(
    kind: str, kv_heads: int, dim: int, positions: int, eps: float, theta: float, tied: bool,
    windows: tuple[int, ...], biases: tuple[bool, bool, bool],
) -> None:  # fmt: skip
    """Compare with transformers 5.24."""
    c = read_model_config(LEAST | {"model_type": kind})
    first, feed = attention(c), c.layers[0].feed
    assert isinstance(feed, MLPConfig)
    assert (first.num_kv_heads, first.head_dim, c.max_position_embeddings) == (kv_heads, dim, positions)
    assert (c.norm_eps, first.rope.theta, c.tie_word_embeddings) == (eps, theta, tied)
    assert tuple(attention(c, i).window for i in range(4)) == windows
    assert (first.qkv_bias, first.o_bias, feed.bias) == biases
    assert feed.activation == ("gelu_tanh" if kind.startswith("gemma") else "silu")
    nulled = read_model_config(LEAST | {"model_type": kind, "num_key_value_heads": None, "head_dim": None})
    assert (attention(nulled).num_kv_heads, attention(nulled).head_dim) == (16, 32)


def test_gemma_3_4b_as_published() -> None:
    """google/gemma-3-4b-it: most keys are missing, and have the defaults."""
    text: Config = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    c = read_model_config({"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": text})
    assert (c.model_type, c.vocab_size, c.hidden_size, c.num_layers) == ("gemma3", 262208, 2560, 34)
    assert (c.embedding_scale, c.logit_softcap, c.tie_word_embeddings) == (math.sqrt(2560), 0.0, True)
    for i, layer in enumerate(c.layers):
        a, full = attention(c, i), i % 6 == 5
        assert (layer.norm_before, layer.norm_after) == (True, True)
        assert (a.num_heads, a.num_kv_heads, a.head_dim, a.scale, a.qk_norm) == (8, 4, 256, 1 / 16, "head")
        assert (a.window, a.rope.kind, a.rope.theta) == ((0, "linear", 1e6) if full else (1024, "default", 1e4))


def test_what_families_add_to_llama() -> None:
    c = read_model_config(DENSE_CASES["gemma2"].config)
    assert (attention(c).softcap, attention(c).scale, c.logit_softcap) == (4.0, 20**-0.5, 3.0)
    none = changed("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": None})
    c = read_model_config(none)
    assert (attention(c).softcap, attention(c).window, c.logit_softcap) == (0.0, 0, 0.0)
    c = read_model_config(changed("gemma2", {"attn_logit_softcapping": ..., "final_logit_softcapping": ...}))
    assert (attention(c).softcap, c.logit_softcap) == (50.0, 30.0)
    c = read_model_config(DENSE_CASES["granite"].config)
    assert (attention(c).scale, c.layers[0].residual_scale, c.embedding_scale, c.logit_scale) == (0.4, 0.6, 4.0, 0.5)
    c = read_model_config(DENSE_CASES["olmo3"].config)
    assert [layer.norm_before for layer in c.layers] == [False] * 4
    assert [attention(c, i).rope.kind for i in range(4)] == ["default"] * 3 + ["yarn"]
    c = read_model_config(DENSE_CASES["ministral3"].config)
    assert c.query_scaling == (0.5, 16)
    c = read_model_config(DENSE_CASES["hunyuan"].config)
    assert attention(c).rope.theta == pytest.approx(1e4 * 1000 ** (24 / 22))
    assert (attention(c).rope.kind, attention(c).qk_norm, attention(c).norm_last) == ("default", "head", True)


def test_the_original_context_beside_the_parameters_comes_first() -> None:
    given = DENSE_CASES["phi3_longrope"].config
    inside = given["rope_scaling"] | {"original_max_position_embeddings": 64}
    rope = attention(read_model_config(given | {"rope_scaling": inside})).rope
    assert (rope.original_positions, rope.factor) == (32, 4.0)
    named = given["rope_scaling"] | {"type": "su"}
    assert attention(read_model_config(given | {"rope_scaling": named})).rope == rope


def test_layers_without_rope() -> None:
    c = read_model_config(DENSE_CASES["smollm3"].config)
    assert [attention(c, i).rope for i in (0, 3)] == [
        RopeConfig("default", 16, 5e6, original_positions=128),
        RopeConfig("none", 16, 5e6),
    ]
    more = read_model_config(changed("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1, 1]}))
    assert more == c


@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [
        ({}, {}, False),
        ({"tie_word_embeddings": True}, {}, True),
        ({"tie_word_embeddings": False}, {}, False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, False),
        ({}, {"tie_word_embeddings": True}, True),
    ],
)
def test_whether_a_multimodal_model_is_tied(top: Config, text: Config, tied: bool) -> None:
    config = DENSE_CASES["mistral_small"].config
    c = read_model_config(config | top | {"text_config": config["text_config"] | text})
    assert c.tie_word_embeddings is tied
    assert c == replace(read_model_config(config), tie_word_embeddings=tied)


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "change", "fragment"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; it must be above 0"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0; it must be above 0"),
        ("gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping is -1; it must be above 0"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        ("gemma2", {"layer_types": [FULL]}, "layer_types has 1 entries for 3 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types has 'chunked_attention'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3_text", {"rope_local_base_freq": 1}, "rope_local_base_freq is 1; it must be above 1"),
        ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ("gemma3_nested", {"rope_parameters": {"rope_type": "default"}}, "must be objects by full_attention and"),
        ("gemma3_nested", {"rope_parameters": {FULL: 3}}, "must be objects by full_attention and sliding_attention"),
        ("gemma3_nested", {"rope_scaling": {"factor": 8.0, "type": "linear"}}, "rope_scaling"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "text_config: final_logit_softcapping is 30.0"),
        ("gemma3", {"new_key": 3}, "text_config: new_key (3) is not known for gemma3_text"),
        ("gemma3", {"model_type": "gemma2"}, "text_config: model_type 'gemma2' is not supported"),
        ("phi3", {"attention_bias": True}, "attention_bias (True) is not known for phi3"),
        ("phi3", {"mlp_bias": True}, "mlp_bias (True)"),
        ("phi4_mini", {"lm_head_bias": True}, "lm_head_bias (True)"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "it must be longrope or nothing for phi3"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "short_factor must be a list of 12 numbers"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [0] * 12}}, "short_factor must be a list"),
        ("phi3", {"blocksparse_block_size": 64}, "blocksparse_block_size (64) is not known"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0; it must be above 0"),
        ("granite", {"embedding_multiplier": "12"}, "embedding_multiplier is '12'; it must be a number"),
        ("granite", {"position_embedding_type": "nope"}, "position_embedding_type ('nope') is not known"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers is [1, 0, 1]; it must be a list of 4 numbers"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2]}, "no_rope_layers is [1, 0, 1, 2]; it must be a list of numbers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("smollm3", {"layer_types": [SLIDING] * 4, "sliding_window": 8}, "use_sliding_window is False; it must be"),
        ("smollm3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1; smollm3 rotates whole heads"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv (8.0) is not known for olmo2"),
        ("olmo3", {"clip_qkv": 8.0}, "clip_qkv (8.0) is not known for olmo3"),
        ("olmo3", {"rope_parameters": {"rope_type": "default"}}, "must be objects by full_attention"),
        ("ministral3", {"layer_types": [SLIDING, FULL]}, "layer_types has 'sliding_attention'; supported are full"),
        ("ministral3", {"attention_bias": True}, "attention_bias (True) is not known"),
        ("ministral3", {"mlp_bias": True}, "mlp_bias (True) is not known"),
        ("mistral3", {"model_type": "llama"}, "text_config: model_type 'llama' is not supported; supported are"),
        ("mistral3", {"rms_norm_eps": 0}, "text_config: rms_norm_eps is 0"),
        ("seed_oss", {"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ("seed_oss", {"use_qk_norm": True}, "use_qk_norm (True) is not known"),
        ("ernie4_5", {"attention_bias": True}, "attention_bias (True) is not known for ernie4_5"),
        ("ernie4_5", {"mlp_bias": True}, "mlp_bias (True) is not known for ernie4_5"),
        ("ernie4_5", {"moe_num_experts": 64}, "moe_num_experts (64) is not known"),
        ("hunyuan", {"use_qk_norm": False}, "use_qk_norm is False; hunyuan_v1_dense is supported with True only"),
        ("hunyuan", {"use_rotary_pos_emb": False}, "use_rotary_pos_emb is False"),
        ("hunyuan", {"norm_type": "layer"}, "norm_type is 'layer'"),
        ("hunyuan", {"use_cla": True}, "use_cla (True) is not known"),
        ("hunyuan", {"mlp_bias": True}, "mlp_bias (True) is not known"),
        ("hunyuan", {"num_experts": 8}, "num_experts is 8; hunyuan_v1_dense is supported with 1 only"),
        ("hunyuan", {"use_mixed_mlp_moe": True}, "use_mixed_mlp_moe (True) is not known"),
        ("hunyuan", {"add_classification_head": True}, "add_classification_head (True) is not known"),
        ("hunyuan", {"attention_head_dim": 32}, "attention_head_dim is 32; hunyuan_v1_dense is supported with 24"),
        ("hunyuan", {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 2.0}}, "it must be dynamic"),
        ("hunyuan", {"rope_scaling": {"type": "dynamic", "alpha": 1e300}}, "it must be dynamic, with alpha above 0"),
    ],
    ids=str,
)  # fmt: skip
def test_what_would_change_the_result_is_refused_by_its_name(name: str, change: Config, fragment: str) -> None:
    assert fragment in failure(changed(name, change))


def test_a_text_config_that_is_none() -> None:
    for name in ("gemma3", "mistral3"):
        values: tuple[Any, ...] = (None, 3, [], "text")
        for value in values:
            assert "text_config is" in failure(DENSE_CASES[name].config | {"text_config": value})


# ---- absurd values

FAMILIES = ("llama2", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2", "olmo3", "ministral3", "seed_oss",
            "ernie4_5", "hunyuan")  # fmt: skip
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size",
          "vocab_size", "max_position_embeddings")  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "value", [1e9, 10**9, 1e30, 10**400, -1, -(10**400), 0, 1.5, math.inf, math.nan, "8", [], True]
)
def test_counts_that_no_model_has(name: str, value: Any) -> None:
    for key in COUNTS:
        if value not in (1e9, 10**9) or key != "max_position_embeddings":
            assert f"{key} is " in failure(changed(name, {key: value}))
    assert "head_dim is " in failure(changed(name, {"head_dim": value}))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", [0, -1.0, 10**400, math.inf, math.nan, "small"])
def test_an_epsilon_that_is_none(name: str, value: Any) -> None:
    assert "rms_norm_eps is " in failure(changed(name, {"rms_norm_eps": value}))


@pytest.mark.parametrize("theta", [1, 1.0, 0, -5, 10**400, math.inf, math.nan, "large"])
@pytest.mark.parametrize("scaling", ["yarn", "linear", "dynamic", "llama3"])
def test_a_base_of_angles_that_is_none(theta: Any, scaling: str) -> None:
    rope = {"rope_type": scaling, "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4}
    assert "rope_theta" in failure(changed("llama2", {"rope_scaling": rope, "rope_theta": theta}))
    assert "rope_theta" in failure(changed("llama2", {"rope_scaling": rope | {"rope_theta": theta}}))


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 0},
        {"type": "yarn", "factor": -4.0},
        {"type": "yarn", "factor": 10**400},
        {"type": "yarn", "factor": 4.0, "beta_fast": 1e-320},
        {"type": "yarn", "factor": 4.0, "attention_factor": math.nan},
        {"type": "yarn", "factor": 1e-320},
        {"type": "linear", "factor": 5e-324},
        {"type": "dynamic", "factor": -1},
        {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
        {"type": "longrope", "factor": 4, "short_factor": [math.inf] * 8, "long_factor": [1] * 8},
        {"type": "longrope", "factor": 4, "short_factor": [1] * 8, "long_factor": [True, 10**400] * 4},
        {"type": ["yarn"]},
        {"type": {}},
        {"type": "yarn", "factor": [4]},
        [],
        ["yarn"],
        "yarn",
        {"type": "yarn", "factor": 2, "alpha": 3},
    ],
    ids=str,
)
def test_a_rope_scaling_that_is_none(scaling: Any) -> None:
    if scaling == []:
        assert read_model_config(changed("llama2", {"rope_scaling": scaling}))  # as good as null
    else:
        assert "rope scaling" in failure(changed("llama2", {"rope_scaling": scaling}))


@pytest.mark.parametrize("brackets", ["[", '{"a":'])
def test_deep_nesting(brackets: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(brackets * 200_000)
    for read in (partial(read_config, tmp_path), partial(read_json, tmp_path / "config.json")):
        with pytest.raises(ModelError, match=r"config\.json.* cannot be read") as caught:
            read()
        assert len(str(caught.value)) < 500


def test_a_long_value_is_cut_short() -> None:
    assert len(failure(changed("llama2", {"new_key": "x" * 100_000}))) < 300
    assert len(failure(json.loads(json.dumps(changed("llama2", {"hidden_act": list(range(100_000))}))))) < 300
