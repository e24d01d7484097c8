"""Granite-MoE: Granite with experts, whose gate and up are one tensor (transformers, models/granitemoe)."""

from __future__ import annotations

from ..model.config import ExpertsConfig, ModelConfig
from ..weights.mapped import Place, Ref
from .base import Architecture
from .granite import granite
from .keys import Keys
from .sparse import expert_counts, experts_of, gated_mlp, no_windows, with_feeds


def _granitemoe(keys: Keys) -> ModelConfig:
    keys.assume(intermediate_size=11008, num_experts_per_tok=2)
    keys.refuse(shared_intermediate_size=0, sliding_window=None)
    no_windows(keys)
    made, counts = granite(keys), expert_counts(keys, 8, ("num_local_experts",))
    return with_feeds(made, [ExpertsConfig(gated_mlp(keys, "intermediate_size"), *counts)] * made.num_layers)


def _place(config: ModelConfig, name: str) -> Place:
    layer, _, part = name.partition(".mlp.")
    if not part:
        return Ref(name)
    if part == "router.weight":
        return Ref(f"{layer}.block_sparse_moe.router.layer.weight")
    if part == "experts.down_proj.weight":
        return Ref(f"{layer}.block_sparse_moe.output_linear.weight")
    inner = experts_of(config, name).expert.intermediate_size
    rows = slice(0, inner) if part == "experts.gate_proj.weight" else slice(inner, None)
    return Ref(f"{layer}.block_sparse_moe.input_linear.weight", rows=rows)


FAMILIES = {"granitemoe": Architecture(_granitemoe, _place, about="Granite 3.0, 3.1 1B-A400M, 3B-A800M")}
