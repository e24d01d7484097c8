"""GLM-4.5: a router of sigmoids with a correction and groups, a shared expert, a part of each head rotated.

After transformers' models/glm4_moe; groups: arXiv:2412.19437.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import ModelError
from ..model.config import ExpertsConfig, ModelConfig
from .base import Architecture
from .keys import Keys, attention_sizes
from .llama import dense
from .rope import read_rope
from .sparse import each_expert, expert_counts, gated_mlp, no_windows, with_feeds


def _glm4_moe(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=8, intermediate_size=10944, moe_intermediate_size=1408, num_experts_per_tok=8)
    keys.assume(max_position_embeddings=131072, rms_norm_eps=1e-5)
    keys.refuse(scoring_func="sigmoid", topk_method="noaux_tc", sliding_window=None)
    no_windows(keys)
    layers, norm = keys.count("num_hidden_layers"), "head" if keys.flag("use_qk_norm") else ""
    rope = read_rope(keys, attention_sizes(keys)[2], partial=0.5)
    made = dense(keys, ropes=[rope] * layers, qkv_bias=keys.flag("attention_bias"), qk_norm=norm)
    first, experts = keys.count("first_k_dense_replace", 1, least=0), _experts(keys)
    feeds = [gated_mlp(keys, "intermediate_size") if i < first else experts for i in range(layers)]
    name = "num_nextn_predict_layers" if "num_nextn_predict_layers" in keys else "num_mtp_layers"
    return replace(with_feeds(made, feeds), later_layers=keys.count(name, 1, least=0, most=64))


def _experts(keys: Keys) -> ExpertsConfig:
    count, chosen = expert_counts(keys, 128, ("n_routed_experts", "num_local_experts"))
    groups = keys.count("n_group", 1)
    best = keys.count("topk_group", 1, most=groups)
    if count % groups or count // groups < 2 or chosen > best * count // groups:
        raise ModelError(
            f"{keys.where}: {count} experts do not go with n_group {groups}, topk_group {best} and"
            f" num_experts_per_tok {chosen}: groups are equal, of two or more, the best have as many as are chosen"
        )
    return ExpertsConfig(
        gated_mlp(keys, "moe_intermediate_size"),
        count,
        chosen,
        scoring="sigmoid",
        normalised=keys.flag("norm_topk_prob", True),
        scale=keys.number("routed_scaling_factor", 1.0),
        correction=True,
        groups=groups,
        best_groups=best,
        shared=gated_mlp(keys, "moe_intermediate_size", keys.count("n_shared_experts", 1, most=1024)),
    )


_NAMES = {
    ".mlp.router.correction": ".mlp.gate.e_score_correction_bias",
    ".mlp.router.": ".mlp.gate.",
    ".mlp.shared.": ".mlp.shared_experts.",
}
FAMILIES = {"glm4_moe": Architecture(_glm4_moe, each_expert(_NAMES), about="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7")}
