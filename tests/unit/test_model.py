"""The whole model on one rank: against transformers' references at f32, against the naive twin when quantised."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine import sampler
from dllama_mpi.engine.llm import Prompt
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.engine.stats import Stats
from dllama_mpi.engine.step import Step
from dllama_mpi.errors import DllamaError, RequestError, UsageError
from dllama_mpi.kernels.layout import aligned_empty
from tests import naive_model, naive_sampling
from tests.naive_numbers import Floats
from tests.one_rank import OneRank
from tests.tiers import QUICK_CASES, all_but
from tests.tiny_models.case import Case
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model
from tests.tiny_models.references import GREEDY_TOKENS, load_reference

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_case_by_tier = pytest.mark.parametrize(
    "case", all_but([CASES[name] for name in QUICK_CASES], CASES.values()), ids=CASES
)
F32_TOLERANCE = 5e-5
"""Largest difference from transformers' float32 logits, which spread over about 10; 1e-5 is measured."""
GREEDY = SamplingParams(temperature=0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
Load = Callable[..., OneRank]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Return what gives the directory of a case, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(case: Case) -> Path:
        return root / case.name if (root / case.name).exists() else write_model(case, root / case.name)

    return folder


@pytest.fixture(scope="module")
def load(folders: Callable[[Case], Path]) -> Load:
    """Return what loads a case on one rank and one thread, with a context of 64 positions."""

    def loaded(case: Case, **options: Any) -> OneRank:
        given: dict[str, Any] = {"weights": "f32", "nthreads": 1, "max_seq_len": 64} | options
        return OneRank(folders(case), **given)

    return loaded


def prompts(case: Case) -> list[list[int]]:
    """Return six prompts of different lengths; the first is the reference's."""
    rng = np.random.default_rng(case.seed)
    reference = load_reference(case).greedy_prompt.tolist()
    return [reference] + [rng.integers(0, case.config["vocab_size"], n).tolist() for n in (1, 3, 9, 20, 30)]


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


@pytest.mark.parametrize("weights", ["q40", "q80"])
@every_case_by_tier
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


# --------------------------------------------------------------------------------------------------------------------
# Calls and sessions
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "mistral", "llama_dynamic"])
def test_a_session_gives_what_calls_give(name: str, load: Load) -> None:
    case = CASES[name]
    first = prompts(case)[5]
    kept = load(case, prefill_chunk=7)
    with kept.session() as leads:
        assert leads
        tokens = first
        for added in ([], [5, 6], [9]):
            tokens = [*tokens, *added]
            params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
            got = kept.generate(tokens, params)
            assert got.token_ids == load(case, prefill_chunk=7).generate(tokens, params).token_ids
            tokens = [*tokens, *got.token_ids]
        assert (got.usage.cached_tokens > 16) == (name != "llama_dynamic")  # whose keys depend on the sequence's length
    assert kept.generate(first, params).token_ids == load(case).generate(first, params).token_ids


def test_logits_amid_a_session_do_not_spoil_it(load: Load) -> None:
    case = CASES["llama2"]
    llm, params = load(case), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    first, other = prompts(case)[4], prompts(case)[5]
    ref = llm.generate(first, params).token_ids
    with llm.session():
        assert llm.generate(first, params).token_ids == ref
        llm.logits(other)
        assert llm.generate(first, params).token_ids == ref


