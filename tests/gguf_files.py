"""Tiny models as GGUF files: names by the package `gguf`, everything else as llama.cpp's converter does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tests.gguf_blocks import like
from tests.naive_model import read_tensors
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model

Floats = npt.NDArray[np.float32]
Config = Mapping[str, Any]
ARCHITECTURES = {
    "llama": "llama", "mixtral": "llama", "ministral3": "mistral3", "granite": "granite", "granitemoe": "granitemoe",
    "smollm3": "smollm3", "ernie4_5": "ernie4_5", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe", "qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "olmo3": "olmo2", "olmoe": "olmoe",
    "seed_oss": "seed_oss", "hunyuan_v1_dense": "hunyuan-dense", "gpt_oss": "gpt-oss", "glm4_moe": "glm4moe",
    "lfm2": "lfm2",
}  # fmt: skip
PERMUTED = ("llama", "mistral3", "granite", "granitemoe", "smollm3")
SHIFTED = ("gemma2", "gemma3", "qwen3next", "qwen35", "qwen35moe")


def head_dim(c: Config) -> int:
    """Return the size of a head."""
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def permuted(values: Floats, heads: int) -> Floats:
    """Return rows whose halves of each head are interleaved."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def tiled(values: Floats, c: Config, size: int) -> Floats:
    """Return rows of value heads, the first ones of all key heads first."""
    groups = c["linear_num_key_heads"]
    ratio = c["linear_num_value_heads"] // groups
    return values.reshape(groups, ratio, size, -1).swapaxes(0, 1).reshape(values.shape)


def _delta(name: str, values: Floats, c: Config, arch: str) -> Iterator[tuple[str, Floats]]:
    """Yield what becomes of a delta net's tensor."""
    groups, heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    key, value = c["linear_key_head_dim"], c["linear_value_head_dim"]
    order = (lambda v, size: v) if arch == "qwen3next" else (lambda v, size: tiled(v, c, size))
    first = 2 * groups * key
    if name.endswith("in_proj_qkvz.weight"):
        ratio = heads // groups
        parts = values.reshape(groups, -1, values.shape[1])
        ends = np.cumsum([key, key, ratio * value])
        q, k, v, z = (part.reshape(-1, values.shape[1]) for part in np.split(parts, ends, axis=1))
        yield name.replace("qkvz", "qkv"), np.concatenate([q, k, v])
        yield name.replace("qkvz", "z"), z
    elif name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        values = values.reshape(len(values), -1)
        yield name, np.concatenate([values[:first], order(values[first:], value)])
    elif name.endswith("in_proj_z.weight"):
        yield name, order(values, value)
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
        yield name, order(values, 1)
    elif name.endswith("A_log"):
        yield name, order(-np.exp(values), 1)
    elif name.endswith("dt_bias"):
        yield name.replace("dt_bias", "dt_proj.bias"), order(values, 1)
    elif name.endswith("out_proj.weight"):
        yield name, np.ascontiguousarray(order(np.ascontiguousarray(values.T), value).T)
    else:
        yield name, values


