"""HunYuan dense: Llama with norms of queries and keys after the rotation (transformers, models/hunyuan_v1_dense)."""

from __future__ import annotations

from ..model.config import ModelConfig
from ..model.rope import RopeConfig
from .base import Architecture, renamed
from .keys import Keys, attention_sizes
from .llama import dense
from .rope import rope_kind, scaling_of, whole_rope

# Of other models that share the class of configs, or of the tokenizer.
_UNREAD = ("cla_share_factor", "class_num", "dense_list", "eod_token_id", "im_start_id", "im_end_id", "im_newline_id",
           "mask_init_id", "org_vocab_size", "pad_id", "pool_type", "text_start_id", "text_end_id")  # fmt: skip


def _rope(keys: Keys, dim: int) -> RopeConfig:
    """Return the rope: "dynamic" with alpha is NTK scaling of the base by a fixed factor, whatever else it names."""
    given = dict(scaling_of(keys))
    alpha = Keys({"alpha": given.pop("alpha", None)}, f"{keys.where}: rope scaling").number("alpha", 0.0)
    if alpha == 0:
        return whole_rope(keys, dim, given)
    good = rope_kind(given) == "dynamic" and 0 < alpha <= 1e9 and dim > 2
    keys.require(good, "rope_scaling", "dynamic, with alpha above 0 and to 1e9")
    theta = given.get("rope_theta", keys.get("rope_theta"))
    plain = whole_rope(keys, dim, {} if theta is None else {"rope_theta": theta})
    return whole_rope(keys, dim, {"rope_theta": plain.theta * alpha ** (dim / (dim - 2))})


def _hunyuan(keys: Keys) -> ModelConfig:
    keys.assume(rms_norm_eps=1e-5)
    dim, bias = attention_sizes(keys)[2], keys.flag("attention_bias")
    keys.refuse(use_qk_norm=True, use_rotary_pos_emb=True, norm_type="rms", num_experts=1, attention_head_dim=dim)
    keys.ignore(*_UNREAD)
    ropes = [_rope(keys, dim)] * keys.count("num_hidden_layers")
    return dense(keys, ropes=ropes, qkv_bias=bias, o_bias=bias, qk_norm="head", norm_last=True)


_place = renamed({"q_norm": "query_layernorm", "k_norm": "key_layernorm"})
FAMILIES = {"hunyuan_v1_dense": Architecture(_hunyuan, _place, about="HunYuan dense (0.5B to 7B), HunYuan-MT")}
