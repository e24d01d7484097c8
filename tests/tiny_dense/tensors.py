"""Tensors of the dense families of ``tests.tiny_dense``, in the names, shapes and layout of the published files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.tiny_models.tensors import FAMILIES, Family, Specs, draw_llama, head_dim, text_config

_PRE = ("input_layernorm", "post_attention_layernorm")
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")
_BOTH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Layout(NamedTuple):
    """Which tensors a layer has.

    Attributes:
        norms: Names of the norms over the hidden size.
        query_norm, key_norm: Names of the norms of queries and keys; empty for none.
        whole: Whether those norms are over all heads together, not over each head.
        fused: Whether q, k, v are one tensor (in this order of rows), and gate, up another.
        tied: What a missing ``tie_word_embeddings`` means.
    """

    norms: tuple[str, ...] = _PRE
    query_norm: str = ""
    key_norm: str = ""
    whole: bool = False
    fused: bool = False
    tied: bool = False


LAYOUTS = {
    "gemma2": Layout(_BOTH, tied=True),
    "gemma3_text": Layout(_BOTH, "q_norm", "k_norm", tied=True),
    "phi3": Layout(fused=True),
    "granite": Layout(),
    "smollm3": Layout(tied=True),
    "olmo2": Layout(_POST, "q_norm", "k_norm", whole=True),
    "olmo3": Layout(_POST, "q_norm", "k_norm", whole=True),
    "mistral": Layout(),
    "ministral3": Layout(),
    "seed_oss": Layout(),
    "ernie4_5": Layout(tied=True),
    "hunyuan_v1_dense": Layout(query_norm="query_layernorm", key_norm="key_layernorm"),
}


class Biases(NamedTuple):
    """Which linear layers have a bias."""

    qkv: bool
    output: bool
    mlp: bool


def _biases(config: Mapping[str, Any]) -> Biases:
    """Return the biases of a decoder; the keys mean something to some families only."""
    model_type = config["model_type"]
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if model_type == "ernie4_5":
        return Biases(*[bool(config.get("use_bias"))] * 3)
    if model_type == "seed_oss":
        return Biases(attention, bool(config.get("attention_out_bias")), mlp)
    if model_type in ("phi3", "mistral", "ministral3"):
        return Biases(False, False, False)
    return Biases(attention, attention, mlp and model_type in ("granite", "smollm3"))


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Specs:
    """Return a linear layer's tensors."""
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _layer(prefix: str, config: Mapping[str, Any]) -> Specs:
    """Return the tensors of one layer."""
    layout, bias = LAYOUTS[config["model_type"]], _biases(config)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], head_dim(config)
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    specs: Specs = {f"{prefix}.{name}.weight": (hidden,) for name in layout.norms}
    if layout.fused:
        specs |= _linear(f"{attention}.qkv_proj", queries + 2 * keys, hidden, bias.qkv)
        specs |= _linear(f"{mlp}.gate_up_proj", 2 * inner, hidden, bias.mlp)
    else:
        specs |= _linear(f"{attention}.q_proj", queries, hidden, bias.qkv)
        specs |= _linear(f"{attention}.k_proj", keys, hidden, bias.qkv)
        specs |= _linear(f"{attention}.v_proj", keys, hidden, bias.qkv)
        specs |= _linear(f"{mlp}.gate_proj", inner, hidden, bias.mlp)
        specs |= _linear(f"{mlp}.up_proj", inner, hidden, bias.mlp)
    if layout.query_norm:
        specs[f"{attention}.{layout.query_norm}.weight"] = (queries if layout.whole else dim,)
        specs[f"{attention}.{layout.key_norm}.weight"] = (keys if layout.whole else dim,)
    return (
        specs
        | _linear(f"{attention}.o_proj", hidden, queries, bias.output)
        | _linear(f"{mlp}.down_proj", hidden, inner, bias.mlp)
    )


