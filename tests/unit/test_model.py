"""The whole model on one rank: against transformers' references at f32, against the naive twin when quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine import sampler
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.errors import UsageError
from dllama_mpi.kernels.layout import aligned_empty
from tests import naive_model, naive_sampling
from tests.naive_numbers import Floats
from tests.one_rank import OneRank
from tests.tiers import QUICK_CASES, all_but
from tests.tiny_models.case import Case
from tests.tiny_models.cases import CASES
from tests.tiny_models.references import load_reference
from tests.unit.loaded import GREEDY, Load, prompts

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_case_by_tier = pytest.mark.parametrize(
    "case", all_but([CASES[name] for name in QUICK_CASES], CASES.values()), ids=CASES
)
F32_TOLERANCE = 5e-5
"""Largest difference from transformers' float32 logits, which spread over about 10; 1e-5 is measured."""


# --------------------------------------------------------------------------------------------------------------------
# float32 against the references
# --------------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("chunk", [256, 7])
def test_logits_are_the_references(case: Case, chunk: int, load: Load) -> None:
    reference = load_reference(case)
    got = load(case, prefill_chunk=chunk).logits(reference.tokens.tolist())
    assert got is not None
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, reference.logits, rtol=0, atol=F32_TOLERANCE)


@every_case
@pytest.mark.parametrize("chunk", [256, 7])
def test_greedy_tokens_are_the_references(case: Case, chunk: int, load: Load) -> None:
    reference = load_reference(case)
    got = load(case, prefill_chunk=chunk).generate(reference.greedy_prompt.tolist(), GREEDY)
    assert got.token_ids == reference.greedy.tolist()
    assert got.finish_reason == "length"


@every_case_by_tier
def test_the_twin_is_right_too(case: Case, folders: Callable[[Case], Path]) -> None:
    reference = load_reference(case)
    got = naive_model.Model(folders(case), "f32").logits(reference.tokens)
    np.testing.assert_allclose(got, reference.logits, rtol=0, atol=F32_TOLERANCE)


@every_case
def test_chunks_and_threads_change_no_bit(case: Case, load: Load) -> None:
    tokens = load_reference(case).tokens.tolist()
    for weights in ("f32", "q40"):
        whole = load(case, weights=weights).logits(tokens)
        for options in ({"prefill_chunk": 7}, {"prefill_chunk": 1}, {"prefill_chunk": 7, "max_batch": 3}):
            np.testing.assert_array_equal(load(case, weights=weights, **options).logits(tokens), whole)


def test_two_threads_change_no_bit(load: Load) -> None:
    tokens = load_reference(CASES["llama3_gqa"]).tokens.tolist()
    one = load(CASES["llama3_gqa"], nthreads=1).logits(tokens)
    try:
        two = load(CASES["llama3_gqa"], nthreads=2)
    except UsageError:
        pytest.skip("this process may use one core")
    np.testing.assert_array_equal(two.logits(tokens), one)


