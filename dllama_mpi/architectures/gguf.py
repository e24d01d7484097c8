"""What a GGUF file's metadata say of a model, as the config.json that the same architecture has elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..model.config import ModelConfig
from ..model.tensors import HEAD, tensors
from ..weights.gguf_tensors import GgufTensors
from ..weights.mapped import MappedSource
from .base import held_formats
from .gguf_fields import Fields
from .gguf_places import SKIPPED, places
from .registry import read_model_config

Json = dict[str, Any]
_MOST_LAYERS = 1024


def _vocabulary(f: Fields) -> int:
    if not f.has("token_embd.weight"):
        raise ModelError(f"{f.where}: tensor token_embd.weight is missing; no language model, or get it again")
    return f.source.model.tensors["token_embd.weight"].shape[0]


def _layers(f: Fields) -> int:
    """Return the decoder's layers: those that predict further tokens come after them."""
    count, later = f.need("block_count"), f.one("nextn_predict_layers", 0)
    if not isinstance(count, int) or not isinstance(later, int) or not 0 <= later < count <= _MOST_LAYERS:
        said = f"{f.kind}.block_count is {str(count)[:30]} and nextn_predict_layers {str(later)[:30]}"
        raise ModelError(f"{f.where}: {said}; they must be whole numbers up to {_MOST_LAYERS}, the first one larger")
    return count - later


def _scaling(f: Fields) -> Json | None:
    if f.has("rope_freqs.weight"):  # Llama 3.1 and later
        return {"rope_type": "divided", "factors": f.factors("rope_freqs.weight")}
    kind = f.get("rope.scaling.type", "linear" if f.get("rope.scale_linear") else "none")
    if kind == "none":
        return None
    given: Json = {"rope_type": kind, "factor": f.get("rope.scaling.factor", f.get("rope.scale_linear"))}
    if kind == "linear":
        return None if given["factor"] in (None, 0, 0.0, 1.0) else given
    given["original_max_position_embeddings"] = f.get("rope.scaling.original_context_length")
    if kind == "yarn":
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            given[ours] = f.get(f"rope.scaling.{theirs}")
    return {key: value for key, value in given.items() if value is not None}


def _base(f: Fields, **more: Any) -> Json:
    """Return the keys that all config.json files have alike; more: others, which come first."""
    bias = f.has("blk.0.attn_q.bias") or f.has("blk.0.attn_qkv.bias")
    made: Json = {
        "vocab_size": _vocabulary(f),
        "hidden_size": f.need("embedding_length"),
        "num_hidden_layers": _layers(f),
        "num_attention_heads": f.need("attention.head_count"),
        "num_key_value_heads": more.get("num_key_value_heads", 0)
        or f.one("attention.head_count_kv", f.one("attention.head_count")),
        "head_dim": f.one("attention.key_length"),
        "intermediate_size": f.one("feed_forward_length"),
        "max_position_embeddings": f.get("context_length", 2048),
        "rms_norm_eps": f.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": f.get("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(f),
        "attention_bias": bias,
        "tie_word_embeddings": not f.has("output.weight"),
    }
    if f.get("attention.value_length", made["head_dim"]) != made["head_dim"]:
        raise ModelError(f"{f.where}: keys and values of different sizes are not supported")
    made |= more
    return {key: value for key, value in made.items() if value is not None}


def _without(config: Json, *names: str) -> Json:
    return {key: value for key, value in config.items() if key not in names}


def _experts(f: Fields, count: str = "num_experts", size: str = "moe_intermediate_size") -> Json:
    return {
        count: f.need("expert_count"),
        "num_experts_per_tok": f.need("expert_used_count"),
        size: f.one("expert_feed_forward_length"),
    }


def _partial(f: Fields, config: Json) -> Json:
    """Return the part of a head that is rotated."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {"partial_rotary_factor": f.get("rope.dimension_count", dim) / dim}


def _llama(f: Fields) -> Json:
    if f.get("expert_count", 0):
        experts = _without(_experts(f, "num_local_experts"), "moe_intermediate_size")
        return {"model_type": "mixtral", **_without(_base(f, **experts), "attention_bias")}
    return _base(f, model_type="llama", mlp_bias=f.has("blk.0.ffn_gate.bias"))


def _qwen2(f: Fields) -> Json:
    return _without(_base(f, model_type="qwen2"), "attention_bias")


def _qwen3(f: Fields) -> Json:
    return _base(f, model_type="qwen3")


def _qwen2moe(f: Fields) -> Json:
    shared = f.one("expert_shared_feed_forward_length", f.one("feed_forward_length"))
    more = {"shared_expert_intermediate_size": shared, "norm_topk_prob": False, **_experts(f)}
    return _without(_base(f, model_type="qwen2_moe", **more), "attention_bias")


def _qwen3moe(f: Fields) -> Json:
    return _base(f, model_type="qwen3_moe", norm_topk_prob=True, **_experts(f))


def _gemma_scale(f: Fields, layers: int) -> Json:
    """Return what attention is scaled by: of the largest of the family hidden size over heads, else a head's size."""
    whole = f.need("embedding_length") // f.need("attention.head_count")
    return {"query_pre_attn_scalar": whole if _layers(f) == layers else f.need("attention.key_length")}


