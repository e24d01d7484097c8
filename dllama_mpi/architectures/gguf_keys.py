"""What the metadata of a GGUF file say of a model's shape: what `gguf` reads, written."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ModelError
from ..model.config import AttentionConfig, DeltaNetConfig, ExpertsConfig, MLPConfig, ModelConfig, ShortConvConfig
from ..model.rope import Rope, RopeConfig

Json = dict[str, Any]

_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "ministral3": "mistral3", "granite": "granite",
    "granitemoe": "granitemoe", "smollm3": "smollm3", "ernie4_5": "ernie4_5", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "qwen3_next": "qwen3next", "qwen3_5_text": "qwen35",
    "qwen3_5": "qwen35", "qwen3_5_moe_text": "qwen35moe", "qwen3_5_moe": "qwen35moe", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "gemma3": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "olmo3": "olmo2", "olmoe": "olmoe",
    "seed_oss": "seed_oss", "hunyuan_v1_dense": "hunyuan-dense", "gpt_oss": "gpt-oss", "glm4_moe": "glm4moe",
    "lfm2": "lfm2",
}  # fmt: skip
WITH_WINDOWS = ("gemma2", "gemma3", "olmo2", "phi3", "gpt-oss")
"""Architectures whose metadata have the size of a window."""
_SIGMOID = 2  # of expert_gating_func


def gguf_architecture(config: ModelConfig) -> str:
    """Return what GGUF calls a model's architecture.

    Raises:
        ModelError: it has no name for it.
    """
    kind = config.model_type
    if kind == "mistral3":  # Mistral or Ministral 3, beside images
        return "mistral3" if config.query_scaling or main_rope(config).kind == "yarn" else "llama"
    if kind not in _ARCHITECTURES:
        raise ModelError(f"{kind} cannot be exported; can be: {', '.join(sorted([*_ARCHITECTURES, 'mistral3']))}")
    return _ARCHITECTURES[kind]


def main_rope(config: ModelConfig) -> RopeConfig:
    """Return the rope of layers that see everything and rotate at all; without any, the first one."""
    every = config.attentions
    chosen = [each for each in every if each.rope.kind != "none"] or every
    return next((each.rope for each in chosen if not each.window), chosen[0].rope)


def gguf_keys(config: ModelConfig) -> Json:
    """Return the metadata by their keys without the architecture's name; rotations' factors: see `rope_factors`."""
    arch, a = gguf_architecture(config), config.attentions[0]
    rope = main_rope(config)
    found: Json = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "attention.head_count": a.num_heads,
        "attention.head_count_kv": a.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        "vocab_size": config.vocab_size,
        "rope.freq_base": rope.theta,
        "rope.dimension_count": rope.dim,
        **_scaling(rope, arch),
        **_feeds(config, arch),
        **_mixers(config, arch),
        **_scales(config, a, arch),
    }
    if arch in WITH_WINDOWS and config.window:
        found["attention.sliding_window"] = config.window
    if arch == "gemma3":
        found |= _gemma3(config)
    elif arch == "olmo2" and config.window:
        found["attention.sliding_window_pattern"] = [each.window > 0 for each in config.attentions]
    return found


def _scaling(rope: RopeConfig, arch: str) -> Json:
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    original = {"rope.scaling.original_context_length": rope.original_positions}
    if rope.kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
            **original,
            # Without it llama.cpp multiplies with what YaRN's paper has, where mscale is as large as mscale_all_dim.
            **({"rope.scaling.yarn_log_multiplier": 1.0} if arch == "mistral3" else {}),
        }
    if rope.kind == "longrope":
        return {**original, "rope.scaling.attn_factor": rope.attention_factor}
    if rope.kind == "dynamic":
        raise ModelError("rope scaling 'dynamic' cannot be exported: GGUF has no name for it")
    return {}


def rope_factors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the tensors of what rotations are divided by, (dim / 2,) float32 each, by their names."""
    rope = main_rope(config)
    if rope.kind == "longrope":
        pairs = (("long", rope.long_factors), ("short", rope.short_factors))
        return {f"rope_factors_{name}.weight": np.array(factors, np.float32) for name, factors in pairs}
    if rope.kind == "divided":
        return {"rope_freqs.weight": np.array(rope.short_factors, np.float32)}
    if rope.kind == "llama3":
        plain = Rope(RopeConfig("default", rope.dim, rope.theta)).frequencies
        return {"rope_freqs.weight": (plain / Rope(rope).frequencies).astype(np.float32)}
    return {}


