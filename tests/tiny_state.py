"""Tiny random models of families with recurrent state, in the manner of ``tests.tiny_models``.

Qwen3-Next and Qwen3.5 (three layers of the gated delta net to one of gated attention) and LFM2 (short convolutions and
attention), each scaled down from the config.json of a published model. The multimodal ones hold a whole tiny vision
tower, and those whose published files do, tensors of multi-token prediction: nothing may read either.
"""

from __future__ import annotations

from typing import Any

from tests.tiny_models.case import Case, Config
from tests.tiny_state_tensors import MTP_FAMILIES as MTP_FAMILIES  # enters the families' tensors

LINEAR, FULL, CONV = "linear_attention", "full_attention", "conv"


def _without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def _qwen3_next(**changes: Any) -> Config:
    """Return a config in the manner of Qwen3-Next-80B-A3B-Instruct."""
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 150,
        "decoder_sparse_step": 1,
        "eos_token_id": 152,
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 256,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.57.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 156,
    } | changes


def _qwen3_5_text(**changes: Any) -> Config:
    """Return a text config in the manner of Qwen3.5-4B."""
    layers = changes.get("num_hidden_layers", 4)
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": 148,
        "dtype": "bfloat16",
        "eos_token_id": 148,
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 112,
        "layer_types": [FULL if layer % 4 == 3 else LINEAR for layer in range(layers)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 256,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 160,
    } | changes


_SPARSE: Config = {
    # What a text config in the manner of Qwen3.5-35B-A3B has and has not.
    "dtype": "bfloat16",
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 32,
    "tie_word_embeddings": False,
}


def _multimodal(model_type: str, architecture: str, text: Config) -> Config:
    """Return a multimodal config in the manner of Qwen3.5's, around a text config."""
    return {
        "architectures": [architecture],
        "dtype": "bfloat16",
        "image_token_id": 156,
        "model_type": model_type,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 157,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 16,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 24,
            "model_type": model_type,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 154,
        "vision_start_token_id": 153,
    }


def _lfm2(**changes: Any) -> Config:
    """Return a config in the manner of LFM2-1.2B, most of whose keys mean nothing."""
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "block_auto_adjust_ff_dim": True,
        "block_dim": 64,
        "block_ff_dim": 200,
        "block_ffn_dim_multiplier": 1.0,
        "block_mlp_init_scale": 1.0,
        "block_multiple_of": 16,
        "block_norm_eps": 1e-05,
        "block_out_init_scale": 1.0,
        "block_use_swiglu": True,
        "block_use_xavier_init": True,
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": 64,
        "conv_dim_out": 64,
        "conv_use_xavier_init": True,
        "eos_token_id": 7,
        "full_attn_idxs": [2, 4],
        "hidden_size": 64,
        "initializer_range": 0.02,
        "max_position_embeddings": 256,
        "model_type": "lfm2",
        "norm_eps": 1e-05,
        "num_attention_heads": 4,
        "num_heads": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0",
        "use_cache": True,
        "use_pos_enc": True,
        "vocab_size": 144,
    } | changes


_QWEN3_5_GENERATION: Config = {
    "bos_token_id": 148,
    "do_sample": True,
    "eos_token_id": [150, 148],
    "pad_token_id": 148,
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.57.0.dev0",
}

