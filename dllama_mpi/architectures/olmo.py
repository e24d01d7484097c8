"""OLMo 2 and 3: norms after the halves alone, norms of queries and keys over all heads (transformers, models/olmo2)."""

from __future__ import annotations

from typing import Any

from ..model.config import ModelConfig
from .base import Architecture, renamed
from .keys import FULL, SLIDING, Keys, attention_sizes, layer_types, window_of
from .llama import dense, each_layer
from .rope import ropes_by_type


def _olmo(keys: Keys, windows: list[int] | None = None, **more: Any) -> ModelConfig:
    keys.assume(rms_norm_eps=1e-5)
    bias = keys.flag("attention_bias")
    made = dense(keys, windows, qkv_bias=bias, o_bias=bias, qk_norm="whole", **more)
    return each_layer(made, norm_before=False, norm_after=True)


def _olmo3(keys: Keys) -> ModelConfig:
    keys.assume(sliding_window=4096, rope_theta=5e5)
    layers = keys.count("num_hidden_layers")
    kinds = layer_types(keys, [SLIDING if (i + 1) % 4 else FULL for i in range(layers)])
    ropes = ropes_by_type(keys, attention_sizes(keys)[2], {})
    windows = [window_of(keys) if kind == SLIDING else 0 for kind in kinds]
    return _olmo(keys, windows, ropes=[ropes[kind] for kind in kinds])


_place = renamed({"mixer_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"})
FAMILIES = {
    "olmo2": Architecture(_olmo, _place, about="OLMo 2 (1B, 7B, 13B, 32B)"),
    "olmo3": Architecture(_olmo3, _place, about="Olmo 3 (7B, 32B)"),
}