def _feeds(config: ModelConfig, arch: str) -> Json:
    feeds = list(dict.fromkeys(layer.feed for layer in config.layers))
    dense = next((feed for feed in feeds if isinstance(feed, MLPConfig)), None)
    experts = next((feed for feed in feeds if isinstance(feed, ExpertsConfig)), None)
    found: Json = {}
    if experts is not None:
        inner = experts.expert.intermediate_size
        found = {"expert_count": experts.num_experts, "expert_used_count": experts.top_k}
        found["feed_forward_length"] = inner
        if arch not in ("llama", "granitemoe", "olmoe"):
            found["expert_feed_forward_length"] = inner
        if experts.shared is not None and arch != "glm4moe":
            found["expert_shared_feed_forward_length"] = experts.shared.intermediate_size
        if arch == "glm4moe":
            first = next(i for i, layer in enumerate(config.layers) if isinstance(layer.feed, ExpertsConfig))
            shared = experts.shared.intermediate_size if experts.shared is not None else 0
            found |= {
                "leading_dense_block_count": first,
                "expert_shared_count": shared // inner,
                "expert_weights_scale": experts.scale,
                "expert_weights_norm": experts.normalised,
                "expert_gating_func": _SIGMOID,
                "expert_group_count": experts.groups,
                "expert_group_used_count": experts.best_groups,
            }
    if dense is not None:
        found["feed_forward_length"] = dense.intermediate_size
    return found


def _mixers(config: ModelConfig, arch: str) -> Json:
    mixers = [layer.mixer for layer in config.layers]
    delta = next((each for each in mixers if isinstance(each, DeltaNetConfig)), None)
    conv = next((each for each in mixers if isinstance(each, ShortConvConfig)), None)
    if conv is not None:
        heads = [each.num_kv_heads if isinstance(each, AttentionConfig) else 0 for each in mixers]
        return {"shortconv.l_cache": conv.kernel, "attention.head_count_kv": heads}
    if delta is None:
        return {}
    found: Json = {
        "ssm.conv_kernel": delta.kernel,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.num_key_heads,
        "ssm.time_step_rank": delta.num_value_heads,
        "ssm.inner_size": delta.num_value_heads * delta.value_dim,
        "full_attention_interval": 1 + next(i for i, each in enumerate(mixers) if isinstance(each, AttentionConfig)),
    }
    if arch != "qwen3next":  # shares of time, height and width: a text's positions are the same in all three
        pairs = main_rope(config).dim // 2
        height = round(pairs * 11 / 32)
        found["rope.dimension_sections"] = [height, height, pairs - 2 * height, 0]
    return found


def _scales(config: ModelConfig, a: AttentionConfig, arch: str) -> Json:
    found: Json = {}
    if arch.startswith("granite"):
        found = {
            "attention.scale": a.scale,
            "embedding_scale": config.embedding_scale,
            "residual_scale": config.layers[0].residual_scale,
            "logit_scale": 1 / config.logit_scale,
        }
    if a.softcap:
        found["attn_logit_softcapping"] = a.softcap
    if config.logit_softcap:
        found["final_logit_softcapping"] = config.logit_softcap
    if a.clip:
        found["attention.clamp_kqv"] = a.clip
    if config.query_scaling is not None:
        found["attention.temperature_scale"] = config.query_scaling[0]
        found["attention.temperature_length"] = config.query_scaling[1]
    return found


def _gemma3(config: ModelConfig) -> Json:
    """Return the pattern of windows, where it is not llama.cpp's own, and their layers' rope."""
    found: Json = {}
    full = [i for i, each in enumerate(config.attentions) if not each.window]
    if full and full[0] != 5:
        found["attention.sliding_window_pattern"] = full[0] + 1
    local = next((each.rope for each in config.attentions if each.window), None)
    if local is not None and local.theta != 10000.0:
        found["rope.freq_base_swa"] = local.theta
    return found
