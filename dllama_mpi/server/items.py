"""The output of a response as it grows: items, and the events that tell of them."""

from __future__ import annotations

import secrets
from typing import Any

from .events import CallArguments, CallStart, Content, Event, Reasoning

_TEXTS = {
    "message": ("output_text", "response.output_text"),
    "reasoning": ("reasoning_text", "response.reasoning_text"),
}


class Items:
    """Grows items from an answer's events; `take` and `close` return the API's events as (name, data)."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._is_open = False

    def take(self, each: Event) -> list[tuple[str, dict[str, Any]]]:
        """Take an event of the answer."""
        if isinstance(each, Content):
            return self._text("message", each.text)
        if isinstance(each, Reasoning):
            return self._text("reasoning", each.text)
        if isinstance(each, CallStart):
            item = {"type": "function_call", "id": _id("fc"), "call_id": each.id, "name": each.name, "arguments": ""}
            return [*self.close(), *self._open(item)]
        return self._arguments(each)

    def _open(self, item: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        self.output.append(item | {"status": "in_progress"})
        self._is_open = True
        return [("response.output_item.added", {"output_index": self._at, "item": _copy(self.output[-1])})]

    @property
    def _at(self) -> int:
        return len(self.output) - 1

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": self._at}

    def _text(self, kind: str, text: str) -> list[tuple[str, dict[str, Any]]]:
        part_type, name = _TEXTS[kind]
        told: list[tuple[str, dict[str, Any]]] = []
        if not self._is_open or self.output[-1]["type"] != kind:
            told += self.close()
            item: dict[str, Any] = {"type": kind, "id": _id("msg" if kind == "message" else "rs"), "content": []}
            more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            told += self._open({**item, **more})
            part: dict[str, Any] = {"type": part_type, "text": ""} | (
                {"annotations": [], "logprobs": []} if kind == "message" else {}
            )
            self.output[-1]["content"].append(part)
            told.append(("response.content_part.added", {**self._place(), "content_index": 0, "part": dict(part)}))
        self.output[-1]["content"][0]["text"] += text
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [*told, (f"{name}.delta", {**self._place(), "content_index": 0, "delta": text, **logprobs})]

    def _arguments(self, each: CallArguments) -> list[tuple[str, dict[str, Any]]]:
        self.output[-1]["arguments"] += each.text
        return [("response.function_call_arguments.delta", {**self._place(), "delta": each.text})]

    def close(self, status: str = "completed") -> list[tuple[str, dict[str, Any]]]:
        """End the open item."""
        if not self._is_open:
            return []
        self._is_open = False
        item, place = self.output[-1], self._place()
        item["status"] = status
        told: list[tuple[str, dict[str, Any]]] = []
        if item["type"] == "function_call":
            done = {**place, "name": item["name"], "arguments": item["arguments"]}
            told.append(("response.function_call_arguments.done", done))
        else:
            name, part = _TEXTS[item["type"]][1], item["content"][0]
            logprobs: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            told.append((f"{name}.done", {**place, "content_index": 0, "text": part["text"], **logprobs}))
            told.append(("response.content_part.done", {**place, "content_index": 0, "part": dict(part)}))
        return [*told, ("response.output_item.done", {"output_index": self._at, "item": _copy(item)})]


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as it is now: it goes on growing."""
    return {key: [dict(part) for part in value] if key == "content" else value for key, value in item.items()}
