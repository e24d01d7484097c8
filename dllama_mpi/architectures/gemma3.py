"""Gemma 3: Gemma 2 with norms of queries and keys, a rope for each type of layer (transformers, models/gemma3)."""

from __future__ import annotations

from ..model.config import ModelConfig
from .base import VISION, Architecture, text_part
from .gemma2 import gemma, place
from .keys import FULL, SLIDING, Keys, attention_sizes, layer_types, window_of
from .rope import ropes_by_type

_DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip


def _text(keys: Keys) -> ModelConfig:
    keys.assume(**_DEFAULTS)
    keys.refuse(attn_logit_softcapping=None)  # transformers has the key, but no code for it
    layers, pattern = keys.count("num_hidden_layers"), keys.count("sliding_window_pattern", 6)
    kinds = layer_types(keys, [SLIDING if (i + 1) % pattern else FULL for i in range(layers)])
    local = {"rope_theta": keys.number("rope_local_base_freq", above=1.0)}
    ropes = ropes_by_type(keys, attention_sizes(keys)[2], local)
    windows = [window_of(keys) if kind == SLIDING else 0 for kind in kinds]
    return gemma(keys, windows, ropes=[ropes[kind] for kind in kinds], qk_norm="head")


def _whole(keys: Keys) -> ModelConfig:
    keys.ignore("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id", "mm_tokens_per_image")
    keys.section("text_config").refuse(final_logit_softcapping=None)  # transformers has no cap beside images
    return text_part(keys, {"gemma3_text": _text}, "gemma3_text")


FAMILIES = {
    "gemma3_text": Architecture(_text, place, about="Gemma 3 (270M, 1B), text alone"),
    "gemma3": Architecture(_whole, place, VISION, about="Gemma 3 (4B, 12B, 27B)"),
}
