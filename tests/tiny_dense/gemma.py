"""Configurations of Gemma 2 and Gemma 3."""

from __future__ import annotations

from typing import Any

from tests.tiny_dense.common import FULL, SLIDING, config
from tests.tiny_models.case import Config


def gemma2(**changes: Any) -> Config:
    """Return a config like gemma-2-27b-it's: queries are not scaled by their own size, and no layer_types."""
    settings: Config = {
        "attention_bias": False,
        "attn_logit_softcapping": 4.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 3.0,
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 20,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 12,
        "transformers_version": "4.42.0.dev0",
    }
    return config("gemma2", "Gemma2ForCausalLM", **settings | changes)


def gemma3_text(*without: str, **changes: Any) -> Config:
    """Return a config like gemma-3-1b-it's: 5 sliding layers of 6, whose rope has a base of its own."""
    settings: Config = {
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 24,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 8,
        "sliding_window_pattern": 6,
        "transformers_version": "4.50.0.dev0",
    }
    return config("gemma3_text", "Gemma3ForCausalLM", "hidden_act", *without, **settings | changes)


GEMMA3_NESTED = gemma3_text(
    # The newer generation of keys, as gemma-3-270m-it has them: layer_types, and rope by the type of a layer.
    "cache_implementation",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "sliding_window_pattern",
    "torch_dtype",
    _sliding_window_pattern=6,
    dtype="bfloat16",
    final_logit_softcapping=3.0,
    layer_types=[SLIDING, FULL, SLIDING],
    num_hidden_layers=3,
    num_key_value_heads=2,
    rope_parameters={
        FULL: {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
        SLIDING: {"rope_theta": 10000, "rope_type": "default"},
    },
    transformers_version="5.0.0",
    use_bidirectional_attention=False,
)

_SIGLIP = {
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 24,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "vision_use_head": False,
}

GEMMA3 = {
    # gemma-3-4b-it: what is missing in text_config has the default of Gemma 3, also the bases of rope and the pattern.
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 108,
    "eoi_token_index": 109,
    "eos_token_id": [1, 106],
    "image_token_index": 110,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 4,
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 24,
        "hidden_size": 64,
        "intermediate_size": 96,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 8,
        "vocab_size": 112,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": _SIGLIP,
}

GEMMA3_RENAMED = {
    # The same as transformers 5 saves it: all of the decoder's keys, and the tensors' newer names.
    key: value
    for key, value in GEMMA3.items()
    if key not in ("torch_dtype", "text_config", "transformers_version")
} | {
    "dtype": "bfloat16",
    "text_config": gemma3_text(
        "architectures",
        "cache_implementation",
        "rope_local_base_freq",
        "rope_scaling",
        "rope_theta",
        "sliding_window_pattern",
        "torch_dtype",
        _sliding_window_pattern=6,
        attention_bias=True,
        dtype="bfloat16",
        layer_types=[SLIDING, SLIDING, FULL],
        num_hidden_layers=3,
        num_key_value_heads=2,
        rope_parameters=GEMMA3_NESTED["rope_parameters"],
        tie_word_embeddings=True,
        use_bidirectional_attention=False,
    ),
    "tie_word_embeddings": True,
    "transformers_version": "5.0.0",
}

GEMMA3_GENERATION = {
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "do_sample": True,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "4.50.0.dev0",
}
