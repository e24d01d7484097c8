"""Tiny random models of every supported architecture, written as Hugging Face directories.

Each case is a complete ``config.json`` in the manner of a well-known published model, scaled down to a few hundred
kilobytes, with random weights. The weights come from ``numpy.random.RandomState``, whose stream is frozen, so the
models need not be stored: only what transformers computes for them is (see ``make_reference.py``).

Only numpy is used here. The safetensors files are written directly, as numpy has no bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Config = dict[str, Any]
Specs = dict[str, tuple[int, ...]]
"""Names and shapes of tensors, in the order in which they are drawn."""

REFERENCE_FOLDER = Path(__file__).parent / "data" / "reference"
GREEDY_TOKENS = 24
"""Tokens generated for each case."""

_QWEN3_HEAD_DIM = 128


class Stored(NamedTuple):
    """One tensor of a checkpoint: its name, its safetensors type, and its values (bfloat16 as uint16 bits)."""

    name: str
    dtype: str
    values: npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One tiny model: its configuration, how its weights are stored, and what is computed with it.

    Attributes:
        name: Name in snake case, also that of the reference file.
        config: Contents of ``config.json``.
        dtype: Stored type of the weights: ``"F32"``, ``"F16"`` or ``"BF16"``.
        seed: Seed of the weights.
        shards: Number of safetensors files; with more than one an index is written as well.
        length: Number of tokens of the reference sequence.
        prompt: Number of leading tokens of that sequence which the greedy generation starts from.
        generation: Contents of ``generation_config.json``; None takes the token ids of ``config``.
        checkpoint: Yields the tensors of the case; None draws those of ``tensor_specs``, all of type ``dtype``.
    """

    name: str
    config: Config
    dtype: str
    seed: int
    shards: int = 1
    length: int = 48
    prompt: int = 16
    generation: Config | None = None
    checkpoint: Callable[[Case], Iterator[Stored]] | None = None


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


# --------------------------------------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------------------------------------


def _llama(**changes: Any) -> Config:
    """Return a Llama config of the generation before transformers 5 (``rope_theta`` and ``rope_scaling``)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 160,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "vocab_size": 160,
    } | changes


def _mistral(**changes: Any) -> Config:
    """Return a Mistral config (the first version has no ``head_dim`` and a window)."""
    return {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 128,
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 16,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 176,
    } | changes


def _qwen2(**changes: Any) -> Config:
    """Return a Qwen2 config; its ``sliding_window`` is set, yet switched off by ``use_sliding_window``."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 170,
        "eos_token_id": 170,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 160,
        "max_position_embeddings": 128,
        "max_window_layers": 1,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 176,
    } | changes


