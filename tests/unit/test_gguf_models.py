"""GGUF files of tiny models against the Hugging Face directories that they were made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.all_cases import ALL_CASES
from tests.gguf_files import write_gguf
from tests.one_rank import OneRank
from tests.tiers import all_but

QUICK = ("llama31", "qwen2", "gemma3_text", "qwen3_moe", "gpt_oss_bf16")
# What a GGUF file cannot say, or says by the size of the model.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 24},
    "qwen3_5_moe_text": {"linear_value_head_dim": 32},
    "gpt_oss_bf16": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
}
NAMES = (
    "llama2", "llama31", "llama32_tied", "llama_linear", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3_longrope",
    "phi4_mini", "granite", "smollm3", "olmo2", "olmo3", "ministral3", "seed_oss", "ernie4_5", "hunyuan", "mixtral",
    "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss_bf16", "glm4_moe", "qwen3_next", "qwen3_5_text",
    "qwen3_5_moe_text", "lfm2",
)  # fmt: skip


def changed(name: str) -> Any:
    """Return a case as far as a GGUF file can hold it."""
    case = ALL_CASES[name]
    return replace(case, config=case.config | CHANGES.get(name, {}))


@pytest.mark.parametrize("name", all_but(QUICK, NAMES))
def test_logits_are_those_of_the_directory(name: str, tmp_path: Path) -> None:
    case = changed(name)
    ids = np.random.default_rng(1).integers(0, min(100, case.config["vocab_size"]), 40).tolist()
    logits = []
    for path in write_gguf(case, tmp_path):
        model = OneRank(path, weights="f32", nthreads=1, max_seq_len=64, quiet=True)
        logits.append(model.logits(ids))
    assert np.abs(logits[0]).max() > 1
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
