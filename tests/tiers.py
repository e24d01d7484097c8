"""The tiers of the tests: what is marked as slow is left out unless asked for, see pyproject.toml."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

QUICK_CASES = ("llama31", "qwen3", "llama_heads7", "mistral")
"""The tiny models that the quick tier tries where a case takes long: grouped heads, norms of q and k, heads that no
number of ranks divides, a sliding window."""

QUICK_FAMILIES = ("gemma3", "gpt_oss", "qwen3_5")
"""And of other families: two ropes and four norms; experts and sinks; states. Each has kernels of its own to be
compiled."""
QUICK_FORMATS = ("q4m", "f16")


def slow(*values: Any) -> Any:
    """Return a test's parameters, marked as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def all_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return cases, all but the quick ones marked as slow; a case is a value, or a tuple of a test's parameters."""
    chosen, every = list(quick), list(cases)
    unknown = [case for case in chosen if case not in every]
    if unknown:
        raise ValueError(f"not among the cases: {unknown}")
    return [case if case in chosen else slow(*(case if isinstance(case, tuple) else (case,))) for case in every]