def _converted(every: Mapping[str, Floats], c: Config, arch: str) -> Iterator[tuple[str, Floats]]:
    """Yield tensors as the converter hands them on, still under names like Hugging Face's."""
    experts: dict[str, dict[int, Floats]] = {}
    for name, values in every.items():
        if "rotary_emb" in name or name.startswith("mtp.") or _layer(name) >= c["num_hidden_layers"]:
            continue
        if arch in SHIFTED and name.endswith("norm.weight") and "linear_attn" not in name:
            values = values + np.float32(1)
        if arch in PERMUTED and name.endswith(("q_proj.weight", "q_proj.bias")):
            values = permuted(values, c["num_attention_heads"])
        if arch in PERMUTED and name.endswith(("k_proj.weight", "k_proj.bias")):
            values = permuted(values, c["num_key_value_heads"])
        parts = name.split(".")
        if ".linear_attn." in name:
            yield from _delta(name, values, c, arch)
        elif "experts" in parts and parts[parts.index("experts") + 1].isdigit():
            at = parts.index("experts") + 1
            experts.setdefault(".".join(parts[:at] + parts[at + 1 :]), {})[int(parts[at])] = values
        elif arch == "granitemoe" and "input_linear" in name:
            prefix = name.split("block_sparse_moe")[0]
            gate, up = np.split(values, 2, axis=1)
            yield f"{prefix}mlp.experts.gate_proj.weight", gate
            yield f"{prefix}mlp.experts.up_proj.weight", up
        elif parts[-1] == "gate_up_proj" or (arch == "gpt-oss" and parts[-1] == "gate_up_proj_bias"):
            yield from _fused(name, values, arch)
        elif parts[-1] in ("down_proj", "down_proj_bias"):
            leaf = "bias" if parts[-1].endswith("bias") else "weight"
            turned = np.ascontiguousarray(values.swapaxes(-1, -2)) if arch == "gpt-oss" and leaf == "weight" else values
            yield f"{name.removesuffix('_bias')}.{leaf}", turned
        elif name.endswith("conv.conv.weight"):
            yield name, values.reshape(len(values), -1)
        elif name.endswith("shared_expert_gate.weight"):
            yield name, values.reshape(-1)
        else:
            yield name.replace("e_score_correction_bias", "e_score_correction.bias"), values
    for name, found in experts.items():
        yield name, np.stack([found[e] for e in range(len(found))])


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else 0


def _fused(name: str, values: Floats, arch: str) -> Iterator[tuple[str, Floats]]:
    """Yield gate and up of experts that lie side by side, or alternate."""
    leaf = "bias" if name.endswith("bias") else "weight"
    if arch == "gpt-oss":
        rows = values if leaf == "bias" else values.swapaxes(-1, -2)
        both = rows[:, ::2], rows[:, 1::2]
    else:
        half = values.shape[1] // 2
        both = values[:, :half], values[:, half:]
    for part, rows in zip(("gate_proj", "up_proj"), both, strict=True):
        yield f"{name.split('gate_up_proj')[0]}{part}.{leaf}", np.ascontiguousarray(rows)


