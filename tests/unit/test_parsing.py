"""Answers parsed while they stream: however text is cut, it comes to the same."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama_mpi.server.parsing import (
    AnswerParser,
    CallArguments,
    CallStart,
    Content,
    Reasoning,
    Style,
    style_of,
)

ARGUMENTS = '{"city": "Bern \\"x\\" }", "n": [1, {"a": "]"}], "empty": {}}'
NAMES = frozenset({"weather", "time"})
CASES: list[tuple[str, str, str, str, list[tuple[str, Any]]]] = [
    # style, text, content, reasoning, calls
    ("hermes", "no call", "no call", "", []),
    ("hermes", "a <tool_ca", "a <tool_ca", "", []),
    ("hermes", '1 < 2 {"a": 1}', '1 < 2 {"a": 1}', "", []),
    (
        "hermes",
        f'Look.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "time"}</tool_call>\n',
        "Look.",
        "",
        [("weather", json.loads(ARGUMENTS)), ("time", {})],
    ),
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "{\\"a\\": 1}"}</tool_call> done',
        "done",
        "",
        [("weather", {"a": 1})],
    ),
    ("hermes", '{"name": "time", "arguments": {"a": 1}}', "", "", [("time", {"a": 1})]),
    ("hermes", '{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', "", []),
    ("hermes", "<tool_call>{broken}</tool_call>", "{broken}</tool_call>", "", []),
    ("hermes", "<tool_call>none", "none", "", []),
    ("llama3", f'{{"name": "weather", "parameters": {ARGUMENTS}}}', "", "", [("weather", json.loads(ARGUMENTS))]),
    (
        "llama3",
        '<|python_tag|>{"name": "weather", "parameters": {}}; {"name": "time", "parameters": {}}',
        "",
        "",
        [("weather", {}), ("time", {})],
    ),
    ("llama3", '{"type": "function", "name": "time", "parameters": {"z": 1}}', "", "", [("time", {"z": 1})]),
    ("llama3", '{"name": "unknown", "parameters": {"z": 1}}', '{"name": "unknown", "parameters": {"z": 1}}', "", []),
    ("llama3", '{"some": "json"} and text', '{"some": "json"} and text', "", []),
    ("llama3", "plain text {", "plain text {", "", []),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "time", "arguments": {{}}}}]',
        "",
        "",
        [("weather", json.loads(ARGUMENTS)), ("time", {})],
    ),
    (
        "mistral",
        'Look. [TOOL_CALLS]weather[ARGS]{"a": 1}[TOOL_CALLS]time[CALL_ID]abc[ARGS]{}',
        "Look.",
        "",
        [("weather", {"a": 1}), ("time", {})],
    ),
    ("none", "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", "", []),
    ("hermes", "<think>well, \n</think>\n\nyes", "yes", "well, \n", []),
    (
        "hermes",
        '\n<think>a<tool_call></think>\n<tool_call>{"name": "time", "arguments": {}}</tool_call>',
        "",
        "a<tool_call>",
        [("time", {})],
    ),
    ("none", "<think>never ends </thin", "", "never ends </thin", []),
    ("none", "a <think>b</think>", "a <think>b</think>", "", []),
]


def read(parser: AnswerParser, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the content, the reasoning and the calls that pieces come to."""
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    content = "".join(e.text for e in events if isinstance(e, Content))
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    calls: list[tuple[str, str]] = []
    for e in events:
        if isinstance(e, CallStart):
            assert e.index == len(calls)
            calls.append((e.name, ""))
        elif isinstance(e, CallArguments):
            calls[e.index] = (calls[e.index][0], calls[e.index][1] + e.text)
    return content, reasoning, calls


@pytest.mark.parametrize(("style", "text", "content", "reasoning", "calls"), CASES)
@given(data=st.data())
def test_cut_anyhow(
    style: str, text: str, content: str, reasoning: str, calls: list[tuple[str, Any]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=len(text))))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    found = read(AnswerParser(Style(style, NAMES, thinks=True)), pieces)
    assert found[:2] == (content, reasoning)
    assert [(name, json.loads(arguments)) for name, arguments in found[2]] == calls


@given(
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                '{"name": "time", "arguments": {',
                "}",
                "<think>",
                "</think>",
                "[TOOL_CALLS]",
                "[",
                '"',
                "text",
                "\n",
                ";",
                "\\",
            ]
        ),
        max_size=12,
    ),
    st.sampled_from(["hermes", "llama3", "mistral", "none"]),
    st.booleans(),
)
def test_nothing_breaks_it(pieces: list[str], style: str, is_thinking: bool) -> None:
    read(AnswerParser(Style(style, NAMES, thinks=True, is_thinking=is_thinking)), pieces)


@given(st.text(max_size=60))
def test_text_stays(text: str) -> None:
    content, reasoning, calls = read(AnswerParser(Style()), list(text))
    assert (content, reasoning, calls) == (text, "", [])


def test_a_call_that_is_cut_is_given_as_far_as_it_went() -> None:
    parser = AnswerParser(Style("hermes", NAMES))
    found = read(parser, ['<tool_call>{"name": "time", "arguments": {"a": "b'])
    assert found == ("", "", [("time", '{"a": "b')])


def test_thinking_that_the_prompt_has_opened() -> None:
    found = read(AnswerParser(Style(thinks=True, is_thinking=True)), ["so\n</th", "ink>\n", "\nyes"])
    assert found == ("yes", "so\n", [])


def test_style_of_templates() -> None:
    assert style_of("... <tool_call> ...") == "hermes"
    assert style_of("[AVAILABLE_TOOLS] [TOOL_CALLS]") == "mistral"
    assert (
        style_of('{"name": function name, "parameters": dict} <|eot_id|>'.replace("parameters", "parameters"))
        == "llama3"
    )
    assert style_of("<|im_start|>") == "none"
