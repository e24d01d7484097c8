"""Tensors of the tiny mixture-of-experts models: names, shapes and types of the published checkpoints, and values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.tiny_models.case import Case, Stored
from tests.tiny_models.tensors import as_stored, stored_tensors

MXFP4_BLOCK = 32
"""Weights that share a scale (OCP Microscaling Formats 1.0, 6.3)."""
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

# --------------------------------------------------------------------------------------------------------------------
# Names and shapes
# --------------------------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """Safetensors type and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class _Table:
    """Names, types and shapes of a checkpoint's tensors, in the order in which they are drawn."""

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        self.config, self.dtype = config, dtype
        self.specs: dict[str, Spec] = {}

    def add(self, name: str, *shape: int, dtype: str | None = None) -> None:
        self.specs[name] = Spec(dtype or self.dtype, shape)

    def linear(self, name: str, outputs: int, inputs: int, bias: bool = False) -> None:
        self.add(f"{name}.weight", outputs, inputs)
        if bias:
            self.add(f"{name}.bias", outputs)

    def mlp(self, name: str, inner: int, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        hidden, (gate, up, down) = self.config["hidden_size"], parts
        self.linear(f"{name}.{gate}", inner, hidden)
        self.linear(f"{name}.{up}", inner, hidden)
        self.linear(f"{name}.{down}", hidden, inner)


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _attention(table: _Table, name: str) -> None:
    config = table.config
    family, hidden, dim = config["model_type"], config["hidden_size"], head_dim(config)
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    bias = bool(config.get("attention_bias")) or family == "qwen2_moe"
    table.linear(f"{name}.q_proj", queries, hidden, bias)
    table.linear(f"{name}.k_proj", keys, hidden, bias)
    table.linear(f"{name}.v_proj", keys, hidden, bias)
    table.linear(f"{name}.o_proj", hidden, queries, bias and family not in ("qwen2_moe", "glm4_moe"))
    if family == "qwen3_moe" or config.get("use_qk_norm"):
        table.add(f"{name}.q_norm.weight", dim)
        table.add(f"{name}.k_norm.weight", dim)
    elif family == "olmoe":  # over all heads together
        table.add(f"{name}.q_norm.weight", queries)
        table.add(f"{name}.k_norm.weight", keys)
    elif family == "gpt_oss":
        table.add(f"{name}.sinks", config["num_attention_heads"])


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer has experts."""
    step = config.get("decoder_sparse_step", 1)
    dense = layer in config.get("mlp_only_layers", []) or layer < config.get("first_k_dense_replace", 0)
    return not dense and (layer + 1) % step == 0


def num_experts(config: Mapping[str, Any]) -> int:
    """Return the number of experts of a layer, by whichever of its names."""
    return int(next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config))


def _feed_forward(table: _Table, prefix: str) -> None:
    config = table.config
    family, hidden, count = config["model_type"], config["hidden_size"], num_experts(config)
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    if family == "granitemoe":
        name = f"{prefix}.block_sparse_moe"
        table.add(f"{name}.router.layer.weight", count, hidden)
        table.add(f"{name}.input_linear.weight", count, 2 * inner, hidden)
        table.add(f"{name}.output_linear.weight", count, hidden, inner)
        return
    if family == "gpt_oss":
        _gpt_oss_experts(table, f"{prefix}.mlp", count, inner)
        return
    name, parts = f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj")
    if family == "mixtral":
        name, parts = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2")
    table.add(f"{name}.gate.weight", count, hidden)
    if family == "glm4_moe":
        table.add(f"{name}.gate.e_score_correction_bias", count, dtype="F32")
        table.mlp(f"{name}.shared_experts", inner * config["n_shared_experts"])
    if family == "qwen2_moe":
        table.mlp(f"{name}.shared_expert", config["shared_expert_intermediate_size"])
        table.add(f"{name}.shared_expert_gate.weight", 1, hidden)
    for expert in range(count):
        table.mlp(f"{name}.experts.{expert}", inner, parts)


def _gpt_oss_experts(table: _Table, name: str, count: int, inner: int) -> None:
    hidden = table.config["hidden_size"]
    table.linear(f"{name}.router", count, hidden, bias=True)
    for part, outputs, inputs in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        if "quantization_config" in table.config:
            blocks = inputs // MXFP4_BLOCK
            table.add(f"{name}.experts.{part}_blocks", count, outputs, blocks, MXFP4_BLOCK // 2, dtype="U8")
            table.add(f"{name}.experts.{part}_scales", count, outputs, blocks, dtype="U8")
        else:
            table.add(f"{name}.experts.{part}", count, inputs, outputs)
        table.add(f"{name}.experts.{part}_bias", count, outputs)


def _next_token_layer(table: _Table, prefix: str) -> None:
    """Add what a layer of multi-token prediction has beside a decoder layer's tensors."""
    hidden, vocab = table.config["hidden_size"], table.config["vocab_size"]
    table.add(f"{prefix}.embed_tokens.weight", vocab, hidden)
    table.add(f"{prefix}.eh_proj.weight", hidden, 2 * hidden)
    table.add(f"{prefix}.enorm.weight", hidden)
    table.add(f"{prefix}.hnorm.weight", hidden)
    table.add(f"{prefix}.shared_head.head.weight", vocab, hidden)
    table.add(f"{prefix}.shared_head.norm.weight", hidden)


def tensor_specs(config: Mapping[str, Any], dtype: str) -> dict[str, Spec]:
    """Return type and shape of every tensor of a checkpoint whose matrices are ``dtype``, in the order of drawing."""
    table, hidden = _Table(config, dtype), config["hidden_size"]
    table.add("model.embed_tokens.weight", config["vocab_size"], hidden)
    layers = config["num_hidden_layers"]
    for layer in range(layers + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}"
        table.add(f"{prefix}.input_layernorm.weight", hidden)
        _attention(table, f"{prefix}.self_attn")
        table.add(f"{prefix}.post_attention_layernorm.weight", hidden)
        if has_experts(config, layer):
            _feed_forward(table, prefix)
        else:
            table.mlp(f"{prefix}.mlp", config["intermediate_size"])
        if layer >= layers:
            _next_token_layer(table, prefix)
    table.add("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        table.add("lm_head.weight", config["vocab_size"], hidden)
    return table.specs


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------


_SCALES: tuple[tuple[tuple[str, ...], float, float], ...] = (
    # Ends of names with mean and deviation; the first that fits counts.
    (("q_norm.weight", "k_norm.weight"), 1.5, 0.2),
    (("norm.weight",), 1.0, 0.1),
    (("e_score_correction_bias",), 0.0, 0.15),
    (("sinks",), 1.0, 1.0),
    (("router.bias",), 0.0, 0.5),
    (("proj_bias",), 0.0, 0.3),
    ((".bias",), 0.0, 0.4),
)
_MATRIX_SCALES: tuple[tuple[tuple[str, ...], float], ...] = (
    # The same for matrices: mean 0, deviation for inputs of size 1.
    (("gate.weight", "router.weight", "router.layer.weight"), 2.0),
    (("embed_tokens.weight", "lm_head.weight"), 1.5),
    (("q_proj.weight", "k_proj.weight"), 1.6),
    (("v_proj.weight", "o_proj.weight"), 2.0),
    (("gate_up_proj", "gate_up_proj_blocks"), 3.0),  # large enough for the clamps of gpt-oss
    (("down_proj", "down_proj_blocks"), 0.8),
    (("down_proj.weight", "w2.weight", "output_linear.weight"), 2.0),
    (("",), 1.2),
)


def _draw(name: str, shape: tuple[int, ...], config: Mapping[str, Any], state: np.random.RandomState) -> Any:
    """Draw one tensor: float64 of ``shape``, at a scale that makes an omission of its part noticeable."""
    values = state.standard_normal(shape)
    if config["model_type"] == "granitemoe" and name == "model.norm.weight":
        return 60.0 + 6.0 * values  # for logits of a usual size after the scaling, with such an embedding
    for ends, mean, deviation in _SCALES:
        if name.endswith(ends):
            return mean + deviation * values
    deviation = next(scale for ends, scale in _MATRIX_SCALES if name.endswith(ends))
    if config["model_type"] == "granitemoe":
        # What the layers give is scaled down, the embedding up: so that the layers count against it all the same.
        if name.endswith(("output_linear.weight", "o_proj.weight", "v_proj.weight", "q_proj.weight", "k_proj.weight")):
            deviation *= 2.0
        elif name.endswith("embed_tokens.weight"):
            deviation = 0.13
    inputs = shape[1] if name.endswith(("gate_up_proj", "down_proj")) else shape[-1]
    return deviation / math.sqrt(inputs) * values


def mxfp4(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantise (..., n) to MXFP4 as gpt-oss stores it: blocks (..., n / 32, 16) and scales (..., n / 32), both uint8.

    A scale is a power of two, its exponent plus 127 (E8M0). A byte holds two E2M1 values, the earlier one in the low
    bits. After OCP Microscaling Formats 1.0, 6.3: the exponent of the block's largest value, less that of 6.
    """
    blocks = values.reshape(*values.shape[:-1], -1, MXFP4_BLOCK)
    exponents = np.floor(np.log2(np.abs(blocks).max(axis=-1))) - 2
    scaled = blocks / 2.0 ** exponents[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - _E2M1).argmin(axis=-1) + 8 * (scaled < 0)
    packed = codes[..., ::2] + 16 * codes[..., 1::2]
    return packed.astype(np.uint8), (exponents + 127).astype(np.uint8)


def checkpoint(case: Case) -> Iterator[Stored]:
    """Yield the tensors of a case."""
    state = np.random.RandomState(case.seed)
    for name, (dtype, shape) in tensor_specs(case.config, case.dtype).items():
        if name.endswith("_blocks"):
            drawn = _draw(name, (*shape[:-2], shape[-2] * MXFP4_BLOCK), case.config, state)
            spread = 2.0 ** state.randint(-2, 3, size=(*shape[:2], 1))  # rows of different exponents
            blocks, scales = mxfp4(drawn * spread)
            yield Stored(name, dtype, blocks)
            yield Stored(name.replace("_blocks", "_scales"), dtype, scales)
        elif not name.endswith("_scales"):
            yield Stored(name, dtype, as_stored(_draw(name, shape, case.config, state), dtype))


def filled(case: Case, end: str, value: float) -> Case:
    """Return a case whose tensors with names that end in ``end`` hold nothing but ``value``."""

    def tensors(_: Case) -> Iterator[Stored]:
        for name, dtype, values in stored_tensors(case):
            changed = as_stored(np.full(values.shape, value), dtype) if name.endswith(end) else values
            yield Stored(name, dtype, changed)

    return replace(case, checkpoint=tensors)
