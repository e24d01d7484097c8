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
        "rms_norm_eps": 1e-6 if model_type.startswith("qwen") else 1e-5,
        **more,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _config("llama", 256, 768, 4, 8, 4, 32, 2048, 2048, 1e4),
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
    "qwen3-0.6b": _config("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, 1e6, True),
    "qwen3-4b": _config("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 40960, 1e6, True),
    "qwen2.5-7b": _config("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 32768, 1e6),
    "mistral-7b": _config("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, sliding_window=None),
}  # fmt: skip


def shape_config(name: str) -> dict[str, Any]:
    """Return the config.json values of a shape in `SHAPES`.

    Raises:
        UsageError: no such shape.
    """
    if name not in SHAPES:
        raise UsageError(f"{name!r} is not a shape known here; known are {', '.join(SHAPES)}")
    return SHAPES[name]
