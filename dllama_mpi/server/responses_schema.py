"""The body of OpenAI's /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .schema import MOST_MESSAGES, Body, FunctionTool, Part, ResponseFormat, Several, Tool


class Item(Body):
    """An item of the input: a message, a call of a function or its result, or past reasoning."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Several[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Several[Part] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Item:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name"),
            "function_call_output": ("call_id", "output"),
        }
        missing = [name for name in needed.get(self.type, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"an item of type {self.type} needs {missing[0]}")
        return self


class ResponseTool(FunctionTool):
    """A function that the model may call."""

    type: Literal["function"]

    def as_tool(self) -> Tool:
        """Return it as chats have it."""
        function = FunctionTool(name=self.name, description=self.description, parameters=self.parameters)
        return Tool(type="function", function=function)


class TextOptions(Body):
    """What form the text has."""

    format: ResponseFormat | None = None


class ReasoningOptions(Body):
    """How much the model reasons."""

    effort: str | None = None


class NamedChoice(Body):
    """The one function that is to be called."""

    type: str
    name: str | None = None


class ResponsesBody(Body):
    """The body of /v1/responses."""

    model: str | None = None
    input: str | Annotated[Several[Item], Field(max_length=MOST_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, ge=0, le=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: Several[ResponseTool] | None = Field(default=None, max_length=256)
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, Any] | None = None
