"""What a server tells of prompts, embeddings and the log-probabilities of an echo: that of the model on one rank."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.one_rank import OneRank
from tests.server.running import Server, events, served
from tests.tiers import slow

TEXTS = ["This module provides a list", "Return the", "Raise an error if the list of names is empty. " * 8]


@pytest.fixture(scope="module", params=[2, slow(1), slow(3)])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with served(request.param, "--nthreads", "1", "--weights", "f32", "--prefill-chunk", "40") as found:
        yield found


@pytest.fixture(scope="module")
def llm() -> OneRank:
    return OneRank("demo", weights="f32", nthreads=1)


def vectors(server: Server, **body: Any) -> np.ndarray:
    answer = server.post("/v1/embeddings", body).json()
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return np.array([each["embedding"] for each in answer["data"]])


def test_embeddings_are_the_models(server: Server, client: openai.OpenAI, llm: OneRank) -> None:
    wanted = llm.embed(TEXTS)
    answer = client.embeddings.create(model="demo", input=TEXTS)
    np.testing.assert_allclose([each.embedding for each in answer.data], wanted, atol=2e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(llm.encode(t)) for t in TEXTS)
    np.testing.assert_allclose(vectors(server, input=TEXTS), wanted, atol=2e-5)
    np.testing.assert_allclose(vectors(server, input=TEXTS[1]), wanted[1:2], atol=2e-5)
    np.testing.assert_allclose(vectors(server, input=llm.encode(TEXTS[1])), wanted[1:2], atol=2e-5)
    np.testing.assert_allclose(vectors(server, input=TEXTS, pooling="last"), llm.embed(TEXTS, "last"), atol=2e-5)
    many = vectors(server, input=TEXTS[:2] * 20)
    np.testing.assert_allclose(many, np.tile(wanted[:2], (20, 1)), atol=2e-5)
    (model,) = client.models.list().data
    assert (model.model_extra or {})["embeddings"] == {
        "pooling": "mean",
        "normalised": True,
        "dimensions": llm.config.hidden_size,
    }


def test_base64_is_little_endian_floats(server: Server, llm: OneRank) -> None:
    answer = server.post("/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"}).json()
    found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(found, llm.embed(TEXTS[:1])[0], atol=2e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [""] * 2049}, "input"),
        ({"input": [[1], [10**6]]}, "input.1"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "model": "b"}, "model"),
    ],
)
def test_wrong_fields_are_named(body: Any, param: str, server: Server) -> None:
    answer = server.post("/v1/embeddings", body)
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("steps", [0, 3])
def test_an_echo_has_log_probabilities(steps: int, server: Server, client: openai.OpenAI, llm: OneRank) -> None:
    ids = llm.encode(TEXTS[2])
    given: Any = {
        "model": "demo",
        "prompt": TEXTS[2],
        "echo": True,
        "logprobs": 2,
        "max_tokens": steps,
        "temperature": 0,
    }
    choice = client.completions.create(**given).choices[0]
    found: Any = choice.logprobs
    assert choice.text.startswith(TEXTS[2])
    assert found.token_logprobs[0] is None
    assert len(found.tokens) == len(ids) + steps
    np.testing.assert_allclose(found.token_logprobs[1 : len(ids)], llm.log_probabilities(ids), atol=1e-3)
    for value, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert value <= max(top.values())
    told = [
        event for event in events(server.post("/v1/completions", given | {"stream": True}).text) if event != "[DONE]"
    ]
    streamed = [event["choices"][0] for event in told if event["choices"]]
    assert "".join(each["text"] for each in streamed) == choice.text
    tokens = [token for each in streamed if each["logprobs"] for token in each["logprobs"]["tokens"]]
    assert tokens == found.tokens