def _gemma2(f: Fields) -> Json:
    more = {
        "attn_logit_softcapping": f.get("attn_logit_softcapping"),
        "final_logit_softcapping": f.get("final_logit_softcapping"),
        "sliding_window": f.get("attention.sliding_window"),
        **_gemma_scale(f, 46),
    }
    return _base(f, model_type="gemma2", **more)


def _gemma3(f: Fields) -> Json:
    more = {
        "sliding_window": f.get("attention.sliding_window"),
        "sliding_window_pattern": f.get("attention.sliding_window_pattern"),
        "rope_local_base_freq": f.get("rope.freq_base_swa", 10000.0),
        "rope_theta": f.get("rope.freq_base", 1e6),
        "final_logit_softcapping": f.get("final_logit_softcapping"),
        **_gemma_scale(f, 62),
    }
    return _base(f, model_type="gemma3_text", **more)


def _phi3(f: Fields) -> Json:
    made = _base(f, model_type="phi3", sliding_window=f.get("attention.sliding_window"))
    made |= _partial(f, made)
    if f.has("rope_factors_long.weight") and f.has("rope_factors_short.weight"):
        original = f.get("rope.scaling.original_context_length", made["max_position_embeddings"])
        made["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": f.factors("rope_factors_short.weight"),
            "long_factor": f.factors("rope_factors_long.weight"),
        }
        if f.get("rope.scaling.attn_factor"):
            made["rope_scaling"]["attention_factor"] = f.get("rope.scaling.attn_factor")
        made["original_max_position_embeddings"] = original
    return _without(made, "attention_bias")


def _granite(f: Fields) -> Json:
    more = {
        "attention_multiplier": f.get("attention.scale"),
        "embedding_multiplier": f.get("embedding_scale"),
        "residual_multiplier": f.get("residual_scale"),
        "logits_scaling": f.get("logit_scale"),
    }
    if f.get("expert_count", 0):
        return _base(
            f, model_type="granitemoe", **more, **_without(_experts(f, "num_local_experts"), "moe_intermediate_size")
        )
    return _base(f, model_type="granite", mlp_bias=f.has("blk.0.ffn_gate.bias"), **more)


def _smollm3(f: Fields) -> Json:
    return _base(f, model_type="smollm3", no_rope_layer_interval=4)


def _olmo2(f: Fields) -> Json:
    window = f.get("attention.sliding_window")
    return _base(f, model_type="olmo3" if window else "olmo2", sliding_window=window)


def _olmoe(f: Fields) -> Json:
    experts = _without(_experts(f), "moe_intermediate_size")
    return _base(f, model_type="olmoe", norm_topk_prob=False, clip_qkv=f.get("attention.clamp_kqv"), **experts)


def _mistral3(f: Fields) -> Json:
    made = _without(_base(f, model_type="ministral3"), "attention_bias", "rope_scaling")
    scaling = _scaling(f) or {"rope_type": "default"}
    if scaling["rope_type"] == "yarn":
        scaling |= {"mscale": 1.0, "mscale_all_dim": f.get("rope.scaling.yarn_log_multiplier", 1.0)}
    beta = f.get("attention.temperature_scale")
    if beta:
        original = f.get("attention.temperature_length", f.get("rope.scaling.original_context_length", 16384))
        scaling |= {"llama_4_scaling_beta": beta, "original_max_position_embeddings": original}
    return {**_without(made, "rope_theta"), "rope_parameters": {**scaling, "rope_theta": made["rope_theta"]}}


def _seed_oss(f: Fields) -> Json:
    return _base(f, model_type="seed_oss", attention_out_bias=f.has("blk.0.attn_output.bias"))


def _ernie(f: Fields) -> Json:
    return _without(_base(f, model_type="ernie4_5", use_bias=f.has("blk.0.attn_q.bias")), "attention_bias")


def _hunyuan(f: Fields) -> Json:
    return _base(f, model_type="hunyuan_v1_dense")


def _gpt_oss(f: Fields) -> Json:
    made = _base(f, model_type="gpt_oss", sliding_window=f.get("attention.sliding_window"))
    made |= _experts(f, "num_local_experts", "intermediate_size")
    scaling = made.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling["truncate"] = False
    elif scaling is None:
        made["rope_scaling"] = {"rope_type": "default"}
    return made


def _glm4moe(f: Fields) -> Json:
    made = _base(f, model_type="glm4_moe", use_qk_norm=f.has("blk.0.attn_q_norm.weight"))
    more = {
        "n_shared_experts": f.get("expert_shared_count", 1),
        "first_k_dense_replace": f.get("leading_dense_block_count", 0),
        "routed_scaling_factor": f.get("expert_weights_scale", 1.0),
        "norm_topk_prob": f.get("expert_weights_norm", True),
        "n_group": f.get("expert_group_count", 1),
        "topk_group": f.get("expert_group_used_count", 1),
        "num_nextn_predict_layers": f.get("nextn_predict_layers", 0),
    }
    return {**made, **_experts(f, "n_routed_experts"), **more, **_partial(f, made)}


