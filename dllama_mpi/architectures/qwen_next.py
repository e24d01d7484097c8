"""Qwen3-Next, Qwen3.5 and Qwen3.6: gated delta nets and gated attention, dense or with experts.

After transformers' models/qwen3_next, qwen3_5 and qwen3_5_moe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..model.config import AttentionConfig, DeltaNetConfig, ExpertsConfig, LayerConfig, Mixer, MLPConfig, ModelConfig
from ..weights.mapped import Place, Ref, Stack
from .base import Architecture, common
from .keys import ACTIVATIONS, Keys, attention_sizes
from .rope import read_rope
from .sparse import sparse_layers

_KINDS = ("linear_attention", "full_attention")
_SKIPPED = (r"^mtp\.", r"^model\.visual\.", r"\.rotary_emb\.inv_freq$")


def _mixers(keys: Keys) -> list[Mixer]:
    heads, groups, dim = attention_sizes(keys, 2, 256)
    keys.refuse(use_sliding_window=False, sliding_window=None, attn_output_gate=True)
    keys.choice("output_gate_type", "swish", {"swish": "silu", "silu": "silu"})
    bias = keys.flag("attention_bias")
    rope = read_rope(keys, dim, partial=0.25)
    attention = AttentionConfig(
        heads, groups, dim, rope, 1 / math.sqrt(dim), qkv_bias=bias, o_bias=bias, qk_norm="head", gate=True
    )
    delta = DeltaNetConfig(
        keys.count("linear_num_key_heads", 16),
        keys.count("linear_num_value_heads", 32),
        keys.count("linear_key_head_dim", 128),
        keys.count("linear_value_head_dim", 128),
        keys.count("linear_conv_kernel_dim", 4, least=2, most=8),
    )
    keys.require(delta.num_value_heads % delta.num_key_heads == 0, "linear_num_value_heads", "a multiple of key heads")
    layers, interval = keys.count("num_hidden_layers"), keys.count("full_attention_interval", 4)
    default = [_KINDS[(i + 1) % interval == 0] for i in range(layers)]
    kinds = keys.texts("layer_types", layers, _KINDS) or default
    return [attention if kind == "full_attention" else delta for kind in kinds]


def _experts(keys: Keys, activation: str, normalised: bool) -> ExpertsConfig:
    return ExpertsConfig(
        expert=MLPConfig(keys.count("moe_intermediate_size", 512), activation),
        num_experts=keys.count("num_experts"),
        top_k=keys.count("num_experts_per_tok", most=keys.count("num_experts")),
        normalised=normalised,
        shared=MLPConfig(keys.count("shared_expert_intermediate_size", 512), activation),
        shared_gate=True,
    )


def _next(keys: Keys) -> ModelConfig:
    activation = keys.choice("hidden_act", "silu", ACTIVATIONS)
    dense = MLPConfig(keys.count("intermediate_size", 5632), activation)
    experts = _experts(keys, activation, keys.flag("norm_topk_prob", True))
    pairs = zip(_mixers(keys), sparse_layers(keys, dense, experts), strict=True)
    return common(keys, [LayerConfig(mixer, feed) for mixer, feed in pairs], positions=32768)


def _dense(keys: Keys) -> ModelConfig:
    keys.refuse(num_experts=0, mlp_only_layers=[])
    keys.ignore("mamba_ssm_dtype")
    feed = MLPConfig(keys.count("intermediate_size", 12288), keys.choice("hidden_act", "silu", ACTIVATIONS))
    return common(keys, [LayerConfig(mixer, feed) for mixer in _mixers(keys)], positions=32768)


def _sparse(keys: Keys) -> ModelConfig:
    keys.refuse(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    keys.ignore("mamba_ssm_dtype", "intermediate_size")
    feed = _experts(keys, keys.choice("hidden_act", "silu", ACTIVATIONS), True)
    return common(keys, [LayerConfig(mixer, feed) for mixer in _mixers(keys)], positions=32768)


# ---- where tensors are

_RENAMED = {
    "mlp.router.": "mlp.gate.",
    "mlp.shared_gate.": "mlp.shared_expert_gate.",
    "mlp.shared.": "mlp.shared_expert.",
}
_SHIFTED = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight")


def _delta_place(c: DeltaNetConfig, prefix: str, leaf: str, is_next: bool) -> Place:
    """Return where a delta net's tensor is; prefix: of its names, up to linear_attn."""
    key, value = c.num_key_heads * c.key_dim, c.num_value_heads * c.value_dim
    spans = {"q": (0, key), "k": (key, 2 * key), "v": (2 * key, 2 * key + value)}
    if leaf.startswith("conv_"):
        return Ref(f"{prefix}conv1d.weight", rows=slice(*spans[leaf[-1]]), flat=True)
    which = leaf.split("_")[0]
    if not leaf.endswith("_proj.weight") or which == "out":
        return Ref(prefix + leaf)
    if is_next:
        fused = "in_proj_ba" if which in "ba" else "in_proj_qkvz"
        return Ref(f"{prefix}{fused}.weight", rows=interleaved(c, which))
    if which in spans:
        return Ref(f"{prefix}in_proj_qkv.weight", rows=slice(*spans[which]))
    return Ref(f"{prefix}in_proj_{which}.weight")


