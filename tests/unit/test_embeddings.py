"""Embeddings and the log-probabilities of prompts, of a model on one rank: those of its twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.errors import RequestError
from tests.naive_model import Model
from tests.one_rank import OneRank
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model

NAMES = ["llama2", "qwen3"]


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(CASES[request.param], tmp_path_factory.mktemp(request.param) / "model")


def texts_of(llm: OneRank, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, llm.config.vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_twins(pooling: str, chunk: int, folder: Path) -> None:
    llm = OneRank(folder, weights="f32", nthreads=1, max_seq_len=64, max_batch=3, prefill_chunk=chunk)
    texts = texts_of(llm, 1, 20, 64, 33)
    found = llm.embed([*texts, texts[1]], pooling)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[1], found[-1], atol=1e-6)
    for text, each in zip(texts, found, strict=False):
        states = Model(folder, "f32").hidden(np.array(text))
        wanted = states.mean(axis=0) if pooling == "mean" else states[-1]
        np.testing.assert_allclose(each, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_a_prompt_is_scored_as_a_text_is(folder: Path) -> None:
    llm = OneRank(folder, weights="f32", nthreads=1, max_seq_len=64, max_batch=2, prefill_chunk=7)
    (text,) = texts_of(llm, 40)
    wanted = llm.log_probabilities(text)
    llm.generate(text, SamplingParams(max_tokens=1))
    for count in (0, 1, 5):
        params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=count, ignore_eos=True)
        got = llm.generate(text, params)
        assert got.prompt_logprobs is not None
        np.testing.assert_allclose([each.logprob for each in got.prompt_logprobs], wanted, atol=1e-4)
        assert {len(each.top) for each in got.prompt_logprobs} == {count}
        assert len(got.token_ids) == 2


def test_what_cannot_be_embedded_is_refused(folder: Path) -> None:
    llm = OneRank(folder, weights="f32", nthreads=1, max_seq_len=64)
    with pytest.raises(RequestError, match="pooling is 'all'; it must be one of mean, last"):
        llm.embed([[1, 2]], "all")
    with pytest.raises(RequestError, match="65 tokens; the context holds 64"):
        llm.embed([[1] * 65])
    assert llm.embed([]).shape == (0, llm.config.hidden_size)
    assert llm.embed([[1, 2]]).shape == (1, llm.config.hidden_size)
