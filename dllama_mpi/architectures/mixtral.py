"""Mixtral: Mistral with experts in every layer (transformers, models/mixtral)."""

from __future__ import annotations

from ..model.config import ExpertsConfig, ModelConfig
from .base import Architecture
from .keys import Keys, window_of
from .llama import dense
from .sparse import each_expert, expert_counts, gated_mlp, no_windows, with_feeds


def _mixtral(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=8, intermediate_size=14336, num_experts_per_tok=2, rope_theta=1e6)
    keys.assume(max_position_embeddings=131072, rms_norm_eps=1e-5)
    no_windows(keys)
    layers = keys.count("num_hidden_layers")
    experts = ExpertsConfig(gated_mlp(keys, "intermediate_size"), *expert_counts(keys, 8))
    return with_feeds(dense(keys, [window_of(keys)] * layers), [experts] * layers)


_NAMES = {".mlp.router.": ".block_sparse_moe.gate.", ".mlp.": ".block_sparse_moe."}
_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
FAMILIES = {"mixtral": Architecture(_mixtral, each_expert(_NAMES, _PARTS), about="Mixtral 8x7B, 8x22B")}
