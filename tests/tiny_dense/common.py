"""Configurations of the tiny models: what they have in common.

Each is scaled down from the config.json of a published model, which a docstring or comment names. Every setting of it
is in effect within the tokens of the reference: windows are shorter than the sequence, caps bite, factors are not one.
"""

from __future__ import annotations

from typing import Any

from tests.tiny_models.case import Config

SLIDING, FULL = "sliding_attention", "full_attention"

_COMMON: Config = {
    # Of nearly every model; missing where a family says otherwise.
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 112,
}


def config(name: str, architecture: str, *without: str, **changes: Any) -> Config:
    """Return the common keys with ``changes``, less those of ``without``."""
    made = _COMMON | {"architectures": [architecture], "model_type": name} | changes
    return {key: value for key, value in made.items() if key not in without}
