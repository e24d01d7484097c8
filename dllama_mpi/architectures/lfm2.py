"""LFM2: gated short convolutions as mixers, attention in between (transformers, models/lfm2)."""

from __future__ import annotations

import math

from ..model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, ShortConvConfig
from ..weights.mapped import Place, Ref
from .base import Architecture, common
from .keys import Keys, attention_sizes
from .rope import read_rope

# Of the model's first trainer; transformers does not look at them either.
_UNREAD = ("block_dim", "conv_dim", "conv_dim_out", "num_heads", "block_mlp_init_scale", "block_norm_eps",
           "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init", "theta", "model_name")  # fmt: skip


def _inner(keys: Keys) -> int:
    """Return the size of the feed-forward layers, as the model's first trainer adjusted it."""
    size = keys.count("block_ff_dim", keys.count("intermediate_size", 12288))
    if not keys.flag("block_auto_adjust_ff_dim", True):
        keys.ignore("block_ffn_dim_multiplier", "block_multiple_of")
        return size
    size = int(int(2 * size / 3) * keys.number("block_ffn_dim_multiplier", 1.0, above=0.0))
    multiple = keys.count("block_multiple_of", 256)
    return -(-size // multiple) * multiple


def _read(keys: Keys) -> ModelConfig:
    heads, groups, dim = attention_sizes(keys, 8)
    layers = keys.count("num_hidden_layers")
    keys.refuse(block_use_swiglu=True, use_pos_enc=True)
    keys.ignore(*_UNREAD)
    rope = read_rope(keys, dim, theta=1e6)
    attention = AttentionConfig(heads, groups, dim, rope, 1 / math.sqrt(dim), qk_norm="head")
    conv = ShortConvConfig(keys.count("conv_L_cache", 3, least=2, most=8), keys.flag("conv_bias"))
    attending = keys.numbers("full_attn_idxs", layers) if "full_attn_idxs" in keys else range(layers)
    default = ["full_attention" if i in attending else "conv" for i in range(layers)]
    kinds = keys.texts("layer_types", layers, ("conv", "full_attention")) or default
    feed = MLPConfig(_inner(keys))
    tied = keys.flag("tie_embedding", keys.flag("tie_word_embeddings", True))
    eps = keys.number("norm_eps", 1e-5, above=0.0)
    made = [LayerConfig(conv if kind == "conv" else attention, feed) for kind in kinds]
    return common(keys, made, positions=128000, norm_eps=eps, tie_word_embeddings=tied)


_RENAMED = {
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm.": "model.embedding_norm.",
    "self_attn.o_proj": "self_attn.out_proj",
    "q_norm": "q_layernorm",
    "k_norm": "k_layernorm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def _place(config: ModelConfig, name: str) -> Place:
    prefix, _, leaf = name.partition(".conv.")
    if leaf == "taps":
        return Ref(f"{prefix}.conv.conv.weight", flat=True)
    if leaf == "bias":
        return Ref(f"{prefix}.conv.conv.bias")
    if leaf and not leaf.startswith("out_proj"):
        part, size = "bcx".index(leaf[0]), config.hidden_size
        return Ref(f"{prefix}.conv.in_proj.{leaf.split('.')[-1]}", rows=slice(part * size, (part + 1) * size))
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return Ref(name)


FAMILIES = {"lfm2": Architecture(_read, _place, about="LFM2, LFM2.5 dense")}