@every_case
@pytest.mark.parametrize("weights", ["f32", "q40"])
def test_memory_may_hold_anything_at_first(
    case: Case, weights: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
        array = aligned_empty(shape, dtype)
        array[...] = np.nan if dtype == np.float32 else 0x7E
        return array

    tokens = load_reference(case).tokens.tolist()
    clean = load(case, weights=weights)
    for module in ("weights.tiles", "kernels.matrix"):
        monkeypatch.setattr(f"dllama_mpi.{module}.aligned_empty", poisoned)
    dirty = load(case, weights=weights)
    np.testing.assert_array_equal(dirty.logits(tokens), clean.logits(tokens))


# --------------------------------------------------------------------------------------------------------------------
# Quantised against the twin
# --------------------------------------------------------------------------------------------------------------------


def short_sequences(case: Case) -> Iterator[np.ndarray]:
    """Yield the reference's tokens in sequences of 8."""
    yield from load_reference(case).tokens.reshape(-1, 8)


def twin_differences(case: Case, weights: str, folder: Path, llm: OneRank) -> tuple[Floats, Floats]:
    """Return for each token of short sequences the largest difference of a logit from the naive twin, and the largest
    that quantisation makes to the twin itself.
    """
    twin, exact = naive_model.Model(folder, weights), naive_model.Model(folder, "f32")
    differences, effects = [], []
    for tokens in short_sequences(case):
        ref = twin.logits(tokens)
        got = llm.logits(tokens.tolist())
        differences.append(np.abs(got - ref).max(axis=1))
        effects.append(np.abs(exact.logits(tokens) - ref).max(axis=1))
    return np.concatenate(differences), np.concatenate(effects)


@pytest.mark.parametrize(
    ("case", "weights"),
    all_but([(CASES["llama31"], "q40")], product(CASES.values(), ("q40", "q80"))),
    ids=[f"{name}-{weights}" for name, weights in product(CASES, ("q40", "q80"))],
)
def test_quantised_model_is_its_twin(case: Case, weights: str, folders: Callable[[Case], Path], load: Load) -> None:
    """Compare with tolerance 1e-4, but for the few tokens where a rounding went the other way.

    A value that lies within float32's error of the middle between two codes may get either. That happens about once in
    1e5 values and shifts the logits of this token, and of those that attend to it, by up to 0.08 as measured.
    """
    difference, effect = twin_differences(case, weights, folders(case), load(case, weights=weights))
    assert np.isfinite(difference).all()
    assert np.median(effect) > 1e-2  # so a program that did not quantise would fail
    assert (difference < 1e-4).mean() > 0.75
    assert difference.max() < 0.25


@every_case_by_tier
def test_f16_model_is_its_twin(case: Case, folders: Callable[[Case], Path], load: Load) -> None:
    """Compare with tolerance 3e-3: keys and values are rounded to float16, now and then to the other side."""
    difference, effect = twin_differences(case, "f16", folders(case), load(case, weights="f16"))
    assert np.median(effect) > 1e-3
    assert np.median(difference) < 1e-4
    assert difference.max() < 3e-3


@pytest.mark.parametrize("weights", ["q40", "q80", "f16", "f32"])
def test_log_probabilities(weights: str, load: Load) -> None:
    case = CASES["qwen3"]
    tokens = load_reference(case).tokens
    llm = load(case, weights=weights, prefill_chunk=7)
    logits = llm.logits(tokens.tolist()).astype(np.float64)[:-1]
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    got = llm.log_probabilities(tokens.tolist())
    np.testing.assert_allclose(got, log_softmax[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-5)
    assert llm.log_probabilities([3]).shape == (0,)


# --------------------------------------------------------------------------------------------------------------------
# Several sequences at once
# --------------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("weights", ["f32", "q40"])
def test_tokens_are_the_same_in_company(case: Case, weights: str, load: Load) -> None:
    alone = load(case, weights=weights, max_seq_len=80)
    ref = [alone.generate(prompt, GREEDY).token_ids for prompt in prompts(case)]
    for chunk in (256, 7):
        together = load(case, weights=weights, max_seq_len=80, max_batch=4, prefill_chunk=chunk)
        results = together.generate(prompts(case), GREEDY)
        assert [result.token_ids for result in results] == ref
    if weights == "f32":
        assert ref[0] == load_reference(case).greedy.tolist()


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 20}, {"top_p": 0.9, "temperature": 1.3}, {"min_p": 0.05, "repeat_penalty": 1.2}],
    ids=str,
)
def test_sampled_tokens_are_the_same_in_company(filters: dict[str, Any], load: Load) -> None:
    case = CASES["llama3_gqa"]
    params = SamplingParams(max_tokens=16, seed=7, ignore_eos=True, presence_penalty=0.3, **filters)
    alone = load(case)
    ref = [alone.generate(prompt, params).token_ids for prompt in prompts(case)]
    assert [alone.generate(prompt, params).token_ids for prompt in prompts(case)] == ref
    together = load(case, max_batch=4, prefill_chunk=7).generate(prompts(case), params)
    assert [result.token_ids for result in together] == ref
    assert len({tuple(tokens) for tokens in ref}) == len(ref)


def test_few_candidates_give_the_tokens_of_the_whole_vocabulary(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    case, params = CASES["llama3_gqa"], SamplingParams(temperature=2.0, max_tokens=30, seed=3, ignore_eos=True)
    results = {}
    for count in (4, 1000):
        monkeypatch.setattr(sampler, "WANTED", count)
        results[count] = load(case).generate(prompts(case)[0], params)
    assert results[4].token_ids == results[1000].token_ids
    assert results[4].stats.full_gathers > 0
    assert results[1000].stats.full_gathers == 0


def test_penalties_count_prompt_and_output(load: Load) -> None:
    case = CASES["llama2"]
    llm, prompt = load(case), prompts(case)[4]
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, repeat_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.4
    )
    tokens = list(prompt)
    for _ in range(12):
        logits = llm.logits(tokens)[-1]
        tokens.append(int(naive_sampling.penalised(logits, tokens, len(prompt), 1.3, 0.6, 0.4).argmax()))
    assert llm.generate(prompt, params).token_ids == tokens[len(prompt) :]
    assert (
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)).token_ids
        != tokens[len(prompt) :]
    )
