"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, LongRoPE (transformers, models/phi3)."""

from __future__ import annotations

from ..model.config import MLPConfig, ModelConfig
from ..model.rope import RopeConfig
from ..weights.mapped import Place, Ref
from .base import Architecture
from .keys import Keys, attention_sizes, window_of
from .llama import dense
from .rope import read_rope, rope_kind, scaling_of


def _rope(keys: Keys) -> RopeConfig:
    """Return the rope: the first files call LongRoPE other names."""
    given, dim = scaling_of(keys), attention_sizes(keys)[2]
    if rope_kind(given) in ("su", "yarn"):
        given = {**given, "rope_type": "longrope"}
    rope = read_rope(keys, dim, given)
    keys.require(rope.kind in ("default", "longrope"), "rope_scaling", "longrope or nothing for phi3")
    return rope


def _phi3(keys: Keys) -> ModelConfig:
    keys.assume(max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5)
    keys.ignore("full_attn_mod", "interpolate_factor", "embd_pdrop", "resid_pdrop")
    layers = keys.count("num_hidden_layers")
    return dense(keys, [window_of(keys)] * layers, ropes=[_rope(keys)] * layers)


def _place(config: ModelConfig, name: str) -> Place:
    attention, feed = config.attentions[0], config.layers[0].feed
    assert isinstance(feed, MLPConfig)
    q, inner = attention.num_heads * attention.head_dim, feed.intermediate_size
    k = q + attention.num_kv_heads * attention.head_dim
    fused = {
        "q_proj": ("qkv_proj", slice(0, q)),
        "k_proj": ("qkv_proj", slice(q, k)),
        "v_proj": ("qkv_proj", slice(k, None)),
        "gate_proj": ("gate_up_proj", slice(0, inner)),
        "up_proj": ("gate_up_proj", slice(inner, None)),
    }
    part = name.split(".")[-2]
    theirs, rows = fused.get(part, (part, None))
    return Ref(name.replace(part, theirs), rows=rows)


FAMILIES = {"phi3": Architecture(_phi3, _place, about="Phi-3, Phi-3.5, Phi-4, Phi-4-mini")}
