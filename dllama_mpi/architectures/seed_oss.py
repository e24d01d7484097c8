"""Seed-OSS: Llama with biases of its own (transformers, models/seed_oss)."""

from __future__ import annotations

from ..model.config import ModelConfig
from .base import Architecture
from .keys import Keys
from .llama import dense


def _seed_oss(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=8, head_dim=128, max_position_embeddings=524288)
    qkv, out = keys.flag("attention_bias", True), keys.flag("attention_out_bias")
    return dense(keys, None, keys.flag("mlp_bias"), qkv_bias=qkv, o_bias=out)


FAMILIES = {"seed_oss": Architecture(_seed_oss, about="Seed-OSS-36B")}
