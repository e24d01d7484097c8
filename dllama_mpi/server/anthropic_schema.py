"""The bodies of Anthropic's routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from .schema import MOST_MESSAGES, Body, Several, StopString

TEXTS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class Block(Body):
    """A block of a message's content; which fields it has depends on its type."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Several[Block] | None = None
    is_error: bool | None = None
    thinking: str | None = None

    @field_validator("type")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in TEXTS:
            raise ValueError(f"a block of type {value[:40]!r} cannot be read: the model takes text alone")
        return value


class Turn(Body):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | Several[Block]


class OfferedTool(Body):
    """A tool that the model may use; input_schema: a JSON schema."""

    name: str = Field(min_length=1, max_length=256)
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Body):
    """Which tool is to be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Whether the model reasons before it answers."""

    type: str


class CountBody(Body):
    """The body of /v1/messages/count_tokens."""

    model: str | None = None
    messages: Several[Turn] = Field(min_length=1, max_length=MOST_MESSAGES)
    system: str | Several[Block] | None = None
    tools: Several[OfferedTool] | None = Field(default=None, max_length=256)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesBody(CountBody):
    """The body of /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[Several[StopString], Field(max_length=32)] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