def _delta(f: Fields, kind: str) -> Json:
    made = _base(f, model_type=kind)
    inner, heads = f.need("ssm.inner_size"), f.need("ssm.time_step_rank")
    made |= {
        "linear_num_key_heads": f.need("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": f.need("ssm.state_size"),
        "linear_value_head_dim": inner / heads if heads else 0,
        "linear_conv_kernel_dim": f.need("ssm.conv_kernel"),
        "full_attention_interval": f.get("full_attention_interval", 4),
        **_partial(f, made),
    }
    if f.get("expert_count", 0):
        made |= _experts(f)
        made["shared_expert_intermediate_size"] = f.one("expert_shared_feed_forward_length")
    return {key: value for key, value in made.items() if value is not None}


def _lfm2(f: Fields) -> Json:
    heads = f.each("attention.head_count_kv", _layers(f))
    return _without(
        _base(
            f,
            model_type="lfm2",
            num_key_value_heads=max(heads),
            layer_types=["full_attention" if each else "conv" for each in heads],
            conv_L_cache=f.need("shortconv.l_cache"),
            block_auto_adjust_ff_dim=False,
            norm_eps=f.need("attention.layer_norm_rms_epsilon"),
        ),
        "attention_bias",
        "rms_norm_eps",
    )


@dataclass(frozen=True)
class GgufFamily:
    """An architecture of GGUF files.

    Attributes:
        read: what its config.json would be. permuted: whether pairs of dimensions that are rotated are neighbours.
    """

    read: Callable[[Fields], Json]
    permuted: bool = False


FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily(_llama, permuted=True),
    "mistral3": GgufFamily(_mistral3, permuted=True),
    "granite": GgufFamily(_granite, permuted=True),
    "granitemoe": GgufFamily(_granite, permuted=True),
    "smollm3": GgufFamily(_smollm3, permuted=True),
    "ernie4_5": GgufFamily(_ernie, permuted=True),
    "qwen2": GgufFamily(_qwen2),
    "qwen3": GgufFamily(_qwen3),
    "qwen2moe": GgufFamily(_qwen2moe),
    "qwen3moe": GgufFamily(_qwen3moe),
    "qwen3next": GgufFamily(lambda f: _delta(f, "qwen3_next")),
    "qwen35": GgufFamily(lambda f: _delta(f, "qwen3_5_text")),
    "qwen35moe": GgufFamily(lambda f: _delta(f, "qwen3_5_moe_text")),
    "gemma2": GgufFamily(_gemma2),
    "gemma3": GgufFamily(_gemma3),
    "phi3": GgufFamily(_phi3),
    "olmo2": GgufFamily(_olmo2),
    "olmoe": GgufFamily(_olmoe),
    "seed_oss": GgufFamily(_seed_oss),
    "hunyuan-dense": GgufFamily(_hunyuan),
    "gpt-oss": GgufFamily(_gpt_oss),
    "glm4moe": GgufFamily(_glm4moe),
    "lfm2": GgufFamily(_lfm2),
}


def _family(f: Fields) -> GgufFamily:
    if not isinstance(f.kind, str) or f.kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{f.where}: architecture {str(f.kind)[:60]!r} is not supported; supported are {known}")
    return FAMILIES[f.kind]


def gguf_json(source: GgufTensors) -> Json:
    """Return what a file's metadata say of a model as a config.json.

    Raises:
        ModelError: an architecture that is not known, or metadata that are missing or cannot be.
    """
    f = Fields(source)
    family = _family(f)
    try:
        return family.read(f)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"{f.where}: metadata that do not fit the architecture {f.kind}: {error}") from None


def gguf_config(source: GgufTensors) -> ModelConfig:
    """Return the same, read.

    Raises:
        ModelError: as there, or a value that cannot be.
    """
    return read_model_config(gguf_json(source), str(source.folder))


def gguf_source(source: GgufTensors, config: ModelConfig) -> MappedSource:
    """Return a file's tensors under the table's names, each matrix in the format that keeps what is there.

    A file of plain numbers alone says nothing about formats. In one that is quantised, matrices of plain numbers stay
    float16.
    """
    f = Fields(source)
    _check_sizes(source, config)
    found = places(config, set(source.names()), _family(f).permuted)
    if config.tie_word_embeddings:
        del found[HEAD]
    layers = config.num_layers
    later = [rf"^blk\.{layer}\." for layer in range(layers, int(f.need("block_count")))]
    return MappedSource(source, found, [*SKIPPED, *later], held_formats(config, found, source.format_of))


def _check_sizes(source: GgufTensors, config: ModelConfig) -> None:
    """Check that no tensor is larger than all of the files', before anything is made of its size.

    Raises:
        ModelError: one is.
    """
    most = sum(math.prod(info.shape) for info in source.model.tensors.values())
    for spec in tensors(config):
        if spec.size > most:
            shape = " x ".join(map(str, spec.shape))
            raise ModelError(
                f"{source.folder}: metadata imply {spec.name} of {shape}, and all tensors have {most} values together"
            )
