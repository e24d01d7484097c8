"""Answers parsed while they stream: however text is cut, it comes to the same."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama_mpi.server.events import CallArguments, CallStart, Content, Parser, Reasoning
from dllama_mpi.server.parsing import STYLES, Style, parser_of, style_of
from dllama_mpi.server.xml_calls import converted, kinds_of

ARGUMENTS = '{"city": "Bern \\"x\\" }", "n": [1, {"a": "]"}], "empty": {}}'
NAMES = frozenset({"weather", "time"})
SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "where": {"$ref": "#/$defs/place"},
            "unit": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
        },
        "$defs": {"place": {"type": "object"}},
    }
}
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
    (
        "qwen3_coder",
        'Look.\n<tool_call>\n<function=weather>\n<parameter=city>\nSt. "Gallen"\n\\ </p>\n\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
        '<parameter=where>\n{"x": [1, 2]}\n</parameter>\n<parameter=unit>\nnull\n</parameter>\n'
        "<parameter=other>\n5\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=time>\n</function>\n</tool_call>",
        "Look.",
        "",
        [
            (
                "weather",
                {"city": 'St. "Gallen"\n\\ </p>\n', "days": 3, "exact": True, "where": {"x": [1, 2]}, "unit": None}
                | {"other": "5"},
            ),
            ("time", {}),
        ],
    ),
    (
        "qwen3_coder",
        "<function=weather><parameter=city>Bern</parameter><parameter=days>many</parameter></function> done",
        "done",
        "",
        [("weather", {"city": "Bern", "days": "many"})],
    ),
    ("qwen3_coder", "<tool_call><function=time></tool_call>", "", "", [("time", {})]),
    ("qwen3_coder", "<function=unknown> in XML", "<function=unknown> in XML", "", []),
    ("qwen3_coder", "1 <func", "1 <func", "", []),
    ("qwen3_coder", '{"a": 1}', '{"a": 1}', "", []),
    (
        "harmony",
        "<|channel|>analysis<|message|>So <|x|>.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        "Yes.",
        "So <|x|>.",
        [],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>analysis<|message|>B.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
        "I look.",
        "A.\n\nB.",
        [("weather", json.loads(ARGUMENTS))],
    ),
    (
        "harmony",
        " to=functions.time<|channel|>commentary json<|message|>{}<|call|><|start|>assistant to=functions.time"
        "<|channel|>analysis<|message|>",
        "",
        "",
        [("time", {}), ("time", {})],
    ),
    ("harmony", "<|channel|>analysis to=browser.search code<|message|>{}<|call|>", "", "{}", []),
    ("harmony", "plain text", "plain text", "", []),
    ("harmony", "<|channel|>final<|message|>cut <|en", "cut <|en", "", []),
    ("harmony", "<|channel|>final<|message|>done<|end|><|start|>assis", "done", "", []),
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


def read(parser: Parser, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
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
    found = read(parser_of(Style(style, NAMES, thinks=True, schemas=SCHEMAS)), pieces)
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
                "<function=weather>",
                "<parameter=city>",
                "<parameter=days>",
                "</parameter>",
                "</function>",
                "<|channel|>analysis",
                "<|channel|>commentary to=functions.time",
                "<|message|>",
                "<|end|>",
                "<|start|>",
            ]
        ),
        max_size=12,
    ),
    st.sampled_from(STYLES),
    st.booleans(),
)
def test_nothing_breaks_it(pieces: list[str], style: str, is_thinking: bool) -> None:
    read(parser_of(Style(style, NAMES, thinks=True, is_thinking=is_thinking)), pieces)


@given(st.text(max_size=60))
def test_text_stays(text: str) -> None:
    content, reasoning, calls = read(parser_of(Style()), list(text))
    assert (content, reasoning, calls) == (text, "", [])


def test_a_call_that_is_cut_is_given_as_far_as_it_went() -> None:
    parser = parser_of(Style("hermes", NAMES))
    found = read(parser, ['<tool_call>{"name": "time", "arguments": {"a": "b'])
    assert found == ("", "", [("time", '{"a": "b')])


def test_thinking_that_the_prompt_has_opened() -> None:
    found = read(parser_of(Style(thinks=True, is_thinking=True)), ["so\n</th", "ink>\n", "\nyes"])
    assert found == ("yes", "so\n", [])


def test_style_of_templates() -> None:
    assert style_of("... <tool_call> ...") == "hermes"
    assert style_of("[AVAILABLE_TOOLS] [TOOL_CALLS]") == "mistral"
    assert style_of('{"name": function name, "parameters": dict} <|eot_id|>') == "llama3"
    assert style_of("<tool_call> <function=example> <parameter=example>") == "qwen3_coder"
    assert style_of("<|start|>assistant<|channel|>final<|message|>") == "harmony"
    assert style_of("<|im_start|>") == "none"


def test_text_arguments_stream() -> None:
    parser = parser_of(Style("qwen3_coder", NAMES, schemas=SCHEMAS))
    parser.feed("<tool_call>\n<function=weather>\n<parameter=city>\n")
    assert parser.feed("Be") == [CallArguments(0, "Be")]
    assert parser.feed("rn\n") == [CallArguments(0, "rn")]
    assert parser.feed('"') == [CallArguments(0, '\\n\\"')]
    assert parser.complete_calls == 0
    assert parser.feed("\n</parameter>\n</function>") == [CallArguments(0, '"}')]
    assert parser.complete_calls == 1


def test_channels_without_tools_make_no_calls() -> None:
    text = "<|channel|>commentary to=functions.time<|message|>{}<|call|>"
    assert read(parser_of(Style("harmony")), [text]) == ("", "{}", [])


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {}, "5"),
        ("5.0", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5.5", {"type": "number"}, 5.5),
        ("5", {"type": "number"}, 5),
        ("NaN", {"type": "number"}, "NaN"),
        (" FALSE ", {"type": "boolean"}, False),
        ("None", {"type": ["string", "null"]}, None),
        ("[1]", {"type": ["string", "array"]}, [1]),
        ("[1", {"type": "array"}, "[1"),
        ("2", {"enum": [1, 2]}, 2),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("2", {"const": 2}, 2),
        ('{"a": 1}', {"$ref": "#/$defs/nowhere"}, {"a": 1}),
        ("1", {"$ref": "#/$defs/n"}, 1),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
    ],
)
def test_values_get_the_types_of_the_schema(text: str, schema: Any, value: Any) -> None:
    found = converted(text, kinds_of(schema, {"$defs": {"n": {"type": "integer"}}}))
    assert (type(found), found) == (type(value), value)


def test_a_schema_that_refers_to_itself_ends() -> None:
    assert kinds_of({"$ref": "#/a"}, {"a": {"$ref": "#/a"}}) == {"string"}
