"""The cases of the dense families, and what has to change their logits."""

from __future__ import annotations

from tests.tiny_dense import configs, gemma
from tests.tiny_dense.common import FULL, SLIDING
from tests.tiny_models.case import Case, Config

_ALL_CASES = [
    Case("gemma2", gemma.gemma2(), "F32", seed=6),
    Case("gemma3_text", gemma.gemma3_text(), "F32", seed=1),
    Case("gemma3_nested", gemma.GEMMA3_NESTED, "BF16", seed=3),
    Case("gemma3", gemma.GEMMA3, "BF16", seed=3, shards=2, generation=gemma.GEMMA3_GENERATION),
    # The names and keys of newer files.
    Case("gemma3_renamed", gemma.GEMMA3_RENAMED, "BF16", seed=1, generation=gemma.GEMMA3_GENERATION),
    Case("phi3", configs.phi3(), "F32", seed=2),
    # phi-4: nothing but the fused tensors, with fewer KV heads.
    Case("phi4", configs.phi3(num_key_value_heads=2, rope_theta=250000, sliding_window=None), "F32", seed=2),
    # Phi-3-mini-128k-instruct. The sequence is beyond the original length, the generated tokens are just within it.
    Case(
        "phi3_longrope",
        configs.phi3(original_max_position_embeddings=32, rope_scaling=configs.LONGROPE, sliding_window=4096),
        "F32",
        seed=2,
        prompt=8,
    ),
    # All is beyond the original length.
    Case("phi4_mini", configs.PHI4_MINI, "BF16", seed=1, prompt=40),
    Case("granite", configs.granite(), "F32", seed=3),
    Case("granite_bias", configs.granite(attention_bias=True, mlp_bias=True, tie_word_embeddings=False), "F32", seed=3),
    Case("smollm3", configs.smollm3(), "F32", seed=3),
    # The layers without rope follow from the interval, and they slide.
    Case(
        "smollm3_sliding",
        configs.smollm3(
            "layer_types",
            "no_rope_layers",
            attention_bias=True,
            mlp_bias=True,
            no_rope_layer_interval=2,
            num_hidden_layers=2,
            sliding_window=8,
            use_sliding_window=True,
        ),
        "F32",
        seed=3,
    ),
    Case("olmo2", configs.olmo2(), "F32", seed=3),
    Case("olmo2_bias", configs.olmo2(attention_bias=True, num_key_value_heads=6), "F32", seed=1),
    Case("olmo3", configs.olmo3(), "F32", seed=1),
    Case("olmo3_nested", configs.OLMO3_NESTED, "BF16", seed=2),
    Case("ministral3", configs.ministral3(), "F32", seed=1),
    Case("mistral3", configs.MISTRAL3, "BF16", seed=2, generation=configs.MISTRAL3_GENERATION),
    Case("mistral_small", configs.MISTRAL_SMALL, "BF16", seed=2, generation=configs.MISTRAL3_GENERATION),
    Case("seed_oss", configs.seed_oss(), "F32", seed=3),
    Case(
        "seed_oss_bias", configs.seed_oss(attention_bias=False, attention_out_bias=True, mlp_bias=True), "F32", seed=1
    ),
    Case("ernie4_5", configs.ernie(), "F32", seed=1),
    Case("ernie4_5_bias", configs.ernie(use_bias=True, tie_word_embeddings=False), "F32", seed=2),
    Case("hunyuan", configs.hunyuan(), "F32", seed=10),
]

DENSE_CASES: dict[str, Case] = {case.name: case for case in _ALL_CASES}


def _within(case: str, key: str, *changes: Config) -> list[Config]:
    """Return ``changes`` to the dictionary at ``key`` of a case's config."""
    return [{key: DENSE_CASES[case].config[key] | change} for change in changes]


def _windows(window: int) -> list[Config]:
    """Return changes of a window by one token."""
    return [{"sliding_window": window - 1}, {"sliding_window": window + 1}]


_LLAMA: Config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
"""Nothing but Llama, of the same tensors: what a family adds to it has to matter."""

