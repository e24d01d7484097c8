"""Answers that keep to a form, by masks that every rank applies to its own rows: schemas, grammars, forced calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.server.running import Server, served
from tests.tiers import slow


@pytest.fixture(scope="module", params=[2, slow(1), slow(3)])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with served(request.param, "--nthreads", "1", "--tool-parser", "hermes", "--speculate", "lookup") as found:
        yield found


SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "n": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "additionalProperties": False}}},
]
ASKED: Any = [{"role": "user", "content": "What?"}]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_answers_keep_to_a_schema(client: openai.OpenAI, temperature: float) -> None:
    given: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model="demo", messages=ASKED, response_format=given, temperature=temperature, n=3, max_tokens=300
    )
    for choice in answer.choices:
        found = json.loads(choice.message.content or "")
        assert set(found) == {"city", "n"}
        assert found["city"] in ("Bern", "Rome")
        assert 10 <= found["n"] <= 99
        assert choice.finish_reason == "stop"


def test_responses_keep_to_a_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}
    response = client.responses.create(model="demo", input="What?", text=wanted)
    assert json.loads(response.output_text)["city"] in ("Bern", "Rome")


def test_a_constrained_answer_leaves_others_alone(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> str:
        answer = client.chat.completions.create(model="demo", messages=ASKED, temperature=0, max_tokens=30, **more)
        return answer.choices[0].message.content or ""

    alone = ask()
    given: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    assert ask(response_format=given) != alone
    assert ask() == alone


def test_any_json(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASKED, response_format={"type": "json_object"}, max_tokens=300, temperature=0
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_answers_keep_to_a_grammar(client: openai.OpenAI) -> None:
    def ask(grammar: str) -> str:
        more = {"grammar": grammar}
        answer = client.chat.completions.create(model="demo", messages=ASKED, extra_body=more, max_tokens=40)
        return answer.choices[0].message.content or ""

    assert ask('root ::= ("yes" | "no") " " [0-9]') in {f"{word} {i}" for word in ("yes", "no") for i in range(10)}
    assert ask('start: "one" | "two"') in ("one", "two")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
    ],
)
def test_tool_calls_that_are_forced(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASKED, tools=TOOLS, tool_choice=choice, temperature=1.5, max_tokens=300
    ).choices[0]
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in names
    assert set(json.loads(call.function.arguments)) == ({"city", "n"} if call.function.name == "weather" else set())
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)


def test_anthropic_tools_that_are_forced(server: Server) -> None:
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            wanted: Any = choice
            used = client.messages.create(model="demo", max_tokens=300, messages=ASKED, tools=tools, tool_choice=wanted)
            assert used.stop_reason == "tool_use"
            assert used.content[-1].model_dump()["input"]["city"] in ("Bern", "Rome")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"grammar": "root ::= ((("}, "grammar"),
        ({"grammar": "a" * 300_000}, "grammar"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
    ],
)
def test_forms_that_cannot_be(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"messages": ASKED, "max_tokens": 5, **body}, cast_to=object)
    assert caught.value.param == param


@pytest.mark.slow
def test_forms_of_a_model_that_reasons(tmp_path: Path) -> None:
    """The demo model's reasoning, opened by the prompt, never ends by itself: no form begins, and all of it counts."""
    file = tmp_path / "thinking.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# ends with </think> #}")
    with served(2, "--nthreads", "1", "--chat-template", str(file)) as server:
        body: dict[str, Any] = {"messages": ASKED, "max_tokens": 40}
        given: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
        answer = server.post("/v1/chat/completions", {**body, "response_format": given}).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 40}


def test_calls_of_other_styles_that_are_forced() -> None:
    with served(2, "--nthreads", "1", "--tool-parser", "qwen3_coder") as server:
        body = {"messages": ASKED, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200, "temperature": 1.5}
        choice = server.post("/v1/chat/completions", body).json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] in ("weather", "time")
        assert arguments == {} or 10 <= arguments["n"] <= 99
        assert choice["finish_reason"] == "tool_calls"
