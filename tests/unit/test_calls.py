"""Calls of an `LLM` with tiny models: sessions, what is refused, options, shared beginnings, few pages."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.engine.llm import Prompt
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.engine.stats import Stats
from dllama_mpi.engine.step import Step
from dllama_mpi.errors import DllamaError, RequestError
from tests.one_rank import OneRank
from tests.tiny_models.case import Case
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model
from tests.tiny_models.references import load_reference
from tests.unit.loaded import GREEDY, Load, prompts

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
        ({"buffer_float_type": "q4m"}, "buffer_float_type is 'q4m'; it must be one of f32, f16, q80, q40"),
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
    each = llm.memory.need(llm.shards[0]).per_position
    tight = load(case, max_seq_len=512, max_batch=3, kv_memory=3.5 * 256 * each / 1e9)
    assert tight.pages == 3
    assert [r.token_ids for r in tight.generate(list(prompts), params)] == ref
    assert tight.engine.snapshot().preemptions > 0
