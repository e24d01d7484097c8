"""One frozen `ModelConfig` from a Hugging Face config.json of either generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .rope import RopeConfig

Json = Mapping[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a dense decoder-only transformer.

    Attributes:
        model_type: the architecture's name in config.json.
        windows: for each layer, the positions a token sees (itself included), or 0 for all.
        qkv_bias, o_bias, mlp_bias: whether those linear layers have biases.
        qk_norm: whether queries and keys pass an RMSNorm over each head.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    windows: tuple[int, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def parameters(self) -> int:
        """Number of weights, counting a tied embedding once."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * q + 2 * kv) + self.qkv_bias * (q + 2 * kv) + self.o_bias * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + norms) + self.hidden_size + embeddings

    @staticmethod
    def load(folder: Path) -> ModelConfig:
        """Read `folder`/config.json.

        Raises:
            ModelError: the folder or file is missing, or describes a model this program does not know.
        """
        return ModelConfig.from_hf(read_config(folder), str(folder / "config.json"))

    @staticmethod
    def from_hf(config: Json, where: str = "config.json") -> ModelConfig:
        """Read a parsed config.json; `where` names it in errors.

        Raises:
            ModelError: an unknown architecture, a missing key, or a value that cannot be.
        """
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise ModelError(f"{where}: model_type {kind!r} is not supported; supported are {known}")
        quantised = config.get("quantization_config")
        if quantised is not None:
            method = quantised.get("quant_method", "?") if isinstance(quantised, Mapping) else quantised
            raise ModelError(f"{where}: weights quantised by {method!r} cannot be read; use the BF16, F16 or F32 model")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ModelError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; supported is silu")
        config = {**_DEFAULTS.get(kind, {}), **config}
        try:
            made = _common(config, where, **ARCHITECTURES[kind](config))
        except ZeroDivisionError:
            raise ModelError(f"{where}: num_attention_heads is 0; it must be at least 1") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"{where}: {what}") from None
        _check(made, where)
        return made


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a model directory.

    Raises:
        ModelError: no such directory, no config.json in it, or not JSON.
    """
    path = folder / "config.json"
    if not folder.exists():
        raise ModelError(f"{folder}: no such model directory; give --model a folder with config.json and *.safetensors")
    if not path.is_file():
        raise ModelError(f"{folder}: not a model directory (no config.json); give a folder as Hugging Face lays it out")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ModelError(f"{path}: not a JSON object")
    return parsed


def _common(config: Json, where: str, *, windows: tuple[int, ...] | None = None, **extra: Any) -> ModelConfig:
    heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    head_dim = config.get("head_dim") or int(config["hidden_size"]) // heads
    positions = int(config.get("max_position_embeddings", 2048))
    return ModelConfig(
        model_type=config["model_type"],
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        max_position_embeddings=positions,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=RopeConfig.from_hf(config, where, int(head_dim), positions),
        windows=windows or (0,) * layers,
        **extra,
    )


def _check(c: ModelConfig, where: str) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    ):
        if getattr(c, name) < 1:
            raise ModelError(f"{where}: {name} is {getattr(c, name)}; it must be at least 1")
    if c.num_heads % c.num_kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {c.num_heads} is not a multiple of num_key_value_heads {c.num_kv_heads}"
        )
    if c.head_dim % 2:
        raise ModelError(f"{where}: head_dim {c.head_dim} is odd; rotary embedding needs pairs")
    if len(c.windows) != c.num_layers:
        raise ModelError(f"{where}: layer_types has {len(c.windows)} entries for {c.num_layers} layers")


def _layer_windows(config: Json) -> tuple[int, ...]:
    """Return Qwen's windows a layer: layer_types where given, else all layers from max_window_layers on."""
    layers, window = int(config["num_hidden_layers"]), config.get("sliding_window", 4096)
    if not config.get("use_sliding_window", False) or not window:
        return (0,) * layers
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= int(config.get("max_window_layers", 28)) else "full_attention"
        for i in range(layers)
    ]
    return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)


def _llama(config: Json) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: Json) -> dict[str, Any]:
    if config.get("layer_types"):
        raise ValueError("layer_types is not supported for mistral")
    return {"windows": (int(config.get("sliding_window", 4096) or 0),) * int(config["num_hidden_layers"])}


def _qwen2(config: Json) -> dict[str, Any]:
    return {"windows": _layer_windows(config), "qkv_bias": True}


def _qwen3(config: Json) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"windows": _layer_windows(config), "qkv_bias": bias, "o_bias": bias, "qk_norm": True}


# What a missing key means, where the architectures differ (transformers' configuration classes).
_DEFAULTS: dict[str, Json] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}

# The next dense architecture is an entry here: what its config says beyond the common keys.
ARCHITECTURES: dict[str, Callable[[Json], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
