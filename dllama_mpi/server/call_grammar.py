"""The grammar of one tool call, in Lark as llguidance reads it, for each style of writing calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from .schema import Tool
from .xml_calls import kinds_of

# Between the parts of JSON: enough to write it in lines, too little for a model to get lost in.
JSON: Any = {"whitespace_pattern": r" ?|\n {0,16}"}
_END = "<|end|>"
Mark = Callable[[str], str]


def call_grammar(tools: Sequence[Tool], style: str, mark: Mark) -> str:
    """Return the grammar of one call of one of these tools. mark: how Lark has the text of a token.

    Raises:
        ValueError, RecursionError: a schema is no JSON.
    """
    if style == "harmony":
        return _harmony(tools, mark)
    if style == "qwen3_coder":
        return _xml(tools, mark)
    start = {
        "hermes": f'{mark("<tool_call>")} "\\n" call "\\n" {mark("</tool_call>")}',
        "mistral": f'{mark("[TOOL_CALLS]")} "[" call "]"',
    }.get(style, "call")
    lines = [f"start: {start}", _any(tools)]
    arguments = "parameters" if style == "llama3" else "arguments"
    return "\n".join([*lines, *(f"call_{i}: {_json(_call(tool, arguments))}" for i, tool in enumerate(tools))])


def _any(tools: Sequence[Tool]) -> str:
    return "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))


def _call(tool: Tool, arguments: str) -> dict[str, Any]:
    function = tool.function
    schema = function.parameters or {"type": "object"}
    properties = {"name": {"const": function.name}, arguments: schema}
    call = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return _definitions(schema) | call


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """Return what a schema refers to, for where it becomes a part of another or gives up a part."""
    return {name: schema[name] for name in ("$defs", "definitions") if name in schema}


def _json(schema: Any) -> str:
    return f"%json {json.dumps({'x-guidance': JSON, **schema} if isinstance(schema, dict) else schema)}"


def _harmony(tools: Sequence[Tool], mark: Mark) -> str:
    """Return the grammar of a call behind reasoning, if there is any."""
    channel, message = mark("<|channel|>"), mark("<|message|>")
    lines = [
        "start: thought? call",
        f'thought: {channel} "analysis" {message} text {mark("<|start|>")} "assistant"',
        r'text[suffix="<|end|>"]: /(?s:.*)/' if mark(_END) == json.dumps(_END) else f"text: /(?s:.*)/ {mark(_END)}",
        _any(tools),
    ]
    for i, tool in enumerate(tools):
        head = json.dumps(f"commentary to=functions.{tool.function.name} ", ensure_ascii=False)
        lines.append(f'call_{i}: {channel} {head} {mark("<|constrain|>")} "json" {message} body_{i}')
        lines.append(f"body_{i}: {_json(tool.function.parameters or {'type': 'object'})}")
    return "\n".join(lines)


def _xml(tools: Sequence[Tool], mark: Mark) -> str:
    """Return the grammar of a call whose parameters come in the schema's order."""
    lines = [
        f'start: {mark("<tool_call>")} "\\n" call "\\n" {mark("</tool_call>")}',
        _any(tools),
        'text[suffix="\\n</parameter>\\n"]: /(?s:.*)/',
    ]
    for i, tool in enumerate(tools):
        root = tool.function.parameters or {}
        properties = root.get("properties")
        needed = root.get("required") or ()
        body = [json.dumps(f"<function={tool.function.name}>\n", ensure_ascii=False)]
        for j, (name, schema) in enumerate(properties.items() if isinstance(properties, dict) else ()):
            body.append(f"value_{i}_{j}" + ("" if name in needed else "?"))
            head = json.dumps(f"<parameter={name}>\n", ensure_ascii=False)
            lines.append(f"value_{i}_{j}: {head} {_value(schema, root)}")
        lines.append(f'call_{i}: {" ".join(body)} "</function>"')
    return "\n".join(lines)


def _value(schema: Any, root: Any) -> str:
    """Return the grammar of a value and what ends it."""
    kinds, end = kinds_of(schema, root), '"\\n</parameter>\\n"'
    if kinds != {"string"}:
        return f"{_json({**_definitions(root), **schema})} {end}"
    options = schema.get("enum") if isinstance(schema, dict) else None
    if options and all(isinstance(each, str) for each in options):
        return f"({' | '.join(json.dumps(each, ensure_ascii=False) for each in options)}) {end}"
    return "text"
