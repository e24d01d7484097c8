"""SmolLM3: Llama without rope in every fourth layer (NoPE, arXiv:2501.18795; transformers, models/smollm3)."""

from __future__ import annotations

from ..model.config import ModelConfig
from ..model.rope import RopeConfig
from .base import Architecture
from .keys import FULL, SLIDING, Keys, attention_sizes, layer_types, window_of
from .llama import dense
from .rope import whole_rope


def _is_rotated(keys: Keys) -> list[bool]:
    """Return which layers have rope: by a list of 0 and 1, which may go on, or by an interval."""
    layers, interval = keys.count("num_hidden_layers"), keys.count("no_rope_layer_interval", 4)
    if "no_rope_layers" not in keys:
        return [(i + 1) % interval != 0 for i in range(layers)]
    given = keys.numbers("no_rope_layers", 2)
    keys.require(len(given) >= layers, "no_rope_layers", f"a list of {layers} numbers, one a layer")
    return [each == 1 for each in given[:layers]]


def _smollm3(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=True, rope_theta=2e6)
    keys.ignore("max_window_layers")
    bias, slides, rotated = keys.flag("attention_bias"), keys.flag("use_sliding_window"), _is_rotated(keys)
    window = window_of(keys) if slides else keys.get("sliding_window")
    default = [SLIDING if slides and window and not each else FULL for each in rotated]
    kinds = layer_types(keys, default)
    # transformers masks such layers, but not with every implementation of attention.
    keys.require(slides or not window or SLIDING not in kinds, "use_sliding_window", f"true with {SLIDING} layers")
    rope = whole_rope(keys, attention_sizes(keys)[2])
    none = RopeConfig("none", rope.dim, rope.theta)
    windows = [window if slides and kind == SLIDING else 0 for kind in kinds]
    ropes = [rope if each else none for each in rotated]
    return dense(keys, windows, keys.flag("mlp_bias"), ropes=ropes, qkv_bias=bias, o_bias=bias)


FAMILIES = {"smollm3": Architecture(_smollm3, about="SmolLM3-3B")}
