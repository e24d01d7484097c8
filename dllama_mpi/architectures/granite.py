"""Granite 3 and 4 dense: Llama with four multipliers (transformers, models/granite)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..model.config import ModelConfig
from .base import Architecture
from .keys import Keys
from .llama import dense, each_layer


def multipliers(keys: Keys) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that two of Granite's multipliers are."""
    return {
        "embedding_scale": keys.number("embedding_multiplier", 1.0),
        "logit_scale": 1 / keys.number("logits_scaling", 1.0, above=0.0),
    }


def granite(keys: Keys) -> ModelConfig:
    """Read a config of Granite's."""
    bias, scale = keys.flag("attention_bias"), keys.number("attention_multiplier", 1.0)
    made = dense(keys, None, keys.flag("mlp_bias"), qkv_bias=bias, o_bias=bias, scale=scale)
    return replace(each_layer(made, residual_scale=keys.number("residual_multiplier", 1.0)), **multipliers(keys))


FAMILIES = {"granite": Architecture(granite, about="Granite 3.0 to 3.3, 4.1 dense")}
