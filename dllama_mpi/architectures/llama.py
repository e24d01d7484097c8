"""Llama, Mistral, Qwen2 and Qwen3: the dense decoder as most have it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig
from ..model.rope import RopeConfig
from .base import Architecture, common
from .keys import ACTIVATIONS, FULL, SLIDING, Keys, attention_sizes, layer_windows, window_of
from .rope import whole_rope


def dense(
    keys: Keys,
    windows: Sequence[int] | None = None,
    mlp_bias: bool = False,
    ropes: Sequence[RopeConfig] | None = None,
    activation: str = "hidden_act",
    **attention: Any,
) -> ModelConfig:
    """Return a config of layers of attention and a gated feed-forward, each after an RMSNorm.

    windows, ropes: of each layer; without them no windows, and the rope that the file names, of whole heads.
    activation: the key that names it. attention: fields of `AttentionConfig`.
    """
    heads, groups, dim = attention_sizes(keys)
    layers = keys.count("num_hidden_layers")
    ropes = [whole_rope(keys, dim)] * layers if ropes is None else ropes
    kinds = list(zip(windows or [0] * layers, ropes, strict=True))
    mixer = AttentionConfig(heads, groups, dim, ropes[0], **{"scale": 1 / math.sqrt(dim), **attention})
    feed = MLPConfig(keys.count("intermediate_size"), keys.choice(activation, "silu", ACTIVATIONS), mlp_bias)
    made = {kind: LayerConfig(replace(mixer, window=kind[0], rope=kind[1]), feed) for kind in dict.fromkeys(kinds)}
    return common(keys, [made[kind] for kind in kinds])


def each_layer(config: ModelConfig, **changes: Any) -> ModelConfig:
    """Return a config with these fields of all its layers changed."""
    return replace(config, layers=tuple(replace(layer, **changes) for layer in config.layers))


def _llama(keys: Keys) -> ModelConfig:
    bias = keys.flag("attention_bias")
    return dense(keys, None, keys.flag("mlp_bias"), qkv_bias=bias, o_bias=bias)


def mistral(keys: Keys) -> ModelConfig:
    """Read a config of Mistral's."""
    keys.assume(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
    keys.refuse(layer_types=None)
    return dense(keys, [window_of(keys)] * keys.count("num_hidden_layers"))


def qwen_windows(keys: Keys) -> list[int]:
    """Return Qwen's windows: layer_types where given, else all layers from max_window_layers on, if any at all."""
    layers, window = keys.count("num_hidden_layers"), keys.get("sliding_window", 4096)
    first = keys.count("max_window_layers", 28, least=0)
    if not keys.flag("use_sliding_window") or not window:
        keys.ignore("layer_types")
        return [0] * layers
    kinds = [SLIDING if i >= first else FULL for i in range(layers)]
    return layer_windows(keys, keys.count("sliding_window", window), kinds)


def _qwen2(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=32, max_position_embeddings=32768)
    keys.refuse(use_mrope=False)
    return dense(keys, qwen_windows(keys), qkv_bias=True)


def _qwen3(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768)
    bias = keys.flag("attention_bias")
    return dense(keys, qwen_windows(keys), qkv_bias=bias, o_bias=bias, qk_norm="head")


FAMILIES = {
    "llama": Architecture(_llama, about="Llama 2, 3, 3.1, 3.2, 3.3, DeepSeek-R1-Distill-Llama"),
    "mistral": Architecture(mistral, about="Mistral 7B"),
    "qwen2": Architecture(_qwen2, about="Qwen2, Qwen2.5, Qwen2.5-Coder, DeepSeek-R1-Distill-Qwen"),
    "qwen3": Architecture(_qwen3, about="Qwen3 dense"),
}
