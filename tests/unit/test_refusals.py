"""config.json of the families with experts: what is refused by name, and what two ways of saying the same give."""

from __future__ import annotations

from typing import Any

import pytest

from dllama_mpi.architectures.registry import ARCHITECTURES, read_model_config
from dllama_mpi.errors import ModelError
from dllama_mpi.model.config import AttentionConfig, ExpertsConfig, MLPConfig, ModelConfig
from tests.sparse_configs import GRANITEMOE, QWEN3_MOE_MIXED, glm4_moe, gpt_oss, gpt_oss_bf16, mixtral, olmoe, qwen2_moe
from tests.sparse_configs import qwen3_moe as qwen3_moe
from tests.tiny_sparse import SPARSE_CASES

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": qwen3_moe(),
    "qwen2_moe": qwen2_moe(),
    "mixtral": mixtral(),
    "olmoe": olmoe(),
    "granitemoe": GRANITEMOE,
    "gpt_oss": gpt_oss(),
    "glm4_moe": glm4_moe(),
}
COUNT = {"mixtral": "num_local_experts", "granitemoe": "num_local_experts", "gpt_oss": "num_local_experts",
         "glm4_moe": "n_routed_experts"}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "full_attention"]


def read(family: str, **changes: Any) -> ModelConfig:
    """Return what a family's config says with changes; ... takes a key away."""
    config = {key: value for key, value in (CONFIGS[family] | changes).items() if value is not ...}
    return read_model_config(config, "here")


def attention(config: ModelConfig) -> AttentionConfig:
    """Return the first layer's attention."""
    return config.attentions[0]


def experts(config: ModelConfig) -> ExpertsConfig:
    """Return the last layer's experts."""
    feed = config.layers[-1].feed
    assert isinstance(feed, ExpertsConfig)
    return feed


def test_all_families_are_tried() -> None:
    tried = {case.config["model_type"] for case in SPARSE_CASES.values()}
    assert tried == set(CONFIGS) <= set(ARCHITECTURES)