def test_a_step_that_failed_is_not_taken_for_fed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["llama2"]
    llm, params = load(case), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    first, other = prompts(case)[4], prompts(case)[5]
    ref = llm.generate(first, params).token_ids

    def interrupted(step: Step) -> None:
        raise KeyboardInterrupt

    with llm.session():
        llm.generate(other, params)
        with monkeypatch.context() as patch:
            patch.setattr(llm._runner, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(first, params)
        assert llm.generate(first, params).token_ids == ref


def test_a_generator_may_be_left_early(load: Load) -> None:
    case = CASES["llama2"]
    llm, params = load(case, max_batch=2), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    many: list[Prompt] = list(prompts(case)[:3])
    ref = llm.generate(many, params)
    with llm.session():
        stats = Stats()
        running = llm._run(llm._add([llm.request(prompt, params) for prompt in many], stats), stats)
        for _ in range(4):
            next(running)
        assert isinstance(running, Generator)
        running.close()
        assert llm.engine.is_idle
        assert [r.token_ids for r in llm.generate(many, params)] == [r.token_ids for r in ref]


def test_limits_of_a_generation(load: Load) -> None:
    case = CASES["llama2"]
    llm, prompt = load(case, max_seq_len=20), prompts(case)[3]
    assert llm.generate(prompt, SamplingParams(temperature=0, max_tokens=0)).token_ids == []
    full = llm.generate(prompt, SamplingParams(temperature=0, ignore_eos=True))
    assert (len(full.token_ids), full.finish_reason) == (11, "length")
    assert llm.generate([1] * 20, GREEDY).token_ids == []


def test_generation_ends_at_a_declared_stop_token(folders: Callable[[Case], Path], tmp_path: Path, load: Load) -> None:
    case = CASES["llama2"]
    reference = load_reference(case)
    folder = write_model(case, tmp_path)
    stop = reference.greedy.tolist()[9]
    at = reference.greedy.tolist().index(stop)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{stop}]}}')
    llm = OneRank(folder, weights="f32", nthreads=1)
    got = llm.generate(reference.greedy_prompt.tolist(), SamplingParams(temperature=0, max_tokens=24))
    assert (got.token_ids, got.finish_reason) == (reference.greedy.tolist()[:at], "stop")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has no tokens"),
        ([1, 160], "token id 160 is out of range; the vocabulary has ids 0 to 159"),
        ([-1], "token id -1 is out of range"),
        ([1] * 65, "the prompt has 65 tokens; the context holds 64"),
    ],
)
def test_a_prompt_that_cannot_be(prompt: list[int], message: str, load: Load) -> None:
    llm = load(CASES["llama2"])
    for call in (llm.generate, llm.logits, llm.log_probabilities):
        with pytest.raises(RequestError, match=message):
            call(prompt)
    assert len(llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)).token_ids) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": "q50"},
            "--weights q50: 'q50' is no format; known are q40, q4m, iq4nl, mxfp4, q80, f16, f32",
        ),
        ({"buffer_float_type": "q40"}, "buffer_float_type is 'q40'; it must be one of f32, f16, q80"),
        ({"kv_type": "q4"}, "kv_type is 'q4'; it must be one of f16, f32, q80"),
        ({"nthreads": 0}, "nthreads is 0; it must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len is 0; it must be at least 1"),
        ({"max_batch": -1}, "max_batch is -1; it must be at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0; it must be at least 1"),
        ({"split": "1,1"}, "--split 1,1 has 2 shares; the job has 1 ranks; give 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str, load: Load) -> None:
    with pytest.raises(DllamaError) as caught:
        load(CASES["llama2"], **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        (None, None), (7, None), (1.5, None), ([1.5], None), ([1, None], None), ([[1, [2]]], None), ([True], None),
        ([-1], None), ([10**9], None), ({1: 2}, None), ([[1], 3], None), ([1, "a"], None), ([], None), ([[]], None),
        ([1, 2], 5), ([1, 2], {"temperature": 0}), (np.zeros((1, 2, 3)), None),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_given_wrong_is_refused_and_the_next_call_works(prompt: Any, params: Any, load: Load) -> None:
    llm = load(CASES["llama2"])
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt, params)
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError):
        list(llm.stream(prompt, params))
    assert len(llm.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3


def test_biases_and_log_probabilities(load: Load) -> None:
    llm, prompt = load(CASES["llama2"]), [5, 6, 7]
    logits = llm.logits(prompt)[-1].astype(np.float64)
    last = int(logits.argmin())
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=3, logit_bias={last: 100})
    logits[last] += 100
    ref = logits - np.logaddexp.reduce(logits)
    got = llm.generate(prompt, params)
    assert got.token_ids == [last]
    assert got.logprobs is not None
    assert [i for i, _ in got.logprobs[0].top] == np.argsort(-ref)[:3].tolist()
    assert [value for _, value in got.logprobs[0].top] == pytest.approx(np.sort(ref)[::-1][:3], abs=1e-4)


@pytest.mark.parametrize("chunk", [64, 256])
def test_a_shared_beginning_changes_no_bit(chunk: int, load: Load) -> None:
    """A text of several pages, and others that turn off from it within pages and between them."""
    case = CASES["llama2"]
    text = np.random.default_rng(3).integers(0, case.config["vocab_size"], 700).tolist()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2)
    options: dict[str, Any] = {"max_seq_len": 1024, "max_batch": 4, "prefill_chunk": chunk}
    shared = load(case, **options)
    shared.generate(text, params)
    asked: list[Prompt] = [[*text[:n], 1, 2, 3] for n in (700, 512, 511, 300, 20)]
    together = shared.generate(asked, params)
    assert [r.usage.cached_tokens for r in together] == [700, 512, 511, 300, 20]
    for prompt, got in zip(asked, together, strict=True):
        ref = load(case, **options).generate(prompt, params)
        assert (got.token_ids, ref.usage.cached_tokens) == (ref.token_ids, 0)


def test_few_pages_for_many_sequences(load: Load) -> None:
    """Sequences that cannot all stay give way and come back, with the text they have alone."""
    case = CASES["llama2"]
    prompts = [np.random.default_rng(i).integers(0, case.config["vocab_size"], 240).tolist() for i in range(3)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm = load(case, max_seq_len=512, max_batch=3)
    ref = [llm.generate(prompt, params).token_ids for prompt in prompts]
    tight = load(
        case, max_seq_len=512, max_batch=3, kv_memory=3.5 * 256 * llm.memory.need(llm.shards[0]).per_position / 1e9
    )
    assert tight.pages == 3
    assert [r.token_ids for r in tight.generate(list(prompts), params)] == ref
    assert tight.engine.snapshot().preemptions > 0