def _metadata(w: Any, c: Config, arch: str) -> None:
    """Write what the converter writes."""
    kv: Any = c["num_key_value_heads"]
    if arch == "lfm2":
        kv = [kv if i in c["full_attn_idxs"] else 0 for i in range(c["num_hidden_layers"])]
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(c.get("rms_norm_eps", c.get("norm_eps")))
    w.add_key_length(head_dim(c))
    w.add_value_length(head_dim(c))
    w.add_vocab_size(c["vocab_size"])
    if "intermediate_size" in c:
        w.add_feed_forward_length(c["intermediate_size"])
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    theta = c.get("rope_theta", given.get("rope_theta", 10000.0))
    if "alpha" in given:
        dim = head_dim(c)
        theta, given = theta * given["alpha"] ** (dim / (dim - 2)), {}
    w.add_rope_freq_base(float(theta))
    partial = c.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    w.add_rope_dimension_count(int(head_dim(c) * partial))
    _scaling(w, given, head_dim(c))
    if c.get("sliding_window") and arch not in ("qwen2moe", "qwen3moe", "llama"):
        w.add_sliding_window(c["sliding_window"])
    for key, add in (
        ("attn_logit_softcapping", w.add_attn_logit_softcapping),
        ("final_logit_softcapping", w.add_final_logit_softcapping),
        ("attention_multiplier", w.add_attention_scale),
        ("embedding_multiplier", w.add_embedding_scale),
        ("residual_multiplier", w.add_residual_scale),
        ("logits_scaling", w.add_logit_scale),
        ("clip_qkv", w.add_clamp_kqv),
        ("num_experts_per_tok", w.add_expert_used_count),
        ("moe_intermediate_size", w.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", w.add_expert_shared_feed_forward_length),
        ("n_shared_experts", w.add_expert_shared_count),
        ("first_k_dense_replace", w.add_leading_dense_block_count),
        ("full_attention_interval", w.add_full_attention_interval),
        ("conv_L_cache", w.add_shortconv_l_cache),
        ("linear_conv_kernel_dim", w.add_ssm_conv_kernel),
        ("linear_key_head_dim", w.add_ssm_state_size),
        ("linear_num_key_heads", w.add_ssm_group_count),
        ("linear_num_value_heads", w.add_ssm_time_step_rank),
    ):
        if c.get(key) is not None:
            add(c[key])
    count = next((c[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in c), None)
    if count:
        w.add_expert_count(count)
    if arch == "gpt-oss":
        w.add_expert_feed_forward_length(c["intermediate_size"])
    if arch == "glm4moe":
        w.add_expert_weights_scale(c["routed_scaling_factor"])
        w.add_expert_weights_norm(c["norm_topk_prob"])
        w.add_expert_group_count(c["n_group"])
        w.add_expert_group_used_count(c["topk_group"])
    if "linear_value_head_dim" in c:
        w.add_ssm_inner_size(c["linear_value_head_dim"] * c["linear_num_value_heads"])


def _scaling(w: Any, given: Config, dim: int) -> None:
    kind = given.get("rope_type", given.get("type"))
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(given["factor"])
    elif kind == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(given["factor"])
        w.add_rope_scaling_orig_ctx_len(given["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_beta_fast(float(given.get("beta_fast", 32.0)))
        w.add_rope_scaling_yarn_beta_slow(float(given.get("beta_slow", 1.0)))
    if "llama_4_scaling_beta" in given:
        w.add_attn_temperature_scale(given["llama_4_scaling_beta"])


def _rope_factors(c: Config) -> Iterator[tuple[str, Floats]]:
    """Yield the tensors of factors that rotations are divided by."""
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if given.get("rope_type") == "llama3":
        dim, theta = head_dim(c), c.get("rope_theta", given.get("rope_theta"))
        lengths = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
        original, low, high = (
            given[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        smooth = np.clip((original / lengths - low) / (high - low), 0, 1)
        yield "rope_freqs.weight", (1 / ((1 - smooth) / given["factor"] + smooth)).astype(np.float32)
    if "long_factor" in given:
        for name in ("long", "short"):
            yield f"rope_factors_{name}.weight", np.array(given[f"{name}_factor"], np.float32)


Choice = Callable[[str, Floats], str]


def write_gguf(case: Case, folder: Path, kind: Choice = lambda name, values: "F32") -> tuple[Path, Path]:
    """Write a case as a Hugging Face directory and as a GGUF file; return both.

    kind: the type of a tensor, by its name and values; vectors and what has no whole blocks are F32.
    """
    c, hf, path = case.config, write_model(case, folder / "hf"), folder / "model.gguf"
    arch = ARCHITECTURES[c["model_type"]]
    w = gguf.GGUFWriter(path, arch)
    every = read_tensors(hf)
    _metadata(w, c, arch)
    if arch == "lfm2":
        w.add_feed_forward_length(len(every["model.layers.0.feed_forward.w1.weight"]))
    if "original_max_position_embeddings" in c:
        w.add_rope_scaling_orig_ctx_len(c["original_max_position_embeddings"])
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, c["num_hidden_layers"])
    found = {names.get_name(name, try_suffixes=(".weight", ".bias")): v for name, v in _converted(every, c, arch)}
    for name, values in {**found, **dict(_rope_factors(c))}.items():
        assert name is not None
        values = np.ascontiguousarray(values, np.float32)
        which = gguf.GGMLQuantizationType[kind(name, values)]
        columns = gguf.GGML_QUANT_SIZES[which][0]
        if values.ndim < 2 or values.shape[-1] % columns or which.name == "F32":
            w.add_tensor(name, values)
        else:
            w.add_tensor(name, like(values, which.name), raw_dtype=which)
    for write in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        write()
    return hf, path
