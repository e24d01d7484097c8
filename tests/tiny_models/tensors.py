"""The tensors of the tiny models: their names and shapes, how they are drawn, and how they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tiny_models.case import Case, Stored

Specs = dict[str, tuple[int, ...]]
"""Names and shapes of tensors, in the order in which they are drawn."""

_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True)
class Family:
    """What the tensors of an architecture are, where they are not Llama's.

    Attributes:
        specs: Returns the tensors of a checkpoint, given ``config.json``.
        draw: Draws one tensor, given its name, its shape and the random state: float64 of that shape.
    """

    specs: Callable[[Mapping[str, Any]], Specs]
    draw: Callable[[str, tuple[int, ...], np.random.RandomState], npt.NDArray[np.float64]]


FAMILIES: dict[str, Family] = {}
"""Families of other files by ``model_type``, entered there: ``tests.tiny_dense``."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of ``config.json`` that describes the decoder: ``text_config`` of a multimodal model."""
    text: Mapping[str, Any] = config.get("text_config", config)
    return text


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of an attention head."""
    if config.get("head_dim") is not None:
        return int(config["head_dim"])
    if config["model_type"] == "qwen3":
        return _QWEN3_HEAD_DIM
    return int(config["hidden_size"] // config["num_attention_heads"])


def tensor_specs(config: Mapping[str, Any]) -> Specs:
    """Return the name and shape of every tensor of the checkpoint; the order is that in which they are drawn."""
    family = FAMILIES.get(config["model_type"])
    return family.specs(config) if family else _llama_specs(config)


def _llama_specs(config: Mapping[str, Any]) -> Specs:
    """Return the tensors of Llama, Mistral, Qwen2 and Qwen3."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    dim = head_dim(config)
    queries = config["num_attention_heads"] * dim
    keys = config["num_key_value_heads"] * dim
    model_type = config["model_type"]
    attention_bias = bool(config.get("attention_bias")) and model_type in ("llama", "qwen3")
    mlp_bias = bool(config.get("mlp_bias")) and model_type == "llama"

    specs: Specs = {"model.embed_tokens.weight": (vocab, hidden)}

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        specs[f"{name}.weight"] = (outputs, inputs)
        if bias:
            specs[f"{name}.bias"] = (outputs,)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        specs[f"{prefix}.input_layernorm.weight"] = (hidden,)
        linear(f"{prefix}.self_attn.q_proj", queries, hidden, attention_bias or model_type == "qwen2")
        linear(f"{prefix}.self_attn.k_proj", keys, hidden, attention_bias or model_type == "qwen2")
        linear(f"{prefix}.self_attn.v_proj", keys, hidden, attention_bias or model_type == "qwen2")
        linear(f"{prefix}.self_attn.o_proj", hidden, queries, attention_bias)
        if model_type == "qwen3":
            specs[f"{prefix}.self_attn.q_norm.weight"] = (dim,)
            specs[f"{prefix}.self_attn.k_norm.weight"] = (dim,)
        specs[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{prefix}.mlp.gate_proj", inner, hidden, mlp_bias)
        linear(f"{prefix}.mlp.up_proj", inner, hidden, mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, mlp_bias)
    specs["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        specs["lm_head.weight"] = (vocab, hidden)
    return specs


def draw_llama(name: str, shape: tuple[int, ...], state: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Draw one tensor: float64 of ``shape``, at a scale that makes an omission of its part noticeable."""
    values = state.standard_normal(shape)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.5 + 0.2 * values
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * values
    if name.endswith(".bias"):
        return (0.4 if "self_attn" in name else 0.2) * values
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return (1.5 / math.sqrt(shape[1])) * values
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return (1.6 / math.sqrt(shape[1])) * values
    if name.endswith(("v_proj.weight", "o_proj.weight", "down_proj.weight")):
        return (2.0 / math.sqrt(shape[1])) * values
    return (1.2 / math.sqrt(shape[1])) * values


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 values to bfloat16, to nearest and ties to even; returns the bits (uint16, same shape)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    quiet_nan = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return np.where(np.isnan(values), quiet_nan, rounded)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return the float32 values of bfloat16 ``bits`` (uint16, same shape)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def as_stored(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[Any]:
    """Convert float64 values to what is stored in the file: float32, float16, or the bits of bfloat16."""
    single = values.astype("<f4")
    if dtype == "F32":
        return single
    if dtype == "F16":
        return single.astype("<f2")
    if dtype == "BF16":
        return to_bfloat16(single).astype("<u2")
    raise ValueError(f"unknown dtype {dtype!r}")


def stored_tensors(case: Case) -> Iterator[Stored]:
    """Yield every tensor of a case."""
    if case.checkpoint is not None:
        yield from case.checkpoint(case)
        return
    state = np.random.RandomState(case.seed)
    family = FAMILIES.get(case.config["model_type"])
    draw = family.draw if family else draw_llama
    for name, shape in tensor_specs(case.config).items():
        yield Stored(name, case.dtype, as_stored(draw(name, shape, state), case.dtype))


def tensors(case: Case) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield name and stored values of every tensor of a case (float32, float16, or bfloat16 bits as uint16)."""
    for name, _, values in stored_tensors(case):
        yield name, values