def _qwen3(**changes: Any) -> Config:
    """Return a Qwen3 config; ``head_dim`` is not ``hidden_size / num_attention_heads``."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 180,
        "eos_token_id": 182,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 160,
        "max_position_embeddings": 128,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 186,
    } | changes


def _without(config: Config, *keys: str) -> Config:
    """Return ``config`` without ``keys``."""
    return {key: value for key, value in config.items() if key not in keys}


_LLAMA31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}

_LLAMA32_TIED = {
    # The key generation of transformers 5: dtype instead of torch_dtype, all of rope in one dictionary.
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 156,
    "dtype": "bfloat16",
    "eos_token_id": [157, 158, 159],
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "transformers_version": "5.0.0",
    "use_cache": True,
    "vocab_size": 160,
}

_ALL_CASES = [
    # Multi-head attention. No rope_theta, no head_dim, none of the bias keys, as published.
    Case(
        "llama2",
        _without(
            _llama(num_key_value_heads=4, torch_dtype="float32", transformers_version="4.31.0.dev0"),
            "attention_bias",
            "attention_dropout",
            "mlp_bias",
            "rope_theta",
        ),
        "F32",
        seed=5,
    ),
    Case(
        "llama3_gqa",
        _without(
            _llama(
                hidden_size=128,
                num_attention_heads=8,
                num_key_value_heads=2,
                intermediate_size=96,
                rope_theta=500000.0,
                torch_dtype="bfloat16",
                bos_token_id=168,
                eos_token_id=169,
                vocab_size=172,
            ),
            "mlp_bias",
        ),
        "BF16",
        seed=6,
    ),
    # Rope scaling in the older generation of keys; all three bands of wavelengths are present.
    Case(
        "llama31",
        _llama(
            rope_theta=500000.0,
            rope_scaling=_LLAMA31_SCALING,
            bos_token_id=150,
            eos_token_id=[151, 158, 159],
        ),
        "F32",
        seed=6,
        generation={
            "bos_token_id": 150,
            "do_sample": True,
            "eos_token_id": [151, 158, 159],
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.42.3",
        },
    ),
    # The same in the newer generation of keys, with tied embeddings and a head_dim in the config.
    Case("llama32_tied", _LLAMA32_TIED, "BF16", seed=11),
    Case("llama_bias", _llama(attention_bias=True, mlp_bias=True), "F32", seed=1),
    # "type" is what "rope_type" was called at first.
    Case("llama_linear", _llama(rope_scaling={"type": "linear", "factor": 4.0}), "F32", seed=7),
    # Sequences beyond max_position_embeddings: dynamic scaling only acts there.
    Case(
        "llama_dynamic",
        _llama(max_position_embeddings=32, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "F32",
        seed=1,
        prompt=40,
    ),
    Case(
        "llama_yarn",
        _llama(
            hidden_size=128,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        "F32",
        seed=4,
    ),
    # Every optional key of yarn but attention_factor, in the newer generation of keys.
    Case(
        "llama_yarn_full",
        _without(
            _llama(
                dtype="float32",
                hidden_size=128,
                rope_parameters={
                    "beta_fast": 4.0,
                    "beta_slow": 0.5,
                    "factor": 4.0,
                    "mscale": 2.0,
                    "mscale_all_dim": 0.5,
                    "original_max_position_embeddings": 32,
                    "rope_theta": 10000.0,
                    "rope_type": "yarn",
                    "truncate": False,
                },
                transformers_version="5.0.0",
            ),
            "rope_theta",
            "rope_scaling",
            "torch_dtype",
        ),
        "F32",
        seed=4,
    ),
    Case(
        "llama_yarn_attention_factor",
        _llama(
            hidden_size=128,
            rope_scaling={
                "attention_factor": 0.75,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_type": "yarn",
            },
        ),
        "F32",
        seed=9,
    ),
    Case("mistral", _mistral(), "F32", seed=5),
    Case(
        "mistral_head_dim",
        _mistral(
            attention_dropout=0.0,
            head_dim=24,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            sliding_window=None,
            torch_dtype="bfloat16",
            transformers_version="4.43.0.dev0",
        ),
        "BF16",
        seed=2,
    ),
    Case("qwen2", _qwen2(), "F32", seed=3),
    Case(
        "qwen2_sliding",
        _qwen2(num_hidden_layers=3, use_sliding_window=True, max_window_layers=1, tie_word_embeddings=False),
        "F32",
        seed=10,
    ),
    Case("qwen3", _qwen3(), "F32", seed=3),
    Case(
        "qwen3_bf16",
        _qwen3(tie_word_embeddings=True, num_key_value_heads=1, torch_dtype="bfloat16"),
        "BF16",
        seed=1,
        shards=2,
        generation={
            "bos_token_id": 180,
            "do_sample": True,
            "eos_token_id": [182, 180],
            "pad_token_id": 180,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
    ),
    Case("llama_f16", _llama(torch_dtype="float16"), "F16", seed=4),
    # Sizes which are no multiples of 16 or 32: head_dim 24, hidden 144, intermediate 100, vocabulary 163.
    Case(
        "llama_heads6",
        _llama(
            hidden_size=144,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=100,
            vocab_size=163,
        ),
        "F32",
        seed=6,
    ),
    # A number of heads which few numbers of ranks divide, and a single KV head.
    Case(
        "llama_heads7",
        _llama(hidden_size=112, num_attention_heads=7, num_key_value_heads=1, intermediate_size=96, vocab_size=199),
        "F32",
        seed=1,
    ),
    Case(
        "llama_heads7_mha",
        _llama(hidden_size=112, num_attention_heads=7, num_key_value_heads=7, intermediate_size=96, vocab_size=199),
        "F32",
        seed=1,
    ),
    # Integer rope_theta, max_window_layers below the number of layers, a BOS token other than in generation_config.
    Case(
        "deepseek_distill_like",
        _qwen2(
            hidden_size=96,
            num_attention_heads=6,
            num_hidden_layers=3,
            max_window_layers=2,
            rope_theta=10000,
            tie_word_embeddings=False,
            torch_dtype="bfloat16",
            transformers_version="4.44.0",
        ),
        "BF16",
        seed=4,
        generation={
            "_from_model_config": True,
            "bos_token_id": 172,
            "do_sample": True,
            "eos_token_id": 170,
            "temperature": 0.6,
            "top_p": 0.95,
            "transformers_version": "4.39.3",
        },
    ),
]

CASES: dict[str, Case] = {case.name: case for case in _ALL_CASES}


# --------------------------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, values: Mapping[str, npt.NDArray[Any]], dtype: str | Mapping[str, str]) -> None:
    """Write ``values`` (bfloat16 as uint16 bits) as one safetensors file; ``dtype`` is the type of all, or by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    order = sorted(values, key=lambda name: (-values[name].itemsize, name))  # so that everything is aligned
    for name in order:
        end = offset + values[name].nbytes
        kind = dtype if isinstance(dtype, str) else dtype[name]
        header[name] = {"dtype": kind, "shape": list(values[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(values[name].tobytes())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as Hugging Face writes it: sorted keys, two spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _generation_config(case: Case) -> Config:
    """Return the contents of ``generation_config.json``."""
    if case.generation is not None:
        return case.generation
    keys = ("bos_token_id", "eos_token_id", "transformers_version")
    return {"_from_model_config": True} | {key: case.config[key] for key in keys if key in case.config}


def _split(values: Mapping[str, npt.NDArray[Any]], shards: int) -> list[dict[str, npt.NDArray[Any]]]:
    """Split tensors, in their order, into ``shards`` parts of about the same number of bytes; none is empty."""
    total = sum(value.nbytes for value in values.values())
    parts: list[dict[str, npt.NDArray[Any]]] = [{} for _ in range(shards)]
    before = 0
    for name, value in values.items():
        parts[min(before * shards // total, shards - 1)][name] = value
        before += value.nbytes
    if not all(parts):
        raise ValueError(f"{shards} shards are too many for these tensors")
    return parts


def write_model(case: Case, folder: Path) -> Path:
    """Write a case as a Hugging Face directory and return ``folder``, which is created where missing.

    Written are ``config.json``, ``generation_config.json``, and either ``model.safetensors`` or the numbered shards
    with ``model.safetensors.index.json``. There is no tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", case.config)
    _write_json(folder / "generation_config.json", _generation_config(case))
    stored = list(stored_tensors(case))
    values = {name: value for name, _, value in stored}
    dtypes = {name: dtype for name, dtype, _ in stored}
    if case.shards == 1:
        write_safetensors(folder / "model.safetensors", values, dtypes)
        return folder
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_split(values, case.shards), start=1):
        file_name = f"model-{number:05d}-of-{case.shards:05d}.safetensors"
        write_safetensors(folder / file_name, part, dtypes)
        weight_map |= dict.fromkeys(part, file_name)
    total_size = sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return folder


# --------------------------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What transformers computes for a case in float32.

    Attributes:
        tokens: The sequence, int64 of shape (n,).
        logits: Logits of every position of one forward pass over ``tokens``, float32 of shape (n, vocab).
        greedy_prompt: The leading part of ``tokens`` which the generation starts from, int64 of shape (prompt,).
        greedy: Tokens generated greedily, one by one with a KV cache and regardless of EOS, int64 of shape (24,).
        fingerprint: ``fingerprint`` of the case the reference was made from.
    """

    tokens: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    greedy_prompt: npt.NDArray[np.int64]
    greedy: npt.NDArray[np.int64]
    fingerprint: str


def fingerprint(case: Case) -> str:
    """Return a digest of the configuration and the stored weights of a case."""
    digest = hashlib.sha256(json.dumps(case.config, sort_keys=True).encode())
    for name, dtype, values in stored_tensors(case):
        digest.update(f"{name}:{dtype}:{values.shape}:".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def reference_path(case: Case) -> Path:
    """Return the path of the reference file of a case."""
    return REFERENCE_FOLDER / f"{case.name}.npz"


def load_reference(case: Case) -> Reference:
    """Load the reference of a case."""
    with np.load(reference_path(case), allow_pickle=False) as data:
        return Reference(
            tokens=data["tokens"],
            logits=data["logits"],
            greedy_prompt=data["greedy_prompt"],
            greedy=data["greedy"],
            fingerprint=str(data["fingerprint"]),
        )
