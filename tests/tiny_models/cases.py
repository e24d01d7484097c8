"""The cases of Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from tests.tiny_models import configs
from tests.tiny_models.case import Case

_ALL_CASES = [
    # Multi-head attention. No rope_theta, no head_dim, none of the bias keys, as published.
    Case(
        "llama2",
        configs.without(
            configs.llama(num_key_value_heads=4, torch_dtype="float32", transformers_version="4.31.0.dev0"),
            "attention_bias",
            "attention_dropout",
            "mlp_bias",
            "rope_theta",
        ),
        "F32",
        seed=5,
    ),
    Case(
        "llama3_gqa",
        configs.without(
            configs.llama(
                hidden_size=128,
                num_attention_heads=8,
                num_key_value_heads=2,
                intermediate_size=96,
                rope_theta=500000.0,
                torch_dtype="bfloat16",
                bos_token_id=168,
                eos_token_id=169,
                vocab_size=172,
            ),
            "mlp_bias",
        ),
        "BF16",
        seed=6,
    ),
    # Rope scaling in the older generation of keys; all three bands of wavelengths are present.
    Case(
        "llama31",
        configs.llama(
            rope_theta=500000.0,
            rope_scaling=configs.LLAMA31_SCALING,
            bos_token_id=150,
            eos_token_id=[151, 158, 159],
        ),
        "F32",
        seed=6,
        generation={
            "bos_token_id": 150,
            "do_sample": True,
            "eos_token_id": [151, 158, 159],
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.42.3",
        },
    ),
    # The same in the newer generation of keys, with tied embeddings and a head_dim in the config.
    Case("llama32_tied", configs.LLAMA32_TIED, "BF16", seed=11),
    Case("llama_bias", configs.llama(attention_bias=True, mlp_bias=True), "F32", seed=1),
    # "type" is what "rope_type" was called at first.
    Case("llama_linear", configs.llama(rope_scaling={"type": "linear", "factor": 4.0}), "F32", seed=7),
    # Sequences beyond max_position_embeddings: dynamic scaling only acts there.
    Case(
        "llama_dynamic",
        configs.llama(max_position_embeddings=32, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "F32",
        seed=1,
        prompt=40,
    ),
    Case(
        "llama_yarn",
        configs.llama(
            hidden_size=128,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        "F32",
        seed=4,
    ),
    # Every optional key of yarn but attention_factor, in the newer generation of keys.
    Case(
        "llama_yarn_full",
        configs.without(
            configs.llama(
                dtype="float32",
                hidden_size=128,
                rope_parameters={
                    "beta_fast": 4.0,
                    "beta_slow": 0.5,
                    "factor": 4.0,
                    "mscale": 2.0,
                    "mscale_all_dim": 0.5,
                    "original_max_position_embeddings": 32,
                    "rope_theta": 10000.0,
                    "rope_type": "yarn",
                    "truncate": False,
                },
                transformers_version="5.0.0",
            ),
            "rope_theta",
            "rope_scaling",
            "torch_dtype",
        ),
        "F32",
        seed=4,
    ),
    Case(
        "llama_yarn_attention_factor",
        configs.llama(
            hidden_size=128,
            rope_scaling={
                "attention_factor": 0.75,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_type": "yarn",
            },
        ),
        "F32",
        seed=9,
    ),
    Case("mistral", configs.mistral(), "F32", seed=5),
    Case(
        "mistral_head_dim",
        configs.mistral(
            attention_dropout=0.0,
            head_dim=24,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            sliding_window=None,
            torch_dtype="bfloat16",
            transformers_version="4.43.0.dev0",
        ),
        "BF16",
        seed=2,
    ),
    Case("qwen2", configs.qwen2(), "F32", seed=3),
    Case(
        "qwen2_sliding",
        configs.qwen2(num_hidden_layers=3, use_sliding_window=True, max_window_layers=1, tie_word_embeddings=False),
        "F32",
        seed=10,
    ),
    Case("qwen3", configs.qwen3(), "F32", seed=3),
    Case(
        "qwen3_bf16",
        configs.qwen3(tie_word_embeddings=True, num_key_value_heads=1, torch_dtype="bfloat16"),
        "BF16",
        seed=1,
        shards=2,
        generation={
            "bos_token_id": 180,
            "do_sample": True,
            "eos_token_id": [182, 180],
            "pad_token_id": 180,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
    ),
    Case("llama_f16", configs.llama(torch_dtype="float16"), "F16", seed=4),
    # Sizes which are no multiples of 16 or 32: head_dim 24, hidden 144, intermediate 100, vocabulary 163.
    Case(
        "llama_heads6",
        configs.llama(
            hidden_size=144,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=100,
            vocab_size=163,
        ),
        "F32",
        seed=6,
    ),
    # A number of heads which few numbers of ranks divide, and a single KV head.
    Case(
        "llama_heads7",
        configs.llama(
            hidden_size=112, num_attention_heads=7, num_key_value_heads=1, intermediate_size=96, vocab_size=199
        ),
        "F32",
        seed=1,
    ),
    Case(
        "llama_heads7_mha",
        configs.llama(
            hidden_size=112, num_attention_heads=7, num_key_value_heads=7, intermediate_size=96, vocab_size=199
        ),
        "F32",
        seed=1,
    ),
    # Integer rope_theta, max_window_layers below the number of layers, a BOS token other than in generation_config.
    Case(
        "deepseek_distill_like",
        configs.qwen2(
            hidden_size=96,
            num_attention_heads=6,
            num_hidden_layers=3,
            max_window_layers=2,
            rope_theta=10000,
            tie_word_embeddings=False,
            torch_dtype="bfloat16",
            transformers_version="4.44.0",
        ),
        "BF16",
        seed=4,
        generation={
            "_from_model_config": True,
            "bos_token_id": 172,
            "do_sample": True,
            "eos_token_id": 170,
            "temperature": 0.6,
            "top_p": 0.95,
            "transformers_version": "4.39.3",
        },
    ),
]

CASES: dict[str, Case] = {case.name: case for case in _ALL_CASES}
