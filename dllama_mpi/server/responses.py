"""OpenAI's responses: conversations that the server remembers, if asked to."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from .chat import Answer, offered
from .errors import ApiError
from .generation import Ask, Running, special_ids
from .http import Call, JSONAnswer, answer_with, event
from .items import Items
from .parsing import Style
from .responses_schema import Item, NamedChoice, ResponsesBody
from .schema import CalledFunction, Message, Sampling, ToolCall
from .served import Form, Served

MOST_BYTES = 64_000_000  # of responses that are remembered; the oldest go first


@dataclass(frozen=True)
class Kept:
    """A response, and the conversation up to its end."""

    response: dict[str, Any]
    messages: list[Message]

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return 2000 + sum(
            400 + len(m.text) + sum(len(c.function.arguments) for c in m.tool_calls or ()) for m in self.messages
        )


@dataclass
class Store:
    """Responses by id, within a bound."""

    kept: OrderedDict[str, Kept] = field(default_factory=OrderedDict)
    size: int = 0

    def put(self, kept: Kept) -> None:
        """Remember a response."""
        self.kept[kept.response["id"]] = kept
        self.size += kept.size
        while self.size > MOST_BYTES:
            self.size -= self.kept.popitem(last=False)[1].size

    def get(self, id: str, field: str | None = None) -> Kept:
        """Return a response.

        Raises:
            ApiError: it is not known, or no longer.
        """
        found = self.kept.get(id)
        if found is None:
            raise ApiError(404 if field is None else 400, f"there is no response {id[:100]!r}", param=field)
        return found

    def delete(self, id: str) -> None:
        """Forget a response."""
        self.size -= self.get(id).size
        del self.kept[id]


@dataclass(frozen=True)
class Prepared:
    """A response that is to be made: the conversation so far, its prompt, how the answer is to be read."""

    messages: list[Message]
    ask: Ask
    style: Style


def conversation(items: str | list[Item]) -> list[Message]:
    """Return input items as chats have them."""
    if isinstance(items, str):
        return [Message(role="user", content=items)]
    found: list[Message] = []
    for item in items:
        if item.type == "message":
            assert item.role is not None
            found.append(Message(role=item.role, content=item.content))
        elif item.type == "function_call":
            function = CalledFunction(name=item.name or "", arguments=item.arguments or "{}")
            call = ToolCall(id=item.call_id, function=function)
            if found and found[-1].role == "assistant":
                last = found[-1]
                found[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or []), call]})
            else:
                found.append(Message(role="assistant", content="", tool_calls=[call]))
        elif item.type == "function_call_output":
            found.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
    return found


def prepare(served: Served, body: ResponsesBody, before: list[Message]) -> Prepared:
    """Return what is asked of the engine.

    Raises:
        ApiError: naming the field that is wrong.
    """
    served.check_name(body.model)
    messages = [*before, *conversation(body.input)]
    if not messages:
        raise ApiError(400, "input: give at least one item", param="input")
    system = [Message(role="system", content=body.instructions)] if body.instructions else []
    tools = offered([tool.as_tool() for tool in body.tools or ()], body.tool_choice)
    effort = body.reasoning.effort if body.reasoning is not None else None
    variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    prompt = served.render([*system, *messages], tools, **variables)
    ids = served.encode(prompt, "input", is_rendered=True)
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p)
    params = served.params(sampling, body.max_output_tokens, None)
    choice = body.tool_choice
    form: Form | None
    if choice == "required" or isinstance(choice, NamedChoice):
        form = served.forced(tools, choice.name if isinstance(choice, NamedChoice) else None)
    else:
        form = served.formed(body.text.format if body.text is not None else None, "text.format")
    constraint, style = served.behind_thought(form, served.style(prompt, tools))
    shown, stops = special_ids(served.tokenizer, style.marks), served.stops(sampling)
    ask = Ask(tuple(ids), params, stops, shown=shown, is_chat=True, constraint=constraint, style=style)
    return Prepared(messages, ask, style)


async def create(call: Call) -> Response:
    """Make a response."""
    body: ResponsesBody = call.body
    served, engine = call.context.state.ready()
    store = call.context.store
    previous = body.previous_response_id
    before = [] if previous is None else store.get(previous, "previous_response_id").messages
    prepared = await asyncio.to_thread(prepare, served, body, before)
    making = Making(served, body, prepared, store)
    running = Running(served, engine, [prepared.ask])
    return await answer_with(call, running.close, lambda: making.stream(running), lambda: making.whole(running))


async def retrieve(call: Call) -> Response:
    """Give a response that was remembered."""
    return JSONAnswer(call.context.store.get(call.request.path_params["id"]).response)


async def delete(call: Call) -> Response:
    """Forget a response."""
    id = call.request.path_params["id"]
    call.context.store.delete(id)
    return JSONAnswer({"id": id, "object": "response", "deleted": True})


def _shown(choice: Any) -> Any:
    return choice.model_dump(exclude_none=True) if isinstance(choice, NamedChoice) else choice or "auto"


class Making:
    """A response on its way."""

    def __init__(self, served: Served, body: ResponsesBody, prepared: Prepared, store: Store) -> None:
        self._body, self._prepared, self._store = body, prepared, store
        self._is_parallel = body.parallel_tool_calls is not False
        self._answer, self._items = Answer(served, prepared.style, 0, self._is_parallel), Items()
        self._id, self._created = "resp_" + secrets.token_hex(16), int(time.time())
        self._model, self._temperature = body.model or served.names[0], prepared.ask.params.temperature
        wanted = body.text.format if body.text is not None else None
        shown = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
        self._text_format = {"format": shown}

    def _object(self, status: str, running: Running | None = None) -> dict[str, Any]:
        body = self._body
        usage = None
        if running is not None:
            u = running.usage.openai()
            usage = {
                "input_tokens": u["prompt_tokens"],
                "input_tokens_details": u["prompt_tokens_details"],
                "output_tokens": u["completion_tokens"],
                "output_tokens_details": u["completion_tokens_details"],
                "total_tokens": u["total_tokens"],
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": list(self._items.output) if running is not None else [],
            "parallel_tool_calls": self._is_parallel,
            "previous_response_id": body.previous_response_id,
            "store": body.store is not False,
            "temperature": self._temperature,
            "text": self._text_format,
            "tool_choice": _shown(body.tool_choice),
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "top_p": self._prepared.ask.params.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": body.metadata or {},
        }

    async def _events(self, running: Running) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        async for piece in running:
            for each in self._answer.take(piece, running):
                for told in self._items.take(each):
                    yield told
        for told in self._items.close("incomplete" if self._answer.finish_reason == "length" else "completed"):
            yield told

    def _finished(self, running: Running) -> dict[str, Any]:
        response = self._object("incomplete" if self._answer.finish_reason == "length" else "completed", running)
        if self._body.store is not False:
            message = self._answer.message()
            calls = [
                ToolCall(id=each["id"], function=CalledFunction(**each["function"])) for each in self._answer.calls
            ]
            answer = Message(role="assistant", content=message["content"] or "", tool_calls=calls or None)
            self._store.put(Kept(response, [*self._prepared.messages, answer]))
        return response

    async def whole(self, running: Running) -> dict[str, Any]:
        """Return the response when it is complete."""
        async for _ in self._events(running):
            pass
        return self._finished(running)

    async def stream(self, running: Running) -> AsyncIterator[str]:
        """Yield its events."""
        number = 0

        def tell(name: str, data: dict[str, Any]) -> str:
            nonlocal number
            number += 1
            return event({"type": name, "sequence_number": number - 1, **data}, name)

        started = self._object("in_progress")
        yield tell("response.created", {"response": started})
        yield tell("response.in_progress", {"response": started})
        async for name, data in self._events(running):
            yield tell(name, data)
        response = self._finished(running)
        yield tell(f"response.{response['status']}", {"response": response})
