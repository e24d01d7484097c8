"""Gemma 2: norms of 1 + w before and after, soft caps, windows in every other layer (transformers, models/gemma2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..model.config import ModelConfig
from ..weights.mapped import Place, Ref
from .base import Architecture
from .keys import FULL, SLIDING, Keys, layer_windows, window_of
from .llama import dense, each_layer

_DEFAULTS = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip


def gemma(keys: Keys, windows: Sequence[int], **attention: Any) -> ModelConfig:
    """Return what Gemma 2 and 3 have in common; attention: arguments of `dense`."""
    keys.refuse(use_bidirectional_attention=False)
    keys.ignore("hidden_act", "cache_implementation")
    bias, scale = keys.flag("attention_bias"), keys.number("query_pre_attn_scalar", above=0.0) ** -0.5
    made = dense(keys, windows, activation="hidden_activation", qkv_bias=bias, o_bias=bias, scale=scale, **attention)
    cap, factor = softcap(keys, "final_logit_softcapping"), math.sqrt(made.hidden_size)
    return replace(each_layer(made, norm_after=True), embedding_scale=factor, logit_softcap=cap)


def softcap(keys: Keys, key: str) -> float:
    """Return a soft cap; 0, which stands for none, where it is null."""
    return keys.number(key, above=0.0) if key in keys else 0.0


def _gemma2(keys: Keys) -> ModelConfig:
    keys.assume(**_DEFAULTS)
    kinds = [(SLIDING, FULL)[i % 2] for i in range(keys.count("num_hidden_layers"))]
    return gemma(keys, layer_windows(keys, window_of(keys), kinds), softcap=softcap(keys, "attn_logit_softcapping"))


_NORMS = {
    "mixer_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


def place(config: ModelConfig, name: str) -> Place:
    """Return where Gemma's checkpoints have a tensor: norms are stored less 1."""
    part = name.split(".")[-2]
    return Ref(name.replace(part, _NORMS.get(part, part)), add=1.0 if part.endswith("norm") else 0.0)


FAMILIES = {"gemma2": Architecture(_gemma2, place, about="Gemma 2 (2B, 9B, 27B)")}
