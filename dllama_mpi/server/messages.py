"""Anthropic's messages: the same chats in another dialect."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from .anthropic_schema import Block, CountBody, MessagesBody, OfferedTool
from .chat import Answer, Prepared
from .events import CallStart, Content, Event, Reasoning
from .generation import Ask, Piece, Running, Usage, special_ids
from .http import Call, JSONAnswer, answer_with, event
from .schema import CalledFunction, FunctionTool, Message, Sampling, Tool, ToolCall
from .served import Served

_REASONS = {"stop": "end_turn", "length": "max_tokens"}


def conversation(body: CountBody) -> tuple[list[Message], list[Tool] | None]:
    """Return a conversation and its tools as OpenAI's routes have them."""
    found: list[Message] = []
    if body.system:
        found.append(Message(role="system", content=_text(body.system)))
    for turn in body.messages:
        blocks = [Block(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        if turn.role == "assistant":
            found.append(_assistant(blocks))
        else:
            found += [_result(block) for block in blocks if block.type == "tool_result"]
            if rest := [block for block in blocks if block.type == "text"]:
                found.append(Message(role=turn.role, content=_text(rest)))
    choice = body.tool_choice.type if body.tool_choice is not None else "auto"
    offered = None if choice == "none" or not body.tools else [_tool(tool) for tool in body.tools]
    return found, offered


def _text(content: str | Sequence[Block]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text or "" for block in content)


def _assistant(blocks: Sequence[Block]) -> Message:
    calls = [
        ToolCall(id=b.id, function=CalledFunction(name=b.name or "", arguments=json.dumps(b.input or {})))
        for b in blocks
        if b.type == "tool_use"
    ]
    text = "".join(b.text or "" for b in blocks if b.type == "text")
    thought = "".join(b.thinking or "" for b in blocks if b.type == "thinking")
    return Message(role="assistant", content=text, tool_calls=calls or None, reasoning_content=thought or None)


def _result(block: Block) -> Message:
    text = _text(block.content or "")
    return Message(role="tool", content=f"Error: {text}" if block.is_error else text, tool_call_id=block.tool_use_id)


def _tool(tool: OfferedTool) -> Tool:
    schema = tool.input_schema if tool.input_schema is not None else {"type": "object"}
    return Tool(type="function", function=FunctionTool(name=tool.name, description=tool.description, parameters=schema))


def _variables(body: CountBody) -> dict[str, Any]:
    """Return what templates that can think or not want to know."""
    return {} if body.thinking is None else {"enable_thinking": body.thinking.type != "disabled"}


def prepare(served: Served, body: MessagesBody) -> Prepared:
    """Return a conversation's prompt and parameters.

    Raises:
        ApiError: naming the field that is wrong.
    """
    served.check_name(body.model)
    messages, tools = conversation(body)
    prompt = served.render(messages, tools, **_variables(body))
    ids = served.encode(prompt, "messages", is_rendered=True)
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=body.stop_sequences)
    choice, form = body.tool_choice, None
    if choice is not None and choice.type in ("any", "tool"):
        form = served.forced(tools, choice.name if choice.type == "tool" else None)
    constraint, style = served.behind_thought(form, served.style(prompt, tools))
    shown = special_ids(served.tokenizer, style.marks)
    params = served.params(sampling, body.max_tokens, None)
    stops = served.stops(sampling)
    ask = Ask(tuple(ids), params, stops, shown=shown, is_chat=True, constraint=constraint, style=style)
    return Prepared(ask, style, choice is None or not choice.disable_parallel_tool_use)


async def messages(call: Call) -> Response:
    """Answer a conversation as Anthropic's API does."""
    body: MessagesBody = call.body
    served, engine = call.context.state.ready()
    prepared = await asyncio.to_thread(prepare, served, body)
    running = Running(served, engine, [prepared.ask])
    answer = Answer(served, prepared.style, 0, prepared.is_parallel)
    head = {"id": "msg_" + secrets.token_hex(12), "type": "message", "role": "assistant"}
    head["model"] = body.model or served.names[0]
    return await answer_with(
        call, running.close, lambda: _stream(running, answer, head), lambda: _whole(running, answer, head)
    )


async def count_tokens(call: Call) -> Response:
    """Count the tokens of a conversation."""
    body: CountBody = call.body
    served = call.served

    def count() -> int:
        served.check_name(body.model)
        found, tools = conversation(body)
        prompt = served.render(found, tools, **_variables(body))
        return len(served.count(prompt, "messages"))

    return JSONAnswer({"input_tokens": await asyncio.to_thread(count)})


def _usage(usage: Usage) -> dict[str, int]:
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    }