# ---- what every family refuses


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be a whole number from 1 to"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok is 99; it must be a whole number from 1 to"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types has"),
        ({"rope_scaling": {"rope_type": "other", "factor": 2}}, "rope scaling 'other' is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "weights quantised by 'hqq' cannot be read"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be above 0"),
        ({"attention_sink_bias": True}, "attention_sink_bias (True) is not known for"),
        ({"n_hash_layers": 2}, "n_hash_layers (2) is not known for"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_every_family(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(family, **changes)
    assert str(caught.value).startswith(f"here: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("count", [0, -1, 1 << 20, 2.5, "8", True])
def test_a_number_of_experts_that_cannot_be(family: str, count: Any) -> None:
    key = COUNT.get(family, "num_experts")
    with pytest.raises(ModelError, match=rf"^here: {key} is "):
        read(family, **{key: count})


# ---- what single families refuse


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"num_local_experts": 8}, "num_experts is 16 and num_local_experts 8"),
        ("qwen3_moe", {"qkv_bias": True}, "qkv_bias is True"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "mlp_only_layers is [3]; it must be a list of numbers from 0 to 2"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers is [True]"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1"),
        ("qwen3_moe", {"layer_types": SLIDING}, "layer_types has 'sliding_attention'"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
        ("qwen3_moe", {"head_dim": 31}, "head_dim 31 is odd"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ("qwen2_moe", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
        ("qwen2_moe", {"layer_types": SLIDING}, "layer_types has 'sliding_attention'"),
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": SLIDING[:2]}, "layer_types has 2 entries for 3"),
        ("mixtral", {"num_experts": 4}, "num_experts is 4 and num_local_experts 8"),
        ("mixtral", {"attention_bias": True}, "attention_bias (True) is not known for mixtral"),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv is 0; it must be above 0"),
        ("olmoe", {"clip_qkv": -1.5}, "clip_qkv is -1.5; it must be above 0"),
        ("olmoe", {"sliding_window": 16}, "sliding_window is 16"),
        ("olmoe", {"head_dim": 32}, "head_dim is 32; it must be hidden_size over num_attention_heads"),
        ("granitemoe", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling is 0; it must be above 0"),
        ("granitemoe", {"attention_multiplier": "1"}, "attention_multiplier is '1'; it must be a number"),
        ("granitemoe", {"residual_multiplier": float("inf")}, "residual_multiplier is inf; it must be finite"),
        ("granitemoe", {"sliding_window": 16}, "sliding_window is 16"),
        ("gpt_oss", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh' is not supported"),
        ("gpt_oss", {"experts_per_token": 3}, "experts_per_token is 3"),
        ("gpt_oss", {"initial_context_length": 64}, "initial_context_length is 64"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window is None; it must be the size of the windows"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit is 0; it must be above 0"),
        ("gpt_oss", {"num_experts": 5}, "num_experts is 5 and num_local_experts 4"),
        ("glm4_moe", {"layer_types": SLIDING}, "layer_types has 'sliding_attention'"),
        ("glm4_moe", {"sliding_window": 16}, "sliding_window is 16"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("glm4_moe", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("glm4_moe", {"n_group": 3}, "8 experts do not go with n_group 3"),
        ("glm4_moe", {"n_group": 8, "topk_group": 2}, "8 experts do not go with n_group 8"),
        ("glm4_moe", {"n_group": 4, "num_experts_per_tok": 3}, "8 experts do not go with n_group 4, topk_group 1 and"),
        ("glm4_moe", {"n_group": 2, "topk_group": 3}, "topk_group is 3; it must be a whole number from 1 to 2"),
        ("glm4_moe", {"n_group": 0}, "n_group is 0"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts is 0"),
        ("glm4_moe", {"num_local_experts": 4}, "n_routed_experts is 8 and num_local_experts 4"),
        ("glm4_moe", {"partial_rotary_factor": 2}, "rope scaling: 64 of the 32 dimensions"),
        ("glm4_moe", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_by_a_family(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(family, **changes)
    assert str(caught.value).startswith(f"here: {message}")
    assert "\n" not in str(caught.value)


# ---- what is understood


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mixtral", {}), ("mixtral", {"sliding_window": None}), ("qwen3_moe", {"use_sliding_window": True})],
)
def test_windows_of_no_size_are_none(family: str, changes: dict[str, Any]) -> None:
    found = read(family, **({"sliding_window": 0} | changes))
    assert [getattr(layer.mixer, "window", None) for layer in found.layers] == [0] * found.num_layers


def test_defaults_are_transformers() -> None:
    """Where a file says nothing: the values of transformers' configuration classes."""
    said = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 16}
    found = {kind: read_model_config({"model_type": kind, **said}) for kind in CONFIGS}
    numbers = {kind: (experts(c).num_experts, experts(c).top_k) for kind, c in found.items()}
    assert numbers == {
        "qwen3_moe": (128, 8), "qwen2_moe": (60, 4), "mixtral": (8, 2), "olmoe": (64, 8), "granitemoe": (8, 2),
        "gpt_oss": (128, 4), "glm4_moe": (128, 8),
    }  # fmt: skip
    sizes = {kind: experts(c).expert.intermediate_size for kind, c in found.items()}
    assert sizes == {
        "qwen3_moe": 768, "qwen2_moe": 1408, "mixtral": 14336, "olmoe": 2048, "granitemoe": 11008, "gpt_oss": 2880,
        "glm4_moe": 1408,
    }  # fmt: skip
    heads = {kind: (attention(c).num_kv_heads, attention(c).head_dim) for kind, c in found.items()}
    assert heads == {
        "qwen3_moe": (4, 4), "qwen2_moe": (16, 4), "mixtral": (8, 4), "olmoe": (16, 4), "granitemoe": (16, 4),
        "gpt_oss": (8, 64), "glm4_moe": (8, 4),
    }  # fmt: skip
    thetas = {kind: attention(c).rope.theta for kind, c in found.items()}
    assert thetas == dict.fromkeys(CONFIGS, 1e4) | {"mixtral": 1e6, "gpt_oss": 150000}
    biases = {kind: (attention(c).qkv_bias, attention(c).o_bias) for kind, c in found.items()}
    assert biases == dict.fromkeys(CONFIGS, (False, False)) | {"qwen2_moe": (True, False), "gpt_oss": (True, True)}
    sums_to_one = {kind for kind, c in found.items() if experts(c).normalised}
    assert sums_to_one == {"mixtral", "granitemoe", "gpt_oss", "glm4_moe"}
    windows = {kind: [a.window for a in c.attentions] for kind, c in found.items()}
    assert windows == {kind: [0, 0, 0] for kind in CONFIGS} | {"gpt_oss": [128, 0, 128]}
    eps = {kind: c.norm_eps for kind, c in found.items()}
    assert eps == {kind: 1e-6 if kind in ("qwen3_moe", "qwen2_moe", "granitemoe") else 1e-5 for kind in CONFIGS}
    assert attention(found["granitemoe"]).scale == 1
    rope = attention(found["gpt_oss"]).rope
    assert (rope.kind, rope.factor, rope.original_positions, rope.truncate) == ("yarn", 32, 4096, False)
    assert attention(found["glm4_moe"]).rope.dim == 2
    assert isinstance(found["glm4_moe"].layers[0].feed, MLPConfig)
    assert not any(c.tie_word_embeddings for c in found.values())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe", "granitemoe"])
def test_null_kv_heads_are_as_many_as_heads(family: str) -> None:
    assert attention(read(family, num_key_value_heads=None)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen3_moe", "num_local_experts"), ("mixtral", "num_experts"), ("olmoe", "num_local_experts"),
     ("gpt_oss", "num_experts"), ("glm4_moe", "num_local_experts")],
)  # fmt: skip
def test_the_other_name_of_the_number_of_experts(family: str, name: str) -> None:
    key = COUNT.get(family, "num_experts")
    count = CONFIGS[family][key]
    assert read(family, **{key: ..., name: count}) == read(family) == read(family, **{name: count})


def test_both_generations_of_gpt_oss() -> None:
    older, newer = read("gpt_oss"), read_model_config(gpt_oss_bf16())
    assert attention(older) == attention(newer)
    assert (experts(older).published, experts(newer).published) == ("mxfp4", "")
    assert (experts(older).expert.alpha, experts(newer).expert.alpha) == (1.702, 1.3)


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("qwen3_moe", {"sliding_window": 16}, [0, 0, 0]),
        ("qwen3_moe", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, [16, 16, 16]),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": ...}, [4096, 4096, 4096]),
        ("qwen3_moe", {"use_sliding_window": True}, [0, 0, 0]),  # null
        ("qwen2_moe", {}, [0, 0, 0]),
        ("qwen2_moe", {"use_sliding_window": True}, [16, 0, 0]),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3}, [16, 0, 16]),
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": SLIDING[::-1]}, [0, 0, 16]),
        ("mixtral", {}, [0, 0]),
        ("mixtral", {"sliding_window": 16}, [16, 16]),
        ("gpt_oss", {"layer_types": ...}, [16, 0, 16]),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3, "sliding_window": None}, [0, 0, 0]),
    ],
    ids=str,
)
def test_windows(family: str, changes: dict[str, Any], windows: list[int]) -> None:
    assert [a.window for a in read(family, **changes).attentions] == windows


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [1, 1, 1]),
        ({"mlp_only_layers": None}, [1, 1, 1]),
        ({"mlp_only_layers": [0, 2]}, [0, 1, 0]),
        ({"decoder_sparse_step": 2}, [0, 1, 0]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, [0, 0, 0]),
    ],
    ids=str,
)
def test_which_layers_have_experts(changes: dict[str, Any], sparse: list[int]) -> None:
    for family in ("qwen3_moe", "qwen2_moe"):
        found = [isinstance(layer.feed, ExpertsConfig) for layer in read(family, **changes).layers]
        assert found == list(map(bool, sparse))


def test_fields_of_the_cases() -> None:
    """What the references would show only in numbers."""
    assert attention(read("qwen3_moe", attention_bias=True)).o_bias
    assert not attention(read("glm4_moe")).o_bias
    assert attention(read("glm4_moe")).qkv_bias
    mixed = read_model_config(QWEN3_MOE_MIXED)
    assert (attention(mixed).qkv_bias, attention(mixed).o_bias, attention(mixed).qk_norm) == (True, True, "head")
    assert attention(read("olmoe", clip_qkv=2)).clip == 2
    assert attention(read("olmoe")).clip == 0
    granite = read("granitemoe")
    assert (granite.embedding_scale, granite.layers[1].residual_scale, granite.logit_scale) == (12, 0.22, 1 / 6)
    assert attention(granite).scale == 0.0625
    glm = read("glm4_moe", n_shared_experts=3)
    assert experts(glm).shared == MLPConfig(96)
    assert (attention(glm).rope.dim, glm.later_layers) == (16, 1)
    assert read("glm4_moe", num_nextn_predict_layers=..., num_mtp_layers=2).later_layers == 2
