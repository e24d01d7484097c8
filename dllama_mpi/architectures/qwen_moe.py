"""Qwen3-MoE and Qwen2-MoE: experts in all layers or in some; the latter has one more that all tokens use.

After transformers' models/qwen3_moe and qwen2_moe.
"""

from __future__ import annotations

from ..model.config import ExpertsConfig, ModelConfig
from .base import Architecture
from .keys import FULL, SLIDING, Keys, layer_windows, window_of
from .llama import dense
from .sparse import each_expert, expert_counts, gated_mlp, no_windows, sparse_layers, with_feeds


def _qwen3_moe(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=4, intermediate_size=6144, moe_intermediate_size=768, num_experts_per_tok=8)
    keys.assume(max_position_embeddings=32768, sliding_window=4096)
    keys.refuse(qkv_bias=False, shared_expert_intermediate_size=0)
    keys.ignore("max_window_layers", "sliding_window")
    no_windows(keys)
    # One window for all layers, whatever max_window_layers says.
    window = window_of(keys) if keys.flag("use_sliding_window") else 0
    bias, layers = keys.flag("attention_bias"), keys.count("num_hidden_layers")
    made = dense(keys, [window] * layers, qkv_bias=bias, o_bias=bias, qk_norm="head")
    experts = ExpertsConfig(
        gated_mlp(keys, "moe_intermediate_size"), *expert_counts(keys, 128), normalised=keys.flag("norm_topk_prob")
    )
    return with_feeds(made, sparse_layers(keys, gated_mlp(keys, "intermediate_size"), experts))


def _qwen2_moe(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=16, intermediate_size=5632, moe_intermediate_size=1408, num_experts_per_tok=4)
    keys.assume(max_position_embeddings=32768, sliding_window=4096, shared_expert_intermediate_size=5632)
    keys.refuse(attention_bias=False)
    made = dense(keys, _qwen2_windows(keys), qkv_bias=keys.flag("qkv_bias", True))
    experts = ExpertsConfig(
        gated_mlp(keys, "moe_intermediate_size"),
        *expert_counts(keys, 60),
        normalised=keys.flag("norm_topk_prob"),
        shared=gated_mlp(keys, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return with_feeds(made, sparse_layers(keys, gated_mlp(keys, "intermediate_size"), experts))


def _qwen2_windows(keys: Keys) -> list[int]:
    """Return each layer's window: by layer_types where given, else that of even layers below max_window_layers."""
    layers, last = keys.count("num_hidden_layers"), keys.count("max_window_layers", 28, least=0)
    keys.ignore("sliding_window")
    if not keys.flag("use_sliding_window"):
        no_windows(keys)
        return [0] * layers
    kinds = [FULL if i % 2 or i >= last else SLIDING for i in range(layers)]
    return layer_windows(keys, window_of(keys), kinds)


_ROUTER = {".mlp.router.": ".mlp.gate."}
_SHARED = {".mlp.shared_gate.": ".mlp.shared_expert_gate.", ".mlp.shared.": ".mlp.shared_expert."}
FAMILIES = {
    "qwen3_moe": Architecture(_qwen3_moe, each_expert(_ROUTER), about="Qwen3 30B-A3B, 235B-A22B, Qwen3-Coder"),
    "qwen2_moe": Architecture(_qwen2_moe, each_expert(_ROUTER | _SHARED), about="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B"),
}