def _decoder(config: Mapping[str, Any], prefix: str = "model.", head: str = "lm_head") -> Specs:
    """Return the tensors of a decoder."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    specs: Specs = {f"{prefix}embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        specs |= _layer(f"{prefix}layers.{layer}", config)
    specs[f"{prefix}norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", LAYOUTS[config["model_type"]].tied):
        specs[f"{head}.weight"] = (vocab, hidden)
    return specs


def _siglip(config: Mapping[str, Any], inner: int) -> Specs:
    """Return the tensors of Gemma 3's vision tower and projector; ``inner`` is the decoder's hidden size."""
    size, mlp, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    tower = "vision_tower.vision_model"
    specs: Specs = {
        f"{tower}.embeddings.patch_embedding.weight": (size, 3, patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (size,),
        f"{tower}.embeddings.position_embedding.weight": ((config["image_size"] // patch) ** 2, size),
        f"{tower}.post_layernorm.weight": (size,),
        f"{tower}.post_layernorm.bias": (size,),
        "multi_modal_projector.mm_input_projection_weight": (size, inner),
        "multi_modal_projector.mm_soft_emb_norm.weight": (size,),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        for name in ("layer_norm1", "layer_norm2"):
            specs |= {f"{prefix}.{name}.weight": (size,), f"{prefix}.{name}.bias": (size,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            specs |= _linear(f"{prefix}.self_attn.{name}", size, size, bias=True)
        specs |= _linear(f"{prefix}.mlp.fc1", mlp, size, bias=True) | _linear(f"{prefix}.mlp.fc2", size, mlp, bias=True)
    return specs


def _pixtral(config: Mapping[str, Any], inner: int) -> Specs:
    """Return the tensors of Mistral 3's vision tower and projector; ``inner`` is the decoder's hidden size."""
    size, mlp, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    specs: Specs = {
        "vision_tower.patch_conv.weight": (size, 3, patch, patch),
        "vision_tower.ln_pre.weight": (size,),
        "multi_modal_projector.norm.weight": (size,),
        "multi_modal_projector.patch_merger.merging_layer.weight": (size, 4 * size),
        "multi_modal_projector.linear_1.weight": (inner, size),
        "multi_modal_projector.linear_2.weight": (inner, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"vision_tower.transformer.layers.{layer}"
        specs |= {f"{prefix}.attention_norm.weight": (size,), f"{prefix}.ffn_norm.weight": (size,)}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            specs[f"{prefix}.attention.{name}.weight"] = (size, size)
        for name in ("gate_proj", "up_proj"):
            specs[f"{prefix}.feed_forward.{name}.weight"] = (mlp, size)
        specs[f"{prefix}.feed_forward.down_proj.weight"] = (size, mlp)
    return specs


_VISION = {"gemma3": _siglip, "mistral3": _pixtral}


def _multimodal(config: Mapping[str, Any]) -> Specs:
    """Return the tensors of a multimodal model: under ``model.`` in files of the newer generation (``dtype``)."""
    text = text_config(config)
    vision = _VISION[config["model_type"]](config["vision_config"], text["hidden_size"])
    if "dtype" not in config:
        return _decoder(text, "language_model.model.", "language_model.lm_head") | vision
    renamed = {f"model.{name.replace('vision_tower.vision_model', 'vision_tower')}": vision[name] for name in vision}
    return _decoder(text, "model.language_model.") | renamed


def _draw(name: str, shape: tuple[int, ...], state: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Draw one tensor, as ``tests.tiny_models`` does."""
    if "vision_tower" in name or "multi_modal_projector" in name:
        return 0.1 * state.standard_normal(shape)
    if name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
        return 1.5 + 0.2 * state.standard_normal(shape)
    if name.endswith("qkv_proj.weight"):
        return 1.4 * draw_llama(name, shape, state)
    return draw_llama(name, shape, state)


def _draw_tied(name: str, shape: tuple[int, ...], state: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Draw a tensor of a model with tied embeddings; the signs of the last norm keep it from repeating its input."""
    values = _draw(name, shape, state)
    return values * np.where(np.arange(shape[0]) % 2, 1.0, -1.0) if name.endswith("model.norm.weight") else values


def _draw_gemma(name: str, shape: tuple[int, ...], state: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Draw a tensor of Gemma, whose norms multiply by one more than their weight."""
    is_norm = name.endswith("norm.weight") and "vision_tower" not in name and "multi_modal_projector" not in name
    return _draw_tied(name, shape, state) - (1.0 if is_norm else 0.0)


def _draw_granite(name: str, shape: tuple[int, ...], state: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Draw a tensor of Granite, whose logits are divided by two."""
    is_embedding = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    return (2.0 if is_embedding else 1.0) * _draw_tied(name, shape, state)


def _draw_olmo(name: str, shape: tuple[int, ...], state: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Draw a tensor of Olmo; its layers read the embedding as it is, beside which the usual biases would be large."""
    return (0.15 if name.endswith(".bias") else 1.0) * _draw(name, shape, state)


_DRAWN = {
    "olmo2": _draw_olmo,
    "olmo3": _draw_olmo,
    "gemma2": _draw_gemma,
    "gemma3": _draw_gemma,
    "gemma3_text": _draw_gemma,
    "granite": _draw_granite,
    "hunyuan_v1_dense": _draw_tied,
}

# Mistral by itself is among Llama's cases.
FAMILIES.update({name: Family(_decoder, _DRAWN.get(name, _draw)) for name in LAYOUTS if name != "mistral"})
FAMILIES.update({name: Family(_multimodal, _DRAWN.get(name, _draw)) for name in _VISION})
