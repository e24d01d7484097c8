"""Tiny models on one rank, for tests of what is loaded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dllama_mpi.engine.request import SamplingParams
from tests.one_rank import OneRank
from tests.tiny_models.case import Case
from tests.tiny_models.references import GREEDY_TOKENS, load_reference

GREEDY = SamplingParams(temperature=0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
Load = Callable[..., OneRank]


def prompts(case: Case) -> list[list[int]]:
    """Return six prompts of different lengths; the first is the reference's."""
    rng = np.random.default_rng(case.seed)
    reference = load_reference(case).greedy_prompt.tolist()
    return [reference] + [rng.integers(0, case.config["vocab_size"], n).tolist() for n in (1, 3, 9, 20, 30)]
