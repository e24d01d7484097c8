"""Tensors of the families of ``tests.tiny_state``, in the names, shapes and layout of the published files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tiny_models.tensors import FAMILIES, Family, Specs, draw_llama, head_dim, text_config

MTP_FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
"""Families whose published files hold tensors of multi-token prediction."""


def _linear(specs: Specs, name: str, outputs: int, inputs: int, bias: bool = False) -> None:
    specs[f"{name}.weight"] = (outputs, inputs)
    if bias:
        specs[f"{name}.bias"] = (outputs,)


def _mlp(specs: Specs, name: str, inner: int, hidden: int) -> None:
    _linear(specs, f"{name}.gate_proj", inner, hidden)
    _linear(specs, f"{name}.up_proj", inner, hidden)
    _linear(specs, f"{name}.down_proj", hidden, inner)


# --------------------------------------------------------------------------------------------------------------------
# Qwen3-Next and Qwen3.5
# --------------------------------------------------------------------------------------------------------------------


def _delta_net(config: Mapping[str, Any], name: str) -> Specs:
    """Return the tensors of a gated delta net; Qwen3-Next's projections are fused, their rows grouped by key head."""
    hidden, kernel = config["hidden_size"], config["linear_conv_kernel_dim"]
    heads, values = config["linear_num_value_heads"], config["linear_num_value_heads"] * config["linear_value_head_dim"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    specs: Specs = {
        f"{name}.dt_bias": (heads,),
        f"{name}.A_log": (heads,),
        f"{name}.conv1d.weight": (2 * keys + values, 1, kernel),
    }
    if config["model_type"] == "qwen3_next":
        _linear(specs, f"{name}.in_proj_qkvz", 2 * keys + 2 * values, hidden)
        _linear(specs, f"{name}.in_proj_ba", 2 * heads, hidden)
    else:
        _linear(specs, f"{name}.in_proj_qkv", 2 * keys + values, hidden)
        _linear(specs, f"{name}.in_proj_z", values, hidden)
        _linear(specs, f"{name}.in_proj_b", heads, hidden)
        _linear(specs, f"{name}.in_proj_a", heads, hidden)
    specs[f"{name}.norm.weight"] = (config["linear_value_head_dim"],)
    _linear(specs, f"{name}.out_proj", hidden, values)
    return specs


def _gated_attention(config: Mapping[str, Any], name: str) -> Specs:
    """Return the tensors of an attention layer; each head of q_proj is followed by its gate."""
    hidden, dim, bias = config["hidden_size"], head_dim(config), config["attention_bias"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    specs: Specs = {}
    _linear(specs, f"{name}.q_proj", 2 * queries, hidden, bias)
    _linear(specs, f"{name}.k_proj", keys, hidden, bias)
    _linear(specs, f"{name}.v_proj", keys, hidden, bias)
    _linear(specs, f"{name}.o_proj", hidden, queries, bias)
    specs[f"{name}.q_norm.weight"] = specs[f"{name}.k_norm.weight"] = (dim,)
    return specs


def _experts(config: Mapping[str, Any], name: str, stacked: bool) -> Specs:
    """Return the tensors of a sparse block: router, experts, shared expert."""
    hidden, inner, count = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    specs: Specs = {f"{name}.gate.weight": (count, hidden)}
    if stacked:  # without ".weight"
        specs[f"{name}.experts.gate_up_proj"] = (count, 2 * inner, hidden)
        specs[f"{name}.experts.down_proj"] = (count, hidden, inner)
    else:
        for expert in range(count):
            _mlp(specs, f"{name}.experts.{expert}", inner, hidden)
    _mlp(specs, f"{name}.shared_expert", config["shared_expert_intermediate_size"], hidden)
    specs[f"{name}.shared_expert_gate.weight"] = (1, hidden)
    return specs


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    if layer in config.get("mlp_only_layers", []):
        return False
    return "num_experts" in config and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def _decoder(config: Mapping[str, Any], prefix: str, stacked: bool) -> Specs:
    """Return the tensors of a Qwen decoder, and of the head unless it is tied."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    specs: Specs = {f"{prefix}embed_tokens.weight": (vocab, hidden)}
    kinds = config.get("layer_types") or [
        "linear_attention" if (layer + 1) % config["full_attention_interval"] else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    for layer, kind in enumerate(kinds):
        name = f"{prefix}layers.{layer}"
        specs[f"{name}.input_layernorm.weight"] = (hidden,)
        if kind == "linear_attention":
            specs |= _delta_net(config, f"{name}.linear_attn")
        else:
            specs |= _gated_attention(config, f"{name}.self_attn")
        specs[f"{name}.post_attention_layernorm.weight"] = (hidden,)
        if _is_sparse(config, layer):
            specs |= _experts(config, f"{name}.mlp", stacked)
        else:
            _mlp(specs, f"{name}.mlp", config["intermediate_size"], hidden)
    specs[f"{prefix}norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        specs["lm_head.weight"] = (vocab, hidden)
    return specs


def _mtp(config: Mapping[str, Any]) -> Specs:
    """Return some of the tensors of multi-token prediction."""
    hidden = config["hidden_size"]
    specs: Specs = {"mtp.fc.weight": (hidden, 2 * hidden)}
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "layers.0.input_layernorm"):
        specs[f"mtp.{name}.weight"] = (hidden,)
    _linear(specs, "mtp.layers.0.self_attn.k_proj", config["num_key_value_heads"] * head_dim(config), hidden)
    return specs


def _vision(config: Mapping[str, Any]) -> Specs:
    """Return the tensors of Qwen3.5's vision tower."""
    hidden, inner, out = config["hidden_size"], config["intermediate_size"], config["out_hidden_size"]
    patch, merged = config["patch_size"], hidden * config["spatial_merge_size"] ** 2
    name = "model.visual"
    specs: Specs = {
        f"{name}.patch_embed.proj.weight": (hidden, config["in_channels"], config["temporal_patch_size"], patch, patch),
        f"{name}.patch_embed.proj.bias": (hidden,),
        f"{name}.pos_embed.weight": (config["num_position_embeddings"], hidden),
    }
    for block in range(config["depth"]):
        at = f"{name}.blocks.{block}"
        for norm in ("norm1", "norm2"):
            specs[f"{at}.{norm}.weight"] = specs[f"{at}.{norm}.bias"] = (hidden,)
        _linear(specs, f"{at}.attn.qkv", 3 * hidden, hidden, bias=True)
        _linear(specs, f"{at}.attn.proj", hidden, hidden, bias=True)
        _linear(specs, f"{at}.mlp.linear_fc1", inner, hidden, bias=True)
        _linear(specs, f"{at}.mlp.linear_fc2", hidden, inner, bias=True)
    specs[f"{name}.merger.norm.weight"] = specs[f"{name}.merger.norm.bias"] = (hidden,)
    _linear(specs, f"{name}.merger.linear_fc1", merged, merged, bias=True)
    _linear(specs, f"{name}.merger.linear_fc2", out, merged, bias=True)
    return specs


def _qwen(config: Mapping[str, Any]) -> Specs:
    """Return the tensors of a Qwen model; only multimodal files stack the experts."""
    text, multimodal = text_config(config), "text_config" in config
    specs = _decoder(text, "model.language_model." if multimodal else "model.", stacked=multimodal)
    if multimodal:
        specs |= _vision(config["vision_config"])
    return specs | _mtp(text) if config["model_type"] in MTP_FAMILIES else specs


def _draw_qwen(name: str, shape: tuple[int, ...], state: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Draw a tensor of Qwen3-Next or Qwen3.5, so that states fade by a few to some sixty percent a token."""
    if name.startswith(("model.visual.", "mtp.")):
        return 0.1 * state.standard_normal(shape)
    if name.endswith(".A_log"):
        return state.uniform(-4.0, 0.0, shape)
    if name.endswith(".dt_bias"):
        return state.standard_normal(shape)
    if name.endswith(".conv1d.weight"):
        return 0.6 * state.standard_normal(shape)
    if name.endswith(".linear_attn.norm.weight"):  # the only norm that multiplies by its weight, not by one more
        return 1.0 + 0.3 * state.standard_normal(shape)
    if name.endswith("norm.weight"):
        signs = np.where(np.arange(shape[0]) % 2, 1.0, -1.0) if name.endswith("model.norm.weight") else 1.0
        return signs * draw_llama(name, shape, state) - 1.0
    scales = {"out_proj.weight": 3.0, "mlp.gate.weight": 2.5, "expert_gate.weight": 2.0, "down_proj": 2.0}
    scales |= dict.fromkeys(("in_proj_ba.weight", "in_proj_a.weight", "in_proj_b.weight"), 1.6)
    scale = next((scales[end] for end in scales if name.endswith(end)), None)
    if scale is None and len(shape) == 2:
        return draw_llama(name, shape, state)
    return ((scale or 1.2) / math.sqrt(shape[-1])) * state.standard_normal(shape)


# --------------------------------------------------------------------------------------------------------------------
# LFM2
# --------------------------------------------------------------------------------------------------------------------


def lfm2_width(config: Mapping[str, Any]) -> int:
    """Return how wide the MLP is."""
    width = config.get("block_ff_dim", config.get("intermediate_size"))
    if not config["block_auto_adjust_ff_dim"]:
        return int(width)
    width = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
    multiple = config["block_multiple_of"]
    return int(-(-width // multiple) * multiple)


def _lfm2(config: Mapping[str, Any]) -> Specs:
    hidden, dim, bias, inner = config["hidden_size"], head_dim(config), config["conv_bias"], lfm2_width(config)
    keys, attention = config["num_key_value_heads"] * dim, config.get("full_attn_idxs")
    if attention is None:
        attention = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    specs: Specs = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        if layer in attention:
            _linear(specs, f"{name}.self_attn.q_proj", hidden, hidden)
            _linear(specs, f"{name}.self_attn.k_proj", keys, hidden)
            _linear(specs, f"{name}.self_attn.v_proj", keys, hidden)
            _linear(specs, f"{name}.self_attn.out_proj", hidden, hidden)
            specs[f"{name}.self_attn.q_layernorm.weight"] = specs[f"{name}.self_attn.k_layernorm.weight"] = (dim,)
        else:
            specs[f"{name}.conv.conv.weight"] = (hidden, 1, config["conv_L_cache"])
            if bias:
                specs[f"{name}.conv.conv.bias"] = (hidden,)
            _linear(specs, f"{name}.conv.in_proj", 3 * hidden, hidden, bias)
            _linear(specs, f"{name}.conv.out_proj", hidden, hidden, bias)
        _linear(specs, f"{name}.feed_forward.w1", inner, hidden)
        _linear(specs, f"{name}.feed_forward.w2", hidden, inner)
        _linear(specs, f"{name}.feed_forward.w3", inner, hidden)
        specs[f"{name}.operator_norm.weight"] = specs[f"{name}.ffn_norm.weight"] = (hidden,)
    specs["model.embedding_norm.weight"] = (hidden,)
    if not config.get("tie_embedding", config.get("tie_word_embeddings", True)):
        specs["lm_head.weight"] = (config["vocab_size"], hidden)
    return specs


def _draw_lfm2(name: str, shape: tuple[int, ...], state: np.random.RandomState) -> npt.NDArray[np.float64]:
    values = state.standard_normal(shape)
    if name.endswith("_layernorm.weight"):
        return 1.5 + 0.2 * values
    if name.endswith("embedding_norm.weight"):  # the signs keep a tied model from repeating its input
        return np.where(np.arange(shape[0]) % 2, 1.0, -1.0) * (1.0 + 0.1 * values)
    if name.endswith("_norm.weight"):
        return 1.0 + 0.1 * values
    if name.endswith(".bias"):
        return 0.3 * values
    if name.endswith(".conv.conv.weight"):
        return 0.7 * values
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return (1.5 / math.sqrt(shape[1])) * values
    return ((2.0 if name.endswith(("w2.weight", "out_proj.weight")) else 1.4) / math.sqrt(shape[1])) * values


FAMILIES.update(
    dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), Family(_qwen, _draw_qwen)
    )
)
FAMILIES["lfm2"] = Family(_lfm2, _draw_lfm2)