_ALL_CASES = [
    Case("qwen3_next", _qwen3_next(), "F32", seed=22),
    # As many value heads as key heads, of other sizes and no multiples of 16; dense layers between sparse ones.
    Case(
        "qwen3_next_mixed",
        _without(
            _qwen3_next(
                attention_bias=True,
                decoder_sparse_step=2,
                layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL],
                linear_conv_kernel_dim=3,
                linear_key_head_dim=20,
                linear_num_key_heads=3,
                linear_num_value_heads=3,
                linear_value_head_dim=24,
                mlp_only_layers=[3],
                norm_topk_prob=False,
                num_experts_per_tok=2,
                num_hidden_layers=5,
                partial_rotary_factor=0.5,
                rope_theta=10000.0,
            ),
            "full_attention_interval",
        ),
        "F32",
        seed=2,
    ),
    Case(
        "qwen3_5",
        _multimodal("qwen3_5", "Qwen3_5ForConditionalGeneration", _qwen3_5_text()),
        "BF16",
        seed=2,
        shards=2,
        generation=_QWEN3_5_GENERATION,
    ),
    # A decoder by itself; as many value heads as key heads, as in Qwen3.5-2B. The recurrence is longer than the chunks
    # of 64 that transformers computes at once.
    Case(
        "qwen3_5_text",
        _without(
            _qwen3_5_text(
                architectures=["Qwen3_5ForCausalLM"],
                dtype="float32",
                head_dim=24,
                hidden_size=72,
                linear_key_head_dim=24,
                linear_num_key_heads=3,
                linear_num_value_heads=3,
                linear_value_head_dim=40,
                num_key_value_heads=2,
                rope_parameters={
                    "mrope_interleaved": True,
                    "mrope_section": [3, 2, 1],
                    "partial_rotary_factor": 0.5,
                    "rope_theta": 10000.0,
                    "rope_type": "default",
                },
                tie_word_embeddings=False,
                transformers_version="5.2.0",
            ),
            "layer_types",
        ),
        "F32",
        seed=6,
        length=80,
        prompt=70,
    ),
    Case(
        "qwen3_5_moe",
        _multimodal(
            "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", _without(_qwen3_5_text(**_SPARSE), "intermediate_size")
        ),
        "BF16",
        seed=3,
        generation=_QWEN3_5_GENERATION,
    ),
    # A decoder by itself, with one tensor an expert and matrix, as quantised files have it.
    Case(
        "qwen3_5_moe_text",
        _without(
            _qwen3_5_text(
                **_SPARSE | {"dtype": "float32"},
                architectures=["Qwen3_5MoeForCausalLM"],
                linear_num_value_heads=6,
                linear_value_head_dim=16,
                transformers_version="5.2.0",
            ),
            "intermediate_size",
        ),
        "F32",
        seed=13,
    ),
    Case("lfm2", _lfm2(), "BF16", seed=2),
    # Every bias, a longer convolution, another width of the MLP, heads of 24, and the newer generation of keys.
    Case(
        "lfm2_bias",
        _without(
            _lfm2(
                block_ffn_dim_multiplier=1.3,
                block_multiple_of=8,
                conv_L_cache=4,
                conv_bias=True,
                dtype="float32",
                full_attn_idxs=None,
                hidden_size=72,
                intermediate_size=150,
                layer_types=[CONV, FULL, CONV, CONV, FULL],
                num_attention_heads=3,
                num_hidden_layers=5,
                num_key_value_heads=1,
                rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
                tie_embedding=False,
            ),
            "block_ff_dim",
            "rope_theta",
            "torch_dtype",
        ),
        "F32",
        seed=2,
    ),
    # In the manner of LFM2-350M's successors: the MLP is as wide as the config says.
    Case(
        "lfm2_unadjusted",
        _lfm2(block_auto_adjust_ff_dim=False, block_ff_dim=104, conv_L_cache=2, torch_dtype="float32"),
        "F32",
        seed=4,
    ),
]

STATE_CASES: dict[str, Case] = {case.name: case for case in _ALL_CASES}


def _text(name: str, **changes: Any) -> Config:
    """Return a change to the text config of a multimodal case."""
    return {"text_config": STATE_CASES[name].config["text_config"] | changes}


def _rope(config: Config, **changes: Any) -> Config:
    """Return ``rope_parameters`` of a config, changed."""
    return {"rope_parameters": config["rope_parameters"] | changes}


STATE_ABLATIONS: dict[str, list[Config]] = {
    # Changes to the config of a case, each of which has to change its logits.
    "qwen3_next": [
        {"partial_rotary_factor": 0.5},
        {"rope_theta": 10000.0},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 2},
    ],
    "qwen3_next_mixed": [{"partial_rotary_factor": 0.25}, {"norm_topk_prob": True}, {"attention_bias": False}],
    "qwen3_5": [
        _text("qwen3_5", **_rope(STATE_CASES["qwen3_5"].config["text_config"], **change))
        for change in ({"partial_rotary_factor": 0.5}, {"rope_theta": 10000.0})
    ],
    "qwen3_5_text": [_rope(STATE_CASES["qwen3_5_text"].config, partial_rotary_factor=0.25)],
    "qwen3_5_moe": [_text("qwen3_5_moe", num_experts_per_tok=3)],
    "qwen3_5_moe_text": [{"num_experts_per_tok": 1}],
    "lfm2": [{"rope_theta": 10000.0}, {"norm_eps": 0.1}],
    "lfm2_bias": [{"conv_bias": False}, {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}],
    "lfm2_unadjusted": [{"rope_theta": 10000.0}],
}

_GATED = [("A_log", -20.0), ("dt_bias", 0.0), ("in_proj_z.weight", 0.0), ("linear_attn.norm.weight", 1.0)]
_SHARED = [("shared_expert_gate.weight", 0.0), ("shared_expert.down_proj.weight", 0.0)]

STATE_FILLED: dict[str, list[tuple[str, float]]] = {
    # Ends of names of tensors, and what they are filled with: each has to change the logits as well.
    "qwen3_next": [("A_log", -20.0), ("dt_bias", 0.0), ("linear_attn.norm.weight", 1.0), *_SHARED],
    "qwen3_5_text": [*_GATED, ("in_proj_b.weight", 0.0), ("in_proj_a.weight", 0.0)],
    "qwen3_5_moe_text": [*_GATED, *_SHARED],
    "lfm2_bias": [(f"{name}.bias", 0.0) for name in ("conv.in_proj", "conv.conv", "conv.out_proj")],
    "lfm2_unadjusted": [("q_layernorm.weight", 1.0), ("embedding_norm.weight", 1.0), ("conv.conv.weight", 1.0)],
}
