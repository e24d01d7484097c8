"""OpenAI's responses as its own Python package calls them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.running import Server, scripted


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with scripted() as found:
        yield found


TOOLS: Any = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]
CALLED = '<<I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>>>'


def test_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="demo", input="say <<hello>>", instructions="be brief")
    assert (answer.output_text, answer.status, answer.object) == ("hello", "completed", "response")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.input_tokens_details.cached_tokens > 0
    assert client.responses.retrieve(answer.id).output_text == "hello"
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_stream(client: openai.OpenAI) -> None:
    told = list(client.responses.create(model="demo", input="say <<hello>>", stream=True))
    names = [each.type for each in told]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [each.sequence_number for each in told] == list(range(len(told)))
    deltas = [each.delta for each in told if each.type == "response.output_text.delta"]
    assert "".join(deltas) == "hello"
    last: Any = told[-1]
    assert last.response.output_text == "hello"


def test_stream_helper_puts_a_tool_call_together(client: openai.OpenAI) -> None:
    with client.responses.stream(model="demo", input=CALLED, tools=TOOLS) as stream:
        final = stream.get_final_response()
    message, call = final.output
    assert message.type == "message"
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("weather", '{"city": "Bern"}')


def test_conversation_that_is_remembered(client: openai.OpenAI) -> None:
    first = client.responses.create(model="demo", input="say <<one>>")
    second = client.responses.create(model="demo", input="again", previous_response_id=first.id)
    assert second.output_text == "one"  # its prompt holds the first turn
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    unkept = client.responses.create(model="demo", input="say <<one>>", store=False)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="demo", input="again", previous_response_id=unkept.id)
    assert caught.value.param == "previous_response_id"


def test_items(client: openai.OpenAI) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "how is it?"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "<<sunny>>"},
    ]
    assert client.responses.create(model="demo", input=items, tools=TOOLS).output_text == "sunny"


def test_reasoning_and_length(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="demo", input="<<<think>well</think>yes>>")
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output_text == "yes"
    cut = client.responses.create(model="demo", input="go on", max_output_tokens=2)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "message", "role": "user"}]}, "input.0"),
        ({"input": [{"type": "image"}]}, "input.0.type"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "previous_response_id": "none"}, "previous_response_id"),
    ],
)
def test_wrong_fields_are_named(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body=body, cast_to=object)
    assert caught.value.param == param
