"""Ministral 3: Llama with queries scaled by position; Mistral 3: it, or Mistral, beside images (transformers)."""

from __future__ import annotations

from dataclasses import replace

from ..model.config import ModelConfig
from .base import VISION, Architecture, text_part
from .keys import FULL, Keys, window_of
from .llama import dense, mistral
from .rope import scaling_of

_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def _ministral3(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-5)
    if "rope_scaling" not in keys:
        keys.assume(rope_parameters=_ROPE)
    layers = keys.count("num_hidden_layers")
    keys.texts("layer_types", layers, (FULL,))
    made = dense(keys, [window_of(keys)] * layers)
    given = Keys(scaling_of(keys), f"{keys.where}: rope scaling")
    beta = given.number("llama_4_scaling_beta", 0.0)
    if beta == 0:
        return made
    return replace(made, query_scaling=(beta, given.count("original_max_position_embeddings")))


def _mistral3(keys: Keys) -> ModelConfig:
    keys.ignore("vision_feature_layer", "spatial_merge_size", "multimodal_projector_bias", "projector_hidden_act")
    return text_part(keys, {"mistral": mistral, "ministral3": _ministral3}, "mistral")


FAMILIES = {
    "ministral3": Architecture(_ministral3, about="Ministral 3, Devstral 2, text alone"),
    "mistral3": Architecture(_mistral3, skipped=VISION, about="Ministral 3 (3B, 8B, 14B), Mistral Small 3.1, 3.2"),
}
