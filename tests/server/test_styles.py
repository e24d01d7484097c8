"""Answers with reasoning, forms and calls, as clients see them: channels, parallel calls, tokens of reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.server.running import Server, events, scripted
from tests.server.scripted import load_tokenizer

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bern", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
SCHEMA: Any = TOOLS[0]["function"]["parameters"]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
CHANNELS = "<|channel|>analysis<|message|>Well.<|end|><|start|>assistant"
HARMONY_CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Bern"}'


@pytest.fixture(scope="module", params=["hermes"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with scripted(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def harmony() -> Iterator[Server]:
    with scripted("harmony") as found:
        yield found


def ask(server: Server, text: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the one choice of an answer to `<<text>>`, and the usage."""
    body = {"messages": [{"role": "user", "content": f"<<{text}>>"}], **more}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0], answer.json()["usage"]


def streamed(server: Server, text: str, **more: Any) -> tuple[dict[str, str], list[Any], str]:
    """Return the text of each kind, the calls' parts and the end of a stream."""
    body = {"messages": [{"role": "user", "content": f"<<{text}>>"}], "stream": True, **more}
    texts, calls, reason = {"content": "", "reasoning_content": ""}, [], ""
    for chunk in events(server.post("/v1/chat/completions", body).text)[:-1]:
        delta = chunk["choices"][0]["delta"]
        for kind in texts:
            texts[kind] += delta.get(kind) or ""
        calls += delta.get("tool_calls", [])
        reason = chunk["choices"][0]["finish_reason"] or reason
    return texts, calls, reason


def tokens(text: str) -> int:
    """Return how many tokens a text is."""
    return len(load_tokenizer().encode(text, add_special_tokens=False))


# ---- channels


def test_channels(harmony: Server) -> None:
    choice, usage = ask(harmony, f"{CHANNELS}<|channel|>final<|message|>Yes.")
    assert choice["message"]["content"] == "Yes."
    assert choice["message"]["reasoning_content"] == "Well."
    assert usage["completion_tokens"] == tokens(f"{CHANNELS}<|channel|>final<|message|>Yes.")
    thought = tokens("<|channel|>analysis<|message|>Well.<|end|>")
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}
    texts, _, reason = streamed(harmony, f"{CHANNELS}<|channel|>final<|message|>Yes.")
    assert (texts, reason) == ({"content": "Yes.", "reasoning_content": "Well."}, "stop")


def test_calls_in_channels(harmony: Server) -> None:
    choice, _ = ask(harmony, CHANNELS + HARMONY_CALL, tools=TOOLS)
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Bern"})
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    _, calls, reason = streamed(harmony, CHANNELS + HARMONY_CALL, tools=TOOLS)
    assert "".join(each["function"]["arguments"] for each in calls) == '{"city": "Bern"}'
    assert (len(calls) > 3, reason) == (True, "tool_calls")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (CHANNELS + HARMONY_CALL, "tool_calls"),
        (HARMONY_CALL, "tool_calls"),
        (CHANNELS + HARMONY_CALL.replace("Bern", "Nowhere"), "length"),
        (CHANNELS + "<|channel|>final<|message|>No.", "length"),
    ],
)
def test_calls_in_channels_that_are_forced(harmony: Server, said: str, reason: str) -> None:
    assert ask(harmony, said, tools=TOOLS, tool_choice="required")[0]["finish_reason"] == reason


def test_forms_in_channels(harmony: Server) -> None:
    final = CHANNELS + "<|channel|>final<|message|>"
    assert ask(harmony, final + '{"city": "Bern"}', response_format=FORMAT)[0]["finish_reason"] == "stop"
    choice, _ = ask(harmony, final + '{"city": "Nowhere"}', response_format=FORMAT)
    assert (choice["finish_reason"], choice["message"]["reasoning_content"]) == ("length", "Well.")


# ---- reasoning and forms


