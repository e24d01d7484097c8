"""Shapes of well-known models, to measure their speed without their weights: their config.json's, shortened."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _config(
    model_type: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int,
    positions: int, rope_theta: float, tied: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6 if model_type.startswith(("qwen", "gemma")) else 1e-5,
        **more,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


_DELTA_NETS: dict[str, Any] = {
    "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "partial_rotary_factor": 0.25,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _config("llama", 256, 768, 4, 8, 4, 32, 2048, 2048, 1e4),
    "tiny-sparse": _config(
        "qwen3_moe", 256, 768, 4, 8, 4, 32, 2048, 2048, 1e4,
        moe_intermediate_size=256, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, mlp_only_layers=[0],
    ),
    "tiny-state": _config(
        "qwen3_next", 256, 768, 4, 8, 4, 32, 2048, 2048, 1e4,
        linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=32, linear_value_head_dim=32,
        moe_intermediate_size=256, shared_expert_intermediate_size=256, num_experts=16, num_experts_per_tok=4,
        mlp_only_layers=[0],
    ),
    "tinyllama-1.1b": _config("llama", 2048, 5632, 22, 32, 4, 64, 32000, 2048, 1e4),
    "llama3.2-1b": _config(
        "llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, True, rope_scaling=_llama3_rope(32.0)
    ),
    "llama3.2-3b": _config(
        "llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, True, rope_scaling=_llama3_rope(32.0)
    ),
    "llama3.1-8b": _config(
        "llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, rope_scaling=_llama3_rope(8.0)
    ),
    "llama3.1-70b": _config(
        "llama", 8192, 28672, 80, 64, 8, 128, 128256, 131072, 5e5, rope_scaling=_llama3_rope(8.0)
    ),
    "gemma3-4b": {"model_type": "gemma3", "text_config": _config(
        "gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, 131072, 1e6, True,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window=1024,
    )},
    "qwen3-0.6b": _config("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, 1e6, True),
    "qwen3-4b": _config("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 40960, 1e6, True),
    "qwen2.5-7b": _config("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 32768, 1e6),
    "mistral-7b": _config("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, sliding_window=None),
    "qwen3-30b-a3b": _config(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151936, 40960, 1e6,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "gpt-oss-20b": _config(
        "gpt_oss", 2880, 2880, 24, 64, 8, 64, 201088, 131072, 150000, num_local_experts=32, num_experts_per_tok=4,
        sliding_window=128, swiglu_limit=7.0, initial_context_length=4096,
        rope_scaling={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                      "original_max_position_embeddings": 4096},
        quantization_config={"quant_method": "mxfp4"},
    ),
    "glm-4.5-air": _config(
        "glm4_moe", 4096, 10944, 46, 96, 8, 128, 151552, 131072, 1e6, attention_bias=True, n_routed_experts=128,
        n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1408, first_k_dense_replace=1,
        partial_rotary_factor=0.5, num_nextn_predict_layers=1,
    ),
    "qwen3.5-4b": _config("qwen3_5_text", 2560, 9216, 32, 16, 4, 256, 248320, 262144, 1e7, True, **_DELTA_NETS),
    "qwen3.5-35b-a3b": _config(
        "qwen3_5_moe_text", 2048, 512, 40, 16, 2, 256, 248320, 262144, 1e7, num_experts=256, num_experts_per_tok=8,
        moe_intermediate_size=512, shared_expert_intermediate_size=512, **_DELTA_NETS,
    ),
    "lfm2-1.2b": _config(
        "lfm2", 2048, 12288, 16, 32, 8, 64, 65536, 128000, 1e6, True, full_attn_idxs=[2, 5, 8, 10, 12, 14],
        block_ff_dim=12288, block_auto_adjust_ff_dim=True, block_multiple_of=256, conv_L_cache=3, norm_eps=1e-5,
    ),
}  # fmt: skip


def shape_config(name: str) -> dict[str, Any]:
    """Return the config.json values of a shape in `SHAPES`, or of its first N layers for "SHAPE:N".

    Raises:
        UsageError: no such shape, or not that many layers.
    """
    shape, colon, text = name.partition(":")
    if shape not in SHAPES:
        raise UsageError(f"{shape!r} is not a shape known here; known are {', '.join(SHAPES)}")
    config = SHAPES[shape]
    if not colon:
        return config
    most = config.get("text_config", config)["num_hidden_layers"]
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise UsageError(f"{name!r}: {shape} has {most} layers; give a number from 1 to {most} after the colon")
    return _first_layers(config, int(text), most)


def _first_layers(config: dict[str, Any], layers: int, most: int) -> dict[str, Any]:
    """Return a config cut to its first layers, and so what it lists layer by layer or by their numbers."""
    made = dict(config)
    for key, value in config.items():
        if key == "text_config":
            made[key] = _first_layers(value, layers, most)
        elif key == "num_hidden_layers":
            made[key] = layers
        elif isinstance(value, list) and key in ("full_attn_idxs", "mlp_only_layers"):
            made[key] = [layer for layer in value if layer < layers]
        elif isinstance(value, list) and len(value) == most:
            made[key] = value[:layers]
    return made