def interleaved(c: DeltaNetConfig, which: str) -> Sequence[int]:
    """Return the rows of a part in Qwen3-Next's projections, which go by key heads: q, k, v, z, or b, a of each."""
    ratio = c.num_value_heads // c.num_key_heads
    sizes = {"q": c.key_dim, "k": c.key_dim, "v": ratio * c.value_dim, "z": ratio * c.value_dim}
    if which in "ba":
        sizes = {"b": ratio, "a": ratio}
    start, whole = sum(list(sizes.values())[: list(sizes).index(which)]), sum(sizes.values())
    return [whole * head + start + i for head in range(c.num_key_heads) for i in range(sizes[which])]


def _place(config: ModelConfig, name: str) -> Place | Sequence[Place]:
    is_next = config.model_type == "qwen3_next"
    if name.endswith(_SHIFTED) or (name.split(".")[-2:] == ["norm", "weight"] and "linear_attn" not in name):
        return Ref(name, add=1.0)
    if ".linear_attn." in name:
        layer = config.layers[int(name.split(".layers.")[1].split(".")[0])].mixer
        assert isinstance(layer, DeltaNetConfig)
        prefix, leaf = name.split("linear_attn.")
        return _delta_place(layer, f"{prefix}linear_attn.", leaf, is_next)
    if ".self_attn.q_proj." in name or ".self_attn.gate_proj." in name:
        mixer = config.attentions[0]
        start = mixer.head_dim * ("gate_proj" in name)
        rows = [2 * mixer.head_dim * h + start + i for h in range(mixer.num_heads) for i in range(mixer.head_dim)]
        return Ref(name.replace("gate_proj", "q_proj"), rows=rows)
    if ".mlp.experts." in name:
        return _expert_places(config, name)
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return Ref(name)


def _expert_places(config: ModelConfig, name: str) -> Sequence[Place]:
    """Return where the experts' matrices may be: stacked, or each for itself."""
    feed = next(layer.feed for layer in config.layers if isinstance(layer.feed, ExpertsConfig))
    prefix, leaf = name.split("experts.")
    single = Stack(tuple(Ref(f"{prefix}experts.{e}.{leaf}") for e in range(feed.num_experts)))
    if leaf.startswith("down"):
        return Ref(f"{prefix}experts.down_proj"), single
    inner = feed.expert.intermediate_size
    rows = slice(0, inner) if leaf.startswith("gate") else slice(inner, None)
    return Ref(f"{prefix}experts.gate_up_proj", rows=rows), single


def _nested(read: Architecture) -> Architecture:
    """Return the architecture of multimodal files whose text part another one reads."""

    def outer(keys: Keys) -> ModelConfig:
        text = keys.section("text_config")
        made = read.read(text)
        text.finish()
        keys.ignore("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        tied = keys.flag("tie_word_embeddings")
        return replace(made, model_type=keys.kind, tie_word_embeddings=tied)

    return replace(read, read=outer)


_TEXT = Architecture(_dense, _place, _SKIPPED, about="Qwen3.5, Qwen3.6 dense, text alone")
_TEXT_MOE = Architecture(_sparse, _place, _SKIPPED, about="Qwen3.5, Qwen3.6 with experts, text alone")
FAMILIES = {
    "qwen3_next": Architecture(_next, _place, _SKIPPED, about="Qwen3-Next, Qwen3-Coder-Next"),
    "qwen3_5_text": _TEXT,
    "qwen3_5_moe_text": _TEXT_MOE,
    "qwen3_5": replace(_nested(_TEXT), about="Qwen3.5, Qwen3.6 dense (4B, 27B, ...)"),
    "qwen3_5_moe": replace(_nested(_TEXT_MOE), about="Qwen3.5, Qwen3.6 with experts (35B-A3B, ...)"),
}
