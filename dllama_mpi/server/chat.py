"""OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from .errors import ApiError
from .events import CallArguments, CallStart, Content, Event, Reasoning
from .generation import Ask, Piece, Running, Token, special_ids
from .http import Call, answer_with, event
from .parsing import Style, parser_of
from .schema import ChatBody, NamedTool, Tool
from .served import Form, Served


@dataclass(frozen=True)
class Prepared:
    """A chat as the engine takes it, how its answers are to be read, and whether one may hold several calls."""

    ask: Ask
    style: Style
    is_parallel: bool = True


def prepare(served: Served, body: ChatBody) -> Prepared:
    """Return a chat's prompt and parameters.

    Raises:
        ApiError: naming the field that is wrong.
    """
    served.check_name(body.model)
    tools = offered(body.tools, body.tool_choice)
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in variables:
            raise ApiError(400, f"chat_template_kwargs: {name} is set by the server", param="chat_template_kwargs")
    prompt = served.render(body.messages, tools, **variables)
    ids = served.encode(prompt, "messages", is_rendered=True)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    top = None
    if body.logprobs:
        top = body.top_logprobs or 0
    elif body.top_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    params = served.params(body, limit, top)
    constraint, style = served.behind_thought(_form(served, body, tools), served.style(prompt, tools))
    ask = Ask(
        tuple(ids),
        params,
        served.stops(body),
        body.n or 1,
        body.priority or 0,
        special_ids(served.tokenizer, style.marks),
        True,
        constraint,
        style,
    )
    return Prepared(ask, style, body.parallel_tool_calls is not False)


def _form(served: Served, body: ChatBody, tools: list[Tool] | None) -> Form | None:
    """Return what the answer must keep to: a forced call, a grammar, a form, or nothing."""
    choice = body.tool_choice
    if choice == "required" or isinstance(choice, NamedTool):
        return served.forced(tools, choice.function.name if isinstance(choice, NamedTool) else None)
    if body.grammar:
        return Form(served.needed_grammars("grammar").of_grammar(body.grammar))
    return served.formed(body.response_format, "response_format")


def offered(tools: Sequence[Tool] | None, choice: Any) -> list[Tool] | None:
    """Return the tools that the model is told of."""
    return list(tools) if tools and choice != "none" else None


async def chat(call: Call) -> Response:
    """Answer a conversation."""
    body: ChatBody = call.body
    served, engine = call.context.state.ready()
    prepared = await asyncio.to_thread(prepare, served, body)
    running = Running(served, engine, [prepared.ask])
    answers = [Answer(served, prepared.style, i, prepared.is_parallel) for i in range(prepared.ask.n)]
    head = Head("chatcmpl-" + secrets.token_hex(12), int(time.time()), body.model or served.names[0])
    return await answer_with(
        call, running.close, lambda: _chunks(running, answers, head, body), lambda: _whole(running, answers, head)
    )


@dataclass(frozen=True)
class Head:
    """What each object of an answer begins with."""

    id: str
    created: int
    model: str

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an object with these choices."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


@dataclass
class Answer:
    """One choice of a chat: what its text comes to.

    is_parallel: whether it may hold several calls; else it ends with the first.
    """

    served: Served
    style: Style
    index: int
    is_parallel: bool = True
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.parser = parser_of(self.style)

    def take(self, piece: Piece, running: Running) -> list[Event]:
        """Return what a piece comes to, and remember it; with the last one there is a `finish_reason`."""
        events = self.parser.feed(piece.text)
        self.finish_reason = piece.finish_reason
        if self.parser.complete_calls and not self.is_parallel:
            if piece.finish_reason is None:
                running.end(piece.index)
            self.finish_reason, events = "stop", self._up_to_first_call(events)
        elif piece.finish_reason is not None:
            events += self.parser.finish()
        for each in events:
            if isinstance(each, Content):
                self.content.append(each.text)
            elif isinstance(each, Reasoning):
                self.reasoning.append(each.text)
            elif isinstance(each, CallStart):
                self.calls.append(_call_object(each))
            else:
                self.calls[each.index]["function"]["arguments"] += each.text
        return events

    @staticmethod
    def _up_to_first_call(events: list[Event]) -> list[Event]:
        first = [i for i, each in enumerate(events) if isinstance(each, CallArguments) and each.index == 0]
        return events[: first[-1] + 1] if first else []

    @property
    def reason(self) -> str | None:
        """OpenAI's word for how it ended."""
        return "tool_calls" if self.finish_reason == "stop" and self.calls else self.finish_reason

    def message(self) -> dict[str, Any]:
        """Return the whole message."""
        text = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": None if self.calls and not text else text}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = [{k: v for k, v in each.items() if k != "index"} for each in self.calls]
        return message | {"refusal": None}


def _call_object(start: CallStart) -> dict[str, Any]:
    function = {"name": start.name, "arguments": ""}
    return {"index": start.index, "id": start.id, "type": "function", "function": function}


def delta(each: Event) -> dict[str, Any]:
    """Return what a chunk tells of an event."""
    if isinstance(each, Content):
        return {"content": each.text}
    if isinstance(each, Reasoning):
        return {"reasoning_content": each.text}
    if isinstance(each, CallStart):
        return {"tool_calls": [_call_object(each)]}
    return {"tool_calls": [{"index": each.index, "function": {"arguments": each.text}}]}


def logprob_objects(served: Served, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Return the log-probabilities of tokens as chat completions show them."""

    def shown(token_id: int, value: float) -> dict[str, Any]:
        data = served.tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(value, -9999.0), "bytes": list(data)}

    return [
        shown(token.id, token.logprob) | {"top_logprobs": [shown(*other) for other in token.top]} for token in tokens
    ]


async def _whole(running: Running, answers: list[Answer], head: Head) -> dict[str, Any]:
    async for piece in running:
        answer = answers[piece.index]
        answer.take(piece, running)
        answer.logprobs += logprob_objects(running.served, piece.tokens)
    choices = [
        {
            "index": answer.index,
            "message": answer.message(),
            "logprobs": {"content": answer.logprobs, "refusal": None} if running.wants_tokens else None,
            "finish_reason": answer.reason,
        }
        for answer in answers
    ]
    usage = running.usage
    return head.object("chat.completion", choices) | {"usage": usage.openai(), "timings": usage.timings()}


async def _chunks(running: Running, answers: list[Answer], head: Head, body: ChatBody) -> AsyncIterator[str]:
    def chunk(index: int, what: dict[str, Any], reason: str | None = None, tokens: Any = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": what, "finish_reason": reason}
        if running.wants_tokens:
            choice["logprobs"] = {"content": tokens or [], "refusal": None}
        made = head.object("chat.completion.chunk", [choice])
        return made | {"usage": None} if body.shows_usage else made

    last: list[dict[str, Any]] = []
    for answer in answers:
        yield event(chunk(answer.index, {"role": "assistant", "content": ""}))
    async for piece in running:
        answer = answers[piece.index]
        tokens = logprob_objects(running.served, piece.tokens)
        events = answer.take(piece, running)
        if tokens and not events:
            yield event(chunk(piece.index, {}, tokens=tokens))
        for each in events:
            yield event(chunk(piece.index, delta(each), tokens=tokens))
            tokens = []
        if answer.reason is not None:
            last.append(chunk(piece.index, {}, answer.reason))
            if len(last) < len(answers):
                yield event(last[-1])
    if last:
        yield event(last[-1] | {"timings": running.usage.timings()})
    if body.shows_usage:
        yield event(head.object("chat.completion.chunk", []) | {"usage": running.usage.openai()})
    yield "data: [DONE]\n\n"
