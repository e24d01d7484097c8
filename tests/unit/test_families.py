"""Every further family as a whole model on one rank: logits and tokens of the references, quantised: of the twin."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.errors import UsageError
from tests.all_cases import FAMILY_CASES
from tests.naive_experts import SparseModel
from tests.one_rank import OneRank
from tests.tiers import QUICK_FAMILIES, all_but, slow
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model
from tests.tiny_models.references import GREEDY_TOKENS, load_reference
from tests.tiny_models.tensors import text_config

F32_TOLERANCE = 1e-4
"""Largest difference from transformers' float32 logits, which spread over about 10; 3e-5 is measured."""
GREEDY = SamplingParams(temperature=0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
every_case = pytest.mark.parametrize("name", all_but(QUICK_FAMILIES, FAMILY_CASES))
every_case_and_some_quantised = pytest.mark.parametrize(
    ("name", "weights"),
    [
        *all_but([(name, "f32") for name in QUICK_FAMILIES], [(name, "f32") for name in FAMILY_CASES]),
        *[slow(name, "q40") for name in QUICK_FAMILIES],
    ],
)
Load = Callable[..., OneRank]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what gives the directory of a case, written once."""
    root = tmp_path_factory.mktemp("models")

    def written(name: str) -> Path:
        return root / name if (root / name).exists() else write_model(FAMILY_CASES[name], root / name)

    return written


@pytest.fixture(scope="module")
def load(folder: Callable[[str], Path]) -> Load:
    """Return what loads a case on one rank and one thread, with a context of 128 positions."""

    def loaded(name: str, **options: Any) -> OneRank:
        given: dict[str, Any] = {"weights": "f32", "nthreads": 1, "max_seq_len": 128} | options
        return OneRank(folder(name), **given)

    return loaded


def prompts(case: Case) -> list[list[int]]:
    """Return six prompts of different lengths; the first is the reference's."""
    rng = np.random.default_rng(case.seed)
    reference = load_reference(case).greedy_prompt.tolist()
    words = min(140, text_config(case.config)["vocab_size"])
    return [reference] + [rng.integers(0, words, n).tolist() for n in (1, 3, 9, 20, 30)]


@pytest.mark.parametrize(("name", "chunk"), all_but(product(QUICK_FAMILIES, (7,)), product(FAMILY_CASES, (256, 7))))
def test_the_references(name: str, chunk: int, load: Load) -> None:
    """Logits of all tokens, and greedy tokens alone and among other sequences."""
    case = FAMILY_CASES[name]
    reference, llm = load_reference(case), load(name, prefill_chunk=chunk, max_batch=3)
    got = llm.logits(reference.tokens.tolist())
    np.testing.assert_allclose(got, reference.logits, rtol=0, atol=F32_TOLERANCE)
    assert llm.generate(reference.greedy_prompt.tolist(), GREEDY).token_ids == reference.greedy.tolist()
    together = llm.generate(prompts(case), GREEDY)
    assert together[0].token_ids == reference.greedy.tolist()


@every_case_and_some_quantised
def test_company_and_chunks_change_no_token(name: str, weights: str, load: Load) -> None:
    case = FAMILY_CASES[name]
    alone = load(name, weights=weights)
    ref = [alone.generate(prompt, GREEDY).token_ids for prompt in prompts(case)]
    assert len({tuple(tokens) for tokens in ref}) == len(ref)
    together = load(name, weights=weights, max_batch=4, prefill_chunk=7)
    assert [result.token_ids for result in together.generate(prompts(case), GREEDY)] == ref


@every_case_and_some_quantised
def test_chunks_and_threads_change_no_bit(name: str, weights: str, load: Load) -> None:
    case = FAMILY_CASES[name]
    tokens = load_reference(case).tokens.tolist()
    whole = load(name, weights=weights).logits(tokens)
    for options in ({"prefill_chunk": 7}, {"prefill_chunk": 1}, {"prefill_chunk": 7, "max_batch": 3}):
        np.testing.assert_array_equal(load(name, weights=weights, **options).logits(tokens), whole)
    try:
        two = load(name, weights=weights, nthreads=2)
    except UsageError:
        return  # this process may use one core
    np.testing.assert_array_equal(two.logits(tokens), whole)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [slow("qwen2_moe", "q40"), slow("granitemoe", "q80"), slow("olmoe_clip", "q40"), ("gpt_oss", "mxfp4")],
)
def test_quantised_experts_are_the_twins(name: str, recipe: str, folder: Callable[[str], Path], load: Load) -> None:
    """Compare with tolerance 1e-4, but for tokens where a rounding went the other way, see `test_model`.

    The twin's routers and gates are float32; so they are here.
    """
    llm = load(name, weights=f"{recipe},router=f32,shared_gate=f32")
    twin, exact = (SparseModel(folder(name), weights) for weights in (recipe, "f32"))
    differences, effects = [], []
    for tokens in load_reference(FAMILY_CASES[name]).tokens.reshape(-1, 8):
        ref = twin.logits(tokens)
        differences.append(np.abs(llm.logits(tokens.tolist()) - ref).max(axis=1))
        effects.append(np.abs(exact.logits(tokens) - ref).max(axis=1))
    difference = np.concatenate(differences)
    assert np.isfinite(difference).all()
    assert np.median(np.concatenate(effects)) > 1e-2  # so a program that did not quantise would fail
    assert (difference < 1e-4).mean() > 0.75
