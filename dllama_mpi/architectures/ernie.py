"""ERNIE 4.5 dense: Llama that rotates neighbouring dimensions (transformers, models/ernie4_5)."""

from __future__ import annotations

import functools

from ..model.config import ModelConfig
from ..weights.mapped import Place, Ref
from .base import Architecture
from .keys import Keys
from .llama import dense


def _ernie(keys: Keys) -> ModelConfig:
    keys.assume(num_key_value_heads=2, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5)
    keys.assume(tie_word_embeddings=True, rope_theta=5e5)
    bias = keys.flag("use_bias")
    return dense(keys, None, bias, qkv_bias=bias, o_bias=bias)


@functools.lru_cache(maxsize=4)
def _halves(heads: int, dim: int) -> tuple[int, ...]:
    """Return the rows of heads whose pairs of neighbours become pairs of their two halves: q * k stays what it is."""
    order = [*range(0, dim, 2), *range(1, dim, 2)]
    return tuple(head * dim + row for head in range(heads) for row in order)


def _place(config: ModelConfig, name: str) -> Place:
    attention, part = config.attentions[0], name.split(".")[-2]
    heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}.get(part)
    return Ref(name, rows=_halves(heads, attention.head_dim) if heads else None)


FAMILIES = {"ernie4_5": Architecture(_ernie, _place, about="ERNIE 4.5 dense (0.3B)")}
