"""Tiny random mixture-of-experts models, in the names, shapes and types of the published checkpoints.

Like ``tests.tiny_models``, whose ``Case`` they are: complete configurations in the manner of well-known models, scaled
down, with weights from ``numpy.random.RandomState``. Here the tensors of one checkpoint may differ in type: the
correction bias of GLM-4.5's router is float32 among bfloat16, the experts of gpt-oss are MXFP4.
"""

from __future__ import annotations

from typing import Any

from tests.sparse_configs import (
    GRANITEMOE,
    QWEN3_MOE_MIXED,
    glm4_moe,
    gpt_oss,
    gpt_oss_bf16,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from tests.sparse_tensors import checkpoint
from tests.tiny_models.case import Case, Config


def _case(name: str, config: Config, seed: int, dtype: str = "BF16", **others: Any) -> Case:
    return Case(name, config, dtype, seed, checkpoint=checkpoint, **others)


_ALL_CASES = [
    _case(
        "qwen3_moe",
        qwen3_moe(),
        seed=10,
        shards=2,
        generation={
            "bos_token_id": 148,
            "do_sample": True,
            "eos_token_id": [150, 148],
            "pad_token_id": 148,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
    ),
    _case("qwen3_moe_mixed", QWEN3_MOE_MIXED, seed=12, dtype="F32"),
    _case("qwen2_moe", qwen2_moe(), seed=4),
    _case(
        "qwen2_moe_mixed",
        qwen2_moe(
            mlp_only_layers=[1],
            norm_topk_prob=True,
            num_experts=8,
            num_experts_per_tok=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            torch_dtype="float32",
        ),
        seed=14,
        dtype="F32",
    ),
    _case("mixtral", mixtral(), seed=3),
    _case(
        "mixtral_window",
        mixtral(head_dim=24, num_experts_per_tok=3, num_local_experts=6, sliding_window=16, torch_dtype="float32"),
        seed=2,
        dtype="F32",
    ),
    _case(
        "olmoe",
        olmoe(),
        seed=12,
        generation={
            "_from_model_config": True,
            "eos_token_id": 143,
            "pad_token_id": 1,
            "transformers_version": "4.43.0",
        },
    ),
    _case(
        "olmoe_clip",
        olmoe(clip_qkv=2.0, norm_topk_prob=True, num_key_value_heads=2, torch_dtype="float32"),
        seed=1,
        dtype="F32",
        generation={
            "_from_model_config": True,
            "eos_token_id": 143,
            "pad_token_id": 1,
            "transformers_version": "4.43.0",
        },
    ),
    _case("granitemoe", GRANITEMOE, seed=4),
    _case(
        "gpt_oss",
        gpt_oss(),
        seed=2,
        generation={
            "bos_token_id": 142,
            "do_sample": True,
            "eos_token_id": [146, 143, 147],
            "pad_token_id": 143,
            "transformers_version": "4.55.0.dev0",
        },
    ),
    _case(
        "gpt_oss_bf16",
        gpt_oss_bf16(),
        seed=2,
        generation={"eos_token_id": [146, 143, 147], "pad_token_id": 143, "transformers_version": "5.0.0"},
    ),
    _case(
        "glm4_moe",
        glm4_moe(),
        seed=80,
        generation={
            "_from_model_config": True,
            "eos_token_id": [144, 147, 149],
            "pad_token_id": 144,
            "transformers_version": "4.54.0",
        },
    ),
    # After GLM-4.5's: norms of queries and keys, a scaling factor; and groups, which no published one has.
    _case(
        "glm4_moe_groups",
        glm4_moe(
            first_k_dense_replace=2,
            n_group=4,
            n_routed_experts=16,
            n_shared_experts=2,
            norm_topk_prob=False,
            num_experts_per_tok=4,
            num_hidden_layers=4,
            num_nextn_predict_layers=0,
            routed_scaling_factor=2.5,
            topk_group=2,
            torch_dtype="float32",
            use_qk_norm=True,
        ),
        seed=88,
        dtype="F32",
        generation={
            "_from_model_config": True,
            "eos_token_id": [144, 147, 149],
            "pad_token_id": 144,
            "transformers_version": "4.54.0",
        },
    ),
]

SPARSE_CASES: dict[str, Case] = {case.name: case for case in _ALL_CASES}

SPARSE_ABLATIONS: dict[str, list[Config]] = {
    # Changes to the config of a case, each of which has to change its logits.
    "qwen3_moe": [{"norm_topk_prob": False}, {"num_experts_per_tok": 3}, {"rope_theta": 10000.0}],
    "qwen3_moe_mixed": [{"norm_topk_prob": True}, {"num_experts_per_tok": 1}, {"attention_bias": False}],
    "qwen2_moe": [{"norm_topk_prob": True}, {"num_experts_per_tok": 3}, {"use_sliding_window": True}],
    "qwen2_moe_mixed": [{"norm_topk_prob": False}, {"num_experts_per_tok": 1}],
    "mixtral": [{"num_experts_per_tok": 1}, {"sliding_window": 16}],
    "mixtral_window": [{"num_experts_per_tok": 2}, {"sliding_window": None}, {"sliding_window": 17}],
    "olmoe": [{"norm_topk_prob": True}, {"num_experts_per_tok": 3}, {"clip_qkv": 2.0}],
    "olmoe_clip": [{"norm_topk_prob": False}, {"num_experts_per_tok": 3}, {"clip_qkv": None}],
    "granitemoe": [
        {"attention_multiplier": 0.25},
        {"embedding_multiplier": 1.0},
        {"residual_multiplier": 1.0},
        {"logits_scaling": 1.0},
        {"num_experts_per_tok": 1},
    ],
    "gpt_oss": [
        {"num_experts_per_tok": 1},
        {"layer_types": ["full_attention"] * 3},
        {"sliding_window": 15},
        {"sliding_window": 17},
        {"swiglu_limit": 100.0},
        {"swiglu_alpha": 1.0},
        {"rope_scaling": gpt_oss()["rope_scaling"] | {"truncate": True}},
        {"rope_scaling": gpt_oss()["rope_scaling"] | {"attention_factor": 1.0}},
        {"attention_bias": False},
    ],
    "gpt_oss_bf16": [{"swiglu_alpha": 1.702}, {"swiglu_limit": 7.0}, {"num_experts_per_tok": 2}],
    "glm4_moe": [
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1},
        {"partial_rotary_factor": 1.0},
        {"routed_scaling_factor": 2.5},
        {"attention_bias": False},
    ],
    "glm4_moe_groups": [
        {"norm_topk_prob": True},
        {"routed_scaling_factor": 1.0},
        {"topk_group": 4},
        {"topk_group": 1},
        {"n_group": 2},
        {"use_qk_norm": False},
    ],
}

FILLED: dict[str, list[tuple[str, float]]] = {
    # Ends of names with the value that switches these tensors off, which has to change the logits too.
    "qwen2_moe": [("shared_expert_gate.weight", 0.0), ("shared_expert.down_proj.weight", 0.0)],
    "gpt_oss": [
        ("sinks", -100.0),
        ("router.bias", 0.0),
        ("gate_up_proj_bias", 0.0),
        ("down_proj_bias", 0.0),
        ("o_proj.bias", 0.0),
    ],
    "glm4_moe": [("e_score_correction_bias", 0.0), ("shared_experts.down_proj.weight", 0.0)],
    "glm4_moe_groups": [("e_score_correction_bias", 0.0)],
}
