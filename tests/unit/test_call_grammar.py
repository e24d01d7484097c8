"""Grammars of calls and of what follows reasoning: which texts they let through, whichever way they are told."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from dllama_mpi.server.errors import ApiError
from dllama_mpi.server.grammar import Grammars, MakeConstraint
from dllama_mpi.server.schema import ResponseFormat, Tool
from tests.server.scripted import load_tokenizer

TOKENIZER = load_tokenizer()
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)
PLACE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
PARAMETERS: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "n": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "where": {"$ref": "#/$defs/place"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"place": PLACE},
}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "time"}}),
    Tool.model_validate({"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}),
]
ANALYSIS = "<|channel|>analysis<|message|>1 < 2 <| </x>\n<|end|><|start|>assistant"
COMMENTARY = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"


def refused(make: MakeConstraint, text: str) -> str | None:
    """Return what of a text is refused, "" for its end, None if all of it may come."""
    constraint = make()
    ids = [*TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.added_tokens["<|return|>"]]
    for at, token in enumerate(ids):
        mask = constraint.mask()
        if not mask[token // 32] >> np.uint32(token % 32) & 1:
            return TOKENIZER.decode(ids[at:-1], False)
        constraint.accept(token)
    return None


def xml(*parameters: str, name: str = "weather") -> str:
    """Return a call with these parameters."""
    parts = (f"<parameter={p.partition('=')[0]}>\n{p.partition('=')[2]}\n</parameter>\n" for p in parameters)
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "x", "where": {"a": 1}}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "time", "arguments": {"any": 1}}\n</tool_call>'),
        ("llama3", '{"name": "weather", "parameters": {"city": "x"}}'),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "x"}}]'),
        ("harmony", COMMENTARY + '{"city": "x", "where": {"a": 1}}'),
        ("harmony", ANALYSIS + COMMENTARY + '{"city": "x"}'),
        ("qwen3_coder", xml("city=St.\n\n Gallen </p> <x\n", "n=5", "unit=F", 'where={"a": 1}')),
        ("qwen3_coder", xml("city=")),
        ("qwen3_coder", xml(name="time")),
    ],
)
def test_calls_that_may_come(style: str, text: str) -> None:
    assert refused(GRAMMARS.of_tools(TOOLS, style), text) is None


@pytest.mark.parametrize(
    ("style", "text", "rest"),
    [
        ("hermes", "Hello", "Hello"),
        ("llama3", '{"name": "weather", "parameters": {"n": 1}}', None),
        ("harmony", ANALYSIS + "<|channel|>final<|message|>x", "final<|message|>x"),
        ("harmony", ANALYSIS, ""),
        ("harmony", COMMENTARY + "{}", None),
        ("qwen3_coder", xml(), None),
        ("qwen3_coder", xml("city=x", "n=many"), None),
        ("qwen3_coder", xml("city=x", "unit=K"), None),
        ("qwen3_coder", xml(name="other"), None),
    ],
)
def test_calls_that_may_not(style: str, text: str, rest: str | None) -> None:
    found = refused(GRAMMARS.of_tools(TOOLS, style), text)
    assert found is not None
    assert rest is None or found == rest


def test_a_model_that_knows_no_tools() -> None:
    with pytest.raises(ApiError, match="knows of no tools"):
        GRAMMARS.of_tools(TOOLS, "none")


@pytest.mark.parametrize("first", [None, TOKENIZER.added_tokens["<think>"]])
def test_a_form_behind_reasoning(first: int | None) -> None:
    form = GRAMMARS.of_format(ResponseFormat(type="json_object"), "response_format")
    behind = GRAMMARS.behind(form, re.compile("</think>"), first)
    opener = "" if first is None else "<think>"
    assert refused(behind, opener + 'so {"a": 1} it is</think>{"a": 2}') is None
    assert refused(behind, opener + "so</think>what") == "what"
    assert refused(behind, opener + "so") == ""
    assert refused(behind, '{"a": 2}') == ("" if first is None else None)


def test_an_end_of_reasoning_that_is_no_token() -> None:
    form = GRAMMARS.of_format(ResponseFormat(type="json_object"), "response_format")
    assert refused(GRAMMARS.behind(form, re.compile("<done>")), 'a < b <done>{"a": 2}') is None
