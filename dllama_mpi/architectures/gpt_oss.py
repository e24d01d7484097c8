"""gpt-oss: sinks, windows in every other layer, biases everywhere, and experts published in MXFP4.

After transformers' models/gpt_oss and integrations/mxfp4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..model.config import ExpertsConfig, MLPConfig, ModelConfig
from ..model.rope import RopeConfig
from ..weights.mapped import Mxfp4, Place, Ref
from .base import Architecture
from .keys import FULL, SLIDING, Keys, attention_sizes, layer_types, layer_windows, window_of
from .llama import dense
from .rope import whole_rope
from .sparse import expert_counts, with_feeds

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def _gpt_oss(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=8, head_dim=64, intermediate_size=2880, num_experts_per_tok=4, sliding_window=128)
    keys.assume(max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=150000.0)
    keys.choice("hidden_act", "silu", {"silu": "silu"})  # what files call it; it is a clamped one
    bias, counts = keys.flag("attention_bias", True), expert_counts(keys, 128)
    keys.refuse(experts_per_token=counts[1])
    ropes = [_rope(keys)] * keys.count("num_hidden_layers")
    made = dense(keys, _windows(keys), ropes=ropes, qkv_bias=bias, o_bias=bias, sinks=True)
    limit, alpha = keys.number("swiglu_limit", 7.0, above=0.0), keys.number("swiglu_alpha", 1.702)
    expert = MLPConfig(keys.count("intermediate_size"), "clamped_swiglu", bias=True, limit=limit, alpha=alpha)
    quantised = keys.get("quantization_config")
    is_mxfp4 = isinstance(quantised, Mapping) and quantised.get("quant_method") == "mxfp4"
    published = "mxfp4" if is_mxfp4 else ""
    experts = ExpertsConfig(expert, *counts, router_bias=True, published=published)
    return with_feeds(made, [experts] * made.num_layers)


def _rope(keys: Keys) -> RopeConfig:
    """Return the rope: YaRN where the file says nothing."""
    given = None if "rope_scaling" in keys or "rope_parameters" in keys else _YARN
    rope = whole_rope(keys, attention_sizes(keys)[2], given)
    if rope.kind == "default":
        keys.ignore("initial_context_length")
    else:
        keys.refuse(initial_context_length=rope.original_positions)
    return rope


def _windows(keys: Keys) -> list[int]:
    """Return each layer's window: by layer_types, or that of even layers."""
    kinds = layer_types(keys, [FULL if i % 2 else SLIDING for i in range(keys.count("num_hidden_layers"))])
    size = window_of(keys)
    keys.require(size > 0 or SLIDING not in kinds, "sliding_window", "the size of the windows that layer_types names")
    return layer_windows(keys, size, kinds)


def _place(config: ModelConfig, name: str) -> Place | Sequence[Place]:
    """Return where a tensor is; rows of gate and up alternate, and those of values, not of MXFP4, are columns there."""
    folder, _, part = name.partition(".experts.")
    if not part:
        return Ref(name)
    which, kind = part.split(".")
    rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2), "down_proj": slice(None)}[which]
    theirs = f"{folder}.experts." + ("down_proj" if which == "down_proj" else "gate_up_proj")
    if kind == "bias":
        return Ref(f"{theirs}_bias", rows=rows, stacked=True)
    return Mxfp4(f"{theirs}_blocks", f"{theirs}_scales", rows), Ref(theirs, rows=rows, transposed=True)


FAMILIES = {"gpt_oss": Architecture(_gpt_oss, _place, quantised=("mxfp4",), about="gpt-oss-20b, gpt-oss-120b")}
