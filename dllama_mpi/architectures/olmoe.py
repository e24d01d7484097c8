"""OLMoE: norms of queries and keys over all heads at once, and a limit on what is projected.

After transformers' models/olmoe.
"""

from __future__ import annotations

from ..model.config import ExpertsConfig, ModelConfig
from .base import Architecture
from .keys import Keys, attention_sizes
from .llama import dense
from .sparse import each_expert, expert_counts, gated_mlp, no_windows, with_feeds


def _olmoe(keys: Keys) -> ModelConfig:
    keys.assume(intermediate_size=2048, num_experts_per_tok=8, max_position_embeddings=4096, rms_norm_eps=1e-5)
    keys.refuse(sliding_window=None)
    no_windows(keys)
    heads, _, dim = attention_sizes(keys)
    keys.require(heads * dim == keys.count("hidden_size"), "head_dim", "hidden_size over num_attention_heads")
    bias, clip = keys.flag("attention_bias"), keys.number("clip_qkv", above=0.0) if "clip_qkv" in keys else 0.0
    made = dense(keys, qkv_bias=bias, o_bias=bias, qk_norm="whole", clip=clip)
    experts = ExpertsConfig(
        gated_mlp(keys, "intermediate_size"), *expert_counts(keys, 64), normalised=keys.flag("norm_topk_prob")
    )
    return with_feeds(made, [experts] * made.num_layers)


FAMILIES = {"olmoe": Architecture(_olmoe, each_expert({".mlp.router.": ".mlp.gate."}), about="OLMoE 1B-7B")}
