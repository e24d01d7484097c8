"""Anthropic's routes as its own Python package calls them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.server.running import Server, scripted


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with scripted("hermes", "key-of-one", "key-of-two") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="key-of-two", max_retries=0) as found:
        yield found


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


TOOLS: Any = [{"name": "weather", "description": "How it is", "input_schema": {"type": "object", "properties": {}}}]
CALLED = '<<I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>>>'


def test_message(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="demo", max_tokens=50, messages=user("say <<hello>>"), system="be brief")
    assert (answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "end_turn")
    assert [block.model_dump()["text"] for block in answer.content] == ["hello"]
    assert answer.usage.output_tokens > 0
    assert answer.usage.input_tokens > 0
    assert answer.usage.cache_read_input_tokens


def test_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="demo", max_tokens=50, messages=user("say <<hello>>")) as stream:
        kinds = [each.type for each in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert final.content[0].model_dump()["text"] == "hello"
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 0


def test_ends(client: anthropic.Anthropic) -> None:
    stopped = client.messages.create(
        model="demo", max_tokens=50, messages=user("say <<hello>>"), stop_sequences=["llo"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "llo")
    assert stopped.content[0].model_dump()["text"] == "he"
    cut = client.messages.create(model="demo", max_tokens=2, messages=user("go on"))
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: anthropic.Anthropic, stream: bool) -> None:
    given: Any = {"model": "demo", "max_tokens": 500, "messages": user(CALLED), "tools": TOOLS}
    if stream:
        with client.messages.stream(**given) as events:
            answer: Any = events.get_final_message()
    else:
        answer = client.messages.create(**given)
    assert answer.stop_reason == "tool_use"
    text, use = answer.content
    assert (text.text, use.name, use.input) == ("I look.", "weather", {"city": "Bern"})


def test_results_of_tools_are_taken(client: anthropic.Anthropic) -> None:
    messages: Any = [
        *user("how is it?"),
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "<<sunny>>"}]}
            ],
        },
    ]
    answer = client.messages.create(model="demo", max_tokens=50, messages=messages, tools=TOOLS)
    assert answer.content[0].model_dump()["text"] == "sunny"


@pytest.mark.parametrize("stream", [False, True])
def test_thinking(client: anthropic.Anthropic, stream: bool) -> None:
    given: Any = {"model": "demo", "max_tokens": 500, "messages": user("<<<think>well</think>yes>>")}
    if stream:
        with client.messages.stream(**given) as events:
            answer: Any = events.get_final_message()
    else:
        answer = client.messages.create(**given)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert (answer.content[0].thinking, answer.content[1].text) == ("well", "yes")


def test_count(client: anthropic.Anthropic) -> None:
    one = client.messages.count_tokens(model="demo", messages=user("hello"))
    two = client.messages.count_tokens(model="demo", messages=user("hello"), system="a system")
    assert 0 < one.input_tokens < two.input_tokens
    answer = client.messages.create(model="demo", max_tokens=1, messages=user("hello"))
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == one.input_tokens


def test_errors(server: Server, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="demo", max_tokens=0, messages=user("x"))
    image: Any = [{"type": "image", "source": {}}]
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(model="demo", max_tokens=1, messages=[{"role": "user", "content": image}])
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", max_tokens=1, messages=user("x"))
    with (
        anthropic.Anthropic(base_url=server.url, api_key="key-of-three", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        stranger.messages.create(model="demo", max_tokens=1, messages=user("x"))
    body: Any = caught.value.body
    assert body["error"]["type"] == "authentication_error"