DENSE_ABLATIONS: dict[str, list[Config]] = {
    # Changes to the config of a case, each of which has to change its logits (see tests.make_reference).
    "gemma2": [
        *_windows(12),
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"hidden_activation": "silu"},
        {"layer_types": [FULL, SLIDING, FULL]},
        {"query_pre_attn_scalar": 32},
    ],
    "gemma3_text": [
        *_windows(8),
        {"query_pre_attn_scalar": 24},
        {"rope_local_base_freq": 1000000},
        {"rope_theta": 10000},
        {"sliding_window_pattern": 3},
    ],
    "gemma3_nested": [
        *_windows(8),
        {"final_logit_softcapping": None},
        {"layer_types": [SLIDING, SLIDING, FULL]},
        {"layer_types": None},
        *_within(
            "gemma3_nested",
            "rope_parameters",
            {FULL: {"rope_theta": 1000000, "rope_type": "default"}},
            {SLIDING: {"rope_theta": 1000000, "rope_type": "default"}},
        ),
    ],
    "gemma3": _within(
        "gemma3",
        "text_config",
        {"rope_scaling": None},
        {"rope_theta": 10000},
        {"rope_local_base_freq": 1000000},
        {"sliding_window": 9},
        {"sliding_window_pattern": 3},
        {"query_pre_attn_scalar": 24},
    ),
    "gemma3_renamed": _within(
        "gemma3_renamed", "text_config", *_windows(8), {"layer_types": None}, {"attention_bias": False}
    ),
    "phi3": [*_windows(12), {"sliding_window": None}, {"rope_theta": 1000.0}],
    "phi4": [{"rope_theta": 10000.0}, {"sliding_window": 40}],
    "phi3_longrope": [
        {"rope_scaling": None},
        {"rope_scaling": configs.LONGROPE | {"long_factor": configs.LONGROPE["short_factor"]}},
        {"original_max_position_embeddings": 48},
        {"max_position_embeddings": 256},
    ],
    "phi4_mini": [
        {"rope_scaling": None},
        {"rope_scaling": configs.LONGROPE | {"long_factor": configs.LONGROPE["short_factor"]}},
        {"rope_scaling": None, "partial_rotary_factor": 1.0},
        {"max_position_embeddings": 256},
    ],
    "granite": [
        {"attention_multiplier": 0.25},
        {"embedding_multiplier": 1.0},
        {"logits_scaling": 1.0},
        {"residual_multiplier": 1.0},
        {"rope_theta": 10000.0},
    ],
    "granite_bias": [{"attention_bias": False}, {"mlp_bias": False}],
    "smollm3": [
        {"no_rope_layers": [1, 1, 1, 1]},
        {"no_rope_layers": [1, 1, 0, 0]},
        {"no_rope_layers": None, "no_rope_layer_interval": 2},
    ],
    "smollm3_sliding": [
        *_windows(8),
        {"no_rope_layer_interval": 3},
        {"layer_types": [FULL, FULL]},
        {"use_sliding_window": False},
        {"attention_bias": False},
        {"mlp_bias": False},
    ],
    "olmo2": [{"rope_theta": 10000}],
    "olmo2_bias": [{"attention_bias": False}],
    "olmo3": [
        *_windows(8),
        {"layer_types": [FULL, SLIDING, SLIDING, SLIDING]},
        {"rope_scaling": None},
        *_within("olmo3", "rope_scaling", {"attention_factor": 1.0}, {"factor": 1.0}),
    ],
    "olmo3_nested": [
        {"layer_types": [SLIDING, FULL]},
        *_within(
            "olmo3_nested",
            "rope_parameters",
            {FULL: {"rope_theta": 500000, "rope_type": "default"}},
            {SLIDING: {"rope_theta": 500000, "rope_type": "default"}},
        ),
    ],
    "ministral3": [
        {"sliding_window": 12},
        *_within(
            "ministral3",
            "rope_parameters",
            {"llama_4_scaling_beta": 0.0},
            {"rope_type": "default"},
            {"mscale": 0.0},
            {"original_max_position_embeddings": 24},
        ),
    ],
    "mistral3": _within("mistral3", "text_config", {"rope_parameters": configs.MINISTRAL_ROPE | {"rope_theta": 1e6}}),
    "mistral_small": _within("mistral_small", "text_config", {"rope_theta": 10000.0}, {"sliding_window": 16}),
    "seed_oss": [{"attention_bias": False}, {"rope_theta": 10000.0}],
    "seed_oss_bias": [{"attention_out_bias": False}, {"mlp_bias": False}],
    # Pairs of neighbours are rotated, not halves of a head as in Llama.
    "ernie4_5": [{"rope_theta": 10000.0}, _LLAMA],
    "ernie4_5_bias": [{"use_bias": False}, _LLAMA | {"attention_bias": True, "mlp_bias": True}],
    "hunyuan": [{"rope_scaling": None}, *_within("hunyuan", "rope_scaling", {"alpha": 50.0})],
}