@pytest.mark.parametrize("thought", ["", "<think>\nIs it {Bern}?\n</think>"])
def test_a_form_holds_behind_reasoning(server: Server, thought: str) -> None:
    choice, usage = ask(server, thought + '{"city": "Bern"}', response_format=FORMAT)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", '{"city": "Bern"}')
    assert choice["message"].get("reasoning_content", "") == thought[7:-8]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == tokens(thought)


@pytest.mark.parametrize("said", ["no JSON", "<think>hm</think>no JSON", "<think>hm", '{"city": "Nowhere"}'])
def test_what_does_not_keep_to_a_form_does_not_come(server: Server, said: str) -> None:
    choice, _ = ask(server, said, response_format=FORMAT)
    assert choice["finish_reason"] == "length"
    assert "no" not in choice["message"]["content"].lower()


def test_a_call_is_forced_behind_reasoning(server: Server) -> None:
    choice, _ = ask(server, f"<think>hm</think>{CALL}", tools=TOOLS, tool_choice="required")
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == ("tool_calls", 1)
    assert choice["message"]["reasoning_content"] == "hm"


def test_reasoning_tokens(server: Server) -> None:
    _, usage = ask(server, "<think>\nwell, well\n</think>\n\nyes")
    assert usage["completion_tokens_details"]["reasoning_tokens"] == tokens("<think>\nwell, well\n</think>")
    assert usage["completion_tokens"] > usage["completion_tokens_details"]["reasoning_tokens"]
    assert ask(server, "yes")[1]["completion_tokens_details"]["reasoning_tokens"] == 0
    body = {"input": "<<<think>well</think>yes>>"}
    usage = server.post("/v1/responses", body).json()["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == tokens("<think>well</think>")


def test_reasoning_that_is_cut(server: Server) -> None:
    choice, usage = ask(server, "<think>well, well, well", max_tokens=3)
    assert (choice["finish_reason"], usage["completion_tokens_details"]["reasoning_tokens"]) == ("length", 3)


# ---- parallel calls


def test_calls_are_parallel_unless_told(server: Server) -> None:
    said = f"I look. {CALL}\n{CALL}"
    choice, _ = ask(server, said, tools=TOOLS)
    assert len(choice["message"]["tool_calls"]) == 2
    choice, usage = ask(server, said, tools=TOOLS, parallel_tool_calls=False)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
    assert [json.loads(c["function"]["arguments"]) for c in choice["message"]["tool_calls"]] == [{"city": "Bern"}]
    assert usage["completion_tokens"] < tokens(said)


def test_a_stream_ends_with_its_only_call(server: Server) -> None:
    more: Any = {"tools": TOOLS, "parallel_tool_calls": False, "n": 2}
    body = {"messages": [{"role": "user", "content": f"<<{CALL}\n{CALL} more>>"}], "stream": True, **more}
    chunks = events(server.post("/v1/chat/completions", body).text)
    assert chunks.pop() == "[DONE]"
    for index in (0, 1):
        own = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        calls = [part for each in own for part in each["delta"].get("tool_calls", [])]
        assert "".join(part["function"]["arguments"] for part in calls) == '{"city": "Bern"}'
        assert not any(each["delta"].get("content") for each in own)
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == ["tool_calls"]
    server.until_idle()


def test_anthropic_and_responses_have_one_call_too(server: Server) -> None:
    said: Any = [{"role": "user", "content": f"<<{CALL}\n{CALL}>>"}]
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        used = client.messages.create(model="demo", max_tokens=99, messages=said, tools=tools, tool_choice=choice)
        assert (used.stop_reason, len(used.content)) == ("tool_use", 1)
        used = client.messages.create(model="demo", max_tokens=99, messages=said, tools=tools)
        assert len(used.content) == 2
    function: Any = {"type": "function", **TOOLS[0]["function"]}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other:
        for is_parallel in (True, False):
            made = other.responses.create(
                model="demo", input=said, tools=[function], parallel_tool_calls=is_parallel, store=False
            )
            assert len(made.output) == 1 + is_parallel
            assert made.parallel_tool_calls is is_parallel
