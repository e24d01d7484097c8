"""OpenAI's routes as its own Python package calls them, over an engine that says what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.running import Server, events, scripted


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with scripted() as found:
        yield found


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "other"]
    assert client.models.retrieve("other").id == "other"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=user("say <<hello, world>>"))
    assert answer.object == "chat.completion"
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", "hello, world")
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2
    timings = (answer.model_extra or {})["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == usage.prompt_tokens
    assert timings["predicted_n"] == usage.completion_tokens


def test_chat_stream(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=user("say <<hello, world>>"), stream=True, stream_options=options
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello, world"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert not any(c.choices[0].finish_reason for c in chunks[:-2])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_stream_as_it_is_sent(server: Server) -> None:
    answer = server.post("/v1/chat/completions", {"messages": user("<<hi>>"), "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    assert answer.text.endswith("data: [DONE]\n\n")
    found = events(answer.text)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in found[0]


def test_parts_and_roles(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": [{"type": "text", "text": "be kind"}]},
        {"role": "user", "content": [{"type": "text", "text": "say <<o"}, {"type": "text", "text": "ne>>"}]},
    ]
    answer = client.chat.completions.create(model="demo", messages=messages)
    assert answer.choices[0].message.content == "one"


@pytest.mark.parametrize("stop", ["wor", ["zzz", "wor"], ["o, w", "wor", "never"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_never_leaked(client: openai.OpenAI, stop: Any, stream: bool) -> None:
    wanted = "hello, world".split("wor" if "o, w" not in stop else "o, w")[0]
    answer: Any = client.chat.completions.create(
        model="demo", messages=user("say <<hello, world>>"), stop=stop, stream=stream, logprobs=True
    )
    if stream:
        chunks = [c.choices[0] for c in answer]
        text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
        tokens = [t for c in chunks if c.logprobs for t in c.logprobs.content]
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        tokens = answer.choices[0].logprobs.content
    assert (text, reason) == (wanted, "stop")
    shown = "".join(t.token for t in tokens)
    assert len(wanted) <= len(shown) < len(wanted) + max(len(t.token) for t in tokens)  # the last may reach beyond


def test_stop_that_does_not_come_is_given_in_the_end(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=user("<<hello wor>>"), stop=["world"])
    assert answer.choices[0].message.content == "hello wor"


def test_max_tokens(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        given: Any = {name: 3}
        answer = client.chat.completions.create(model="demo", messages=user("go on"), **given)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3


def test_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=user("<<one>>"), n=3, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {"one"}
    chunks = client.chat.completions.create(model="demo", messages=user("<<one>>"), n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "one", 1: "one"}


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=user("say <<hello>>"), logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert "".join(t.token for t in found.content) == "hello"
    assert bytes(b for t in found.content for b in t.bytes or []) == b"hello"
    assert all(len(t.top_logprobs) == 2 and t.logprob == t.top_logprobs[0].logprob for t in found.content)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="say <<one>>", logprobs=2)
    assert answer.choices[0].text == "one"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == "one"
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0
    echoed = client.completions.create(model="demo", prompt=["<<one>>", "<<two>>"], echo=True, n=2)
    assert [c.text for c in echoed.choices] == ["<<one>>one"] * 2 + ["<<two>>two"] * 2
    assert client.completions.create(model="demo", prompt="go on").usage.completion_tokens == 16  # type: ignore[union-attr]


def test_completions_of_tokens(server: Server, client: openai.OpenAI) -> None:
    ids = server.post("/tokenize", {"content": "<<three>>"}).json()["tokens"]
    assert client.completions.create(model="demo", prompt=ids).choices[0].text == "three"
    assert [c.text for c in client.completions.create(model="demo", prompt=[ids, ids]).choices] == ["three"] * 2


def test_completions_stream(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="demo", prompt="<<one two>>", stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "one two"
    assert chunks[-1].choices[0].finish_reason == "stop"


TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLED = (
    '<<I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "n": [1, {"a": "}"}]}}\n</tool_call>>>'
)


def test_tool_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=user(CALLED), tools=TOOLS)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Bern", "n": [1, {"a": "}"}]}')


def test_tool_call_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=user(CALLED), tools=TOOLS) as stream:
        kinds = [each.type for each in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    assert call.function.arguments == '{"city": "Bern", "n": [1, {"a": "}"}]}'
    assert final.choices[0].finish_reason == "tool_calls"


def test_no_tool_call_where_there_are_no_tools(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model="demo", messages=user(CALLED))
    assert "<tool_call>" in (plain.choices[0].message.content or "")
    none = client.chat.completions.create(model="demo", messages=user(CALLED), tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.tool_calls is None


def test_results_of_tools_are_taken(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages: Any = [
        *user("how is it?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "<<sunny>>"},
    ]
    answer = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "sunny"


def test_reasoning(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=user("<<<think>\nwell\n</think>\n\nyes>>"))
    message = answer.choices[0].message
    assert message.content == "yes"
    assert (message.model_extra or {})["reasoning_content"] == "\nwell\n"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["a", 3]}, "stop.1"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
        ),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"seed": "x"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"model": 5}, "model"),
    ],
)
def test_wrong_fields_are_named(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    given = {"model": "demo", "messages": user("<<x>>"), **body}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=given, cast_to=object)
    error: Any = caught.value
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert param.split(".")[0] in error.message


def test_what_has_no_meaning_here_is_ignored(client: openai.OpenAI) -> None:
    more: Any = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "no_such_field": [1]}
    answer = client.post("/chat/completions", body={"model": "demo", "messages": user("<<x>>"), **more}, cast_to=object)
    assert answer


def test_error_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=user("x"))
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.completions.create(model="demo", prompt=[5] * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="out of range"):
        client.completions.create(model="demo", prompt=[10**9])
    with pytest.raises(openai.InternalServerError, match="wait already") as full:
        client.completions.create(model="demo", prompt=["go on"] * 64, n=2)
    assert full.value.status_code == 503
    assert int(full.value.response.headers["retry-after"]) > 0


def test_tokens_and_templates(server: Server) -> None:
    ids = server.post("/tokenize", {"content": "Hello <|user|>"}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["content"] == "Hello <|user|>"
    pieces = server.post("/tokenize", {"content": "Hello", "with_pieces": True}).json()["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == "Hello"
    prompt = server.post("/apply-template", {"messages": user("hi")}).json()["prompt"]
    assert prompt == "<|begin|><|user|>hi<|end|><|assistant|>"
    rendered = server.post("/tokenize", {"messages": user("hi")}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": rendered}).json()["content"] == prompt
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**6]}).status_code == 400


def test_status(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/props").json()["default_generation_settings"]["n_ctx"] == 4096
    assert server.get("/slots").json() == []
    figures = server.get("/metrics").text
    assert "dllama_output_tokens_total" in figures
    assert "dllama_engine_running 0.0" in figures
    document = server.get("/openapi.json").json()
    assert document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert server.get("/nothing").status_code == 404
    assert server.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert server.get("/v1/completions").status_code == 405