def _end(answer: Answer, piece: Piece) -> dict[str, Any]:
    """Return how an answer ended."""
    if answer.reason == "tool_calls":
        reason = "tool_use"
    elif piece.stopped_by is not None:
        reason = "stop_sequence"
    else:
        reason = _REASONS.get(answer.finish_reason or "", "end_turn")
    return {"stop_reason": reason, "stop_sequence": piece.stopped_by}


async def _whole(running: Running, answer: Answer, head: dict[str, Any]) -> dict[str, Any]:
    end: dict[str, Any] = {}
    async for piece in running:
        answer.take(piece, running)
        if answer.finish_reason is not None:
            end = _end(answer, piece)
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": "".join(answer.reasoning), "signature": ""})
    if answer.content or not answer.calls:
        content.append({"type": "text", "text": "".join(answer.content)})
    for each in answer.calls:
        content.append(_tool_use(each["id"], each["function"]["name"], each["function"]["arguments"]))
    return {**head, "content": content, **end, "usage": _usage(running.usage)}


def _tool_use(id: str, name: str, arguments: str) -> dict[str, Any]:
    try:
        given = json.loads(arguments or "{}", strict=False)
    except (ValueError, RecursionError):  # broken off
        given = {}
    return {"type": "tool_use", "id": id, "name": name, "input": given if isinstance(given, dict) else {}}


class _Blocks:
    """The blocks of a streamed message: which is open."""

    def __init__(self) -> None:
        self.index, self.kind = -1, ""

    def tell(self, each: Event) -> list[str]:
        """Return the events that an answer's event comes to."""
        if isinstance(each, Content):
            opened = self._open("text", {"type": "text", "text": ""})
            return [*opened, self._delta({"type": "text_delta", "text": each.text})]
        if isinstance(each, Reasoning):
            opened = self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            return [*opened, self._delta({"type": "thinking_delta", "thinking": each.text})]
        if isinstance(each, CallStart):
            self_made = {"type": "tool_use", "id": each.id, "name": each.name, "input": {}}
            return self._open(f"call {each.index}", self_made)
        return [self._delta({"type": "input_json_delta", "partial_json": each.text})]

    def _open(self, kind: str, block: dict[str, Any]) -> list[str]:
        if kind == self.kind:
            return []
        closed = self.close()
        self.index, self.kind = self.index + 1, kind
        data = {"type": "content_block_start", "index": self.index, "content_block": block}
        return [*closed, event(data, "content_block_start")]

    def _delta(self, delta: dict[str, Any]) -> str:
        data = {"type": "content_block_delta", "index": self.index, "delta": delta}
        return event(data, "content_block_delta")

    def close(self) -> list[str]:
        """Return the end of the open block."""
        if not self.kind:
            return []
        self.kind = ""
        return [event({"type": "content_block_stop", "index": self.index}, "content_block_stop")]


async def _stream(running: Running, answer: Answer, head: dict[str, Any]) -> AsyncIterator[str]:
    start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(running.usage)}
    yield event({"type": "message_start", "message": start}, "message_start")
    blocks, end = _Blocks(), {}
    async for piece in running:
        for each in answer.take(piece, running):
            for text in blocks.tell(each):
                yield text
        if answer.finish_reason is not None:
            end = _end(answer, piece)
    if blocks.index < 0:
        for text in blocks.tell(Content("")):
            yield text
    for text in blocks.close():
        yield text
    yield event({"type": "message_delta", "delta": end, "usage": _usage(running.usage)}, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")
