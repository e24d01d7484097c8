"""Configurations of the dense families beside Gemma."""

from __future__ import annotations

from typing import Any

from tests.tiny_dense.common import FULL, SLIDING, config
from tests.tiny_models.case import Config


def phi3(**changes: Any) -> Config:
    """Return a config like Phi-3-mini-4k-instruct's: a window, and as many KV heads as heads."""
    settings: Config = {
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "embd_pdrop": 0.0,
        "eos_token_id": 100,
        "hidden_size": 96,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 128,
        "pad_token_id": 100,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 12,
        "tie_word_embeddings": False,
        "transformers_version": "4.40.2",
    }
    return config("phi3", "Phi3ForCausalLM", **settings | changes)


LONGROPE: Config = {
    "long_factor": [1.05, 1.2, 1.7, 2.4, 3.3, 5.1, 8.2, 12.5, 18.0, 24.0, 31.0, 40.0],
    "short_factor": [1.0, 1.02, 1.1, 1.2, 1.35, 1.5, 1.7, 1.9, 2.2, 2.4, 2.6, 2.8],
    "type": "longrope",
}

PHI4_MINI = phi3(
    # Phi-4-mini-instruct: LongRoPE of three quarters of a head; tied.
    bos_token_id=99,
    eos_token_id=99,
    full_attn_mod=1,
    hidden_size=96,
    interpolate_factor=1,
    lm_head_bias=False,
    mlp_bias=False,
    num_attention_heads=3,
    num_key_value_heads=1,
    original_max_position_embeddings=32,
    pad_token_id=99,
    partial_rotary_factor=0.75,
    rope_scaling=LONGROPE,
    sliding_window=4096,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    transformers_version="4.45.0",
)


def granite(**changes: Any) -> Config:
    """Return a config like granite-3.1-2b-instruct's; its logits are divided."""
    settings: Config = {
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_multiplier": 0.4,
        "bos_token_id": 0,
        "embedding_multiplier": 4.0,
        "eos_token_id": 0,
        "logits_scaling": 2.0,
        "mlp_bias": False,
        "pad_token_id": 0,
        "residual_multiplier": 0.6,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
        "transformers_version": "4.47.0.dev0",
    }
    return config("granite", "GraniteForCausalLM", **settings | changes)


def smollm3(*without: str, **changes: Any) -> Config:
    """Return a config like SmolLM3-3B's: every fourth layer without rope."""
    settings: Config = {
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 12,
        "layer_types": [FULL] * 4,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "num_hidden_layers": 4,
        "pad_token_id": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "transformers_version": "4.54.0.dev0",
        "use_cache": False,
        "use_sliding_window": False,
    }
    return config("smollm3", "SmolLM3ForCausalLM", *without, **settings | changes)


def olmo2(**changes: Any) -> Config:
    """Return a config like OLMo-2-0325-32B-Instruct's: fewer KV heads, so the two norms differ in size."""
    settings: Config = {
        "attention_bias": False,
        "bos_token_id": 100,
        "eos_token_id": 100,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "pad_token_id": 101,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "transformers_version": "4.49.0",
    }
    return config("olmo2", "Olmo2ForCausalLM", **settings | changes)


def olmo3(*without: str, **changes: Any) -> Config:
    """Return a config like Olmo-3-7B-Instruct's: three layers of four slide, and yarn is for the others."""
    settings: Config = {
        "attention_bias": False,
        "eos_token_id": 100,
        "hidden_size": 96,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "max_position_embeddings": 256,
        "num_hidden_layers": 4,
        "pad_token_id": 101,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 8,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
    }
    return config("olmo3", "Olmo3ForCausalLM", "bos_token_id", *without, **settings | changes)


OLMO3_NESTED = olmo3(
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    bos_token_id=None,
    dtype="bfloat16",
    layer_types=[FULL, SLIDING],
    num_hidden_layers=2,
    num_key_value_heads=1,
    rope_parameters={
        FULL: {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500000,
            "rope_type": "yarn",
        },
        SLIDING: {"rope_theta": 10000, "rope_type": "default"},
    },
    transformers_version="5.0.0",
)

MINISTRAL_ROPE: Config = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "type": "yarn",
}


def ministral3(*without: str, **changes: Any) -> Config:
    """Return the text_config of a config like Ministral-3-8B-Instruct-2512's, as a model by itself."""
    settings: Config = {
        "dtype": "float32",
        "head_dim": 24,
        "max_position_embeddings": 256,
        "pad_token_id": 11,
        "rope_parameters": MINISTRAL_ROPE,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.0.0.dev0",
    }
    return config("ministral3", "Ministral3ForCausalLM", "torch_dtype", *without, **settings | changes)


MISTRAL3 = {
    # Ministral-3-3B-Instruct-2512-BF16: tied, its text_config within a multimodal model.
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": ministral3(
        "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version", head_dim=32
    )
    | {"tie_word_embeddings": True},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "5.0.0.dev0",
    "vision_config": {
        "attention_dropout": 0.0,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 16,
        "image_size": 28,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "model_type": "pixtral",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 1,
        "patch_size": 14,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "vision_feature_layer": -1,
}

_MISTRAL_SMALL_TEXT = {
    "attention_dropout": 0.0,
    "head_dim": 24,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000000.0,
    "sliding_window": None,
    "use_cache": True,
    "vocab_size": 112,
}

MISTRAL_SMALL = {
    # Mistral-Small-3.1-24B-Instruct-2503: nothing says whether it is tied, and it is not.
    key: value
    for key, value in MISTRAL3.items()
    if key != "tie_word_embeddings"
} | {
    "text_config": _MISTRAL_SMALL_TEXT,
    "transformers_version": "4.50.0.dev0",
}

MISTRAL3_GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_length": 256,
    "pad_token_id": 11,
    "transformers_version": "5.0.0.dev0",
}


def seed_oss(**changes: Any) -> Config:
    """Return a config like Seed-OSS-36B-Instruct's: biases for q, k, v only, and wide heads."""
    settings: Config = {
        "attention_bias": True,
        "attention_dropout": 0.1,
        "attention_out_bias": False,
        "bos_token_id": 0,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "pad_token_id": 1,
        "residual_dropout": 0.1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0",
    }
    return config("seed_oss", "SeedOssForCausalLM", **settings | changes)


def ernie(*without: str, **changes: Any) -> Config:
    """Return a config like ERNIE-4.5-0.3B-PT's."""
    settings: Config = {
        "head_dim": 32,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "transformers_version": "4.54.0.dev0",
        "use_bias": False,
    }
    return config("ernie4_5", "Ernie4_5ForCausalLM", "attention_dropout", *without, **settings | changes)


def hunyuan(**changes: Any) -> Config:
    """Return a config like Hunyuan-7B-Instruct's; its "dynamic" scaling is fixed by alpha."""
    settings: Config = {
        "add_classification_head": False,
        "attention_bias": False,
        "attention_head_dim": 24,
        "bos_token_id": 1,
        "cla_share_factor": 2,
        "dense_list": [64, 0],
        "eod_token_id": 3,
        "eos_token_id": 100,
        "head_dim": 24,
        "mlp_bias": False,
        "norm_type": "rms",
        "org_vocab_size": 112,
        "pad_token_id": 101,
        "pretraining_tp": 1,
        "rope_scaling": {
            "alpha": 1000.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "transformers_version": "4.41.2",
        "use_cla": False,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
    }
    return config("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", **settings | changes)
