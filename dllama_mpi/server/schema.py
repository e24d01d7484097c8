"""The bodies of OpenAI's routes, as pydantic checks them. Fields that have no meaning here are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_CHOICES = 16
MOST_STOPS, LONGEST_STOP = 32, 1000
MOST_TOP_LOGPROBS = 20
MOST_BIASES = 1024
MOST_PROMPTS = 64
MOST_INPUTS = 2048
MOST_MESSAGES = 1 << 15

T = TypeVar("T")
# Of a list the first wrong member is told: there may be millions.
Several = Annotated[list[T], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """A JSON object: no value is taken for one of another type, no number may be infinite."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """What a stream holds besides."""

    include_usage: bool = False


class Sampling(Body):
    """How tokens are chosen, in the names of OpenAI, llama.cpp and vLLM; None: the server's default."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)
    repeat_penalty: float | None = Field(default=None, gt=0, lt=100)
    repetition_penalty: float | None = Field(default=None, gt=0, lt=100)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    ignore_eos: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=MOST_BIASES)
    stop: StopString | Annotated[Several[StopString], Field(max_length=MOST_STOPS)] | None = None
    max_tokens: int | None = Field(default=None, ge=0)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Completing(Sampling):
    """What chat and text completions have in common."""

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)

    @property
    def shows_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class Part(Body):
    """A part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @field_validator("type")
    @classmethod
    def _is_text(cls, value: str) -> str:
        if value not in ("text", "input_text", "output_text", "refusal"):
            raise ValueError(f"a part of type {value[:40]!r} cannot be read: the model takes text alone")
        return value


class CalledFunction(Body):
    """A function that the assistant called, its arguments as JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Several[Part] | None = None
    name: str | None = None
    tool_calls: Several[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """The text of all parts."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text or part.refusal or "" for part in self.content)


class FunctionTool(Body):
    """A function that the model may call; parameters: a JSON schema."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool of a chat."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Body):
    """A JSON schema with a name."""

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(NamedSchema):
    """What form the answer has; chats have the schema in `json_schema`, responses have it here."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @property
    def wanted(self) -> dict[str, Any] | bool | None:
        """The schema."""
        return self.json_schema.schema_ if self.json_schema is not None else self.schema_


class ChatBody(Completing):
    """The body of /v1/chat/completions."""

    messages: Several[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    tools: Several[Tool] | None = Field(default=None, max_length=256)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


def several(given: str | list[Any]) -> list[str | list[int]]:
    """Return texts or lists of token ids as a list, even if it is one."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class CompletionBody(Completing):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[Several[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[Several[TokenId], Field(min_length=1)]
        | Annotated[
            Several[Annotated[Several[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)
        ]
    )
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    suffix: str | None = None
    best_of: int | None = Field(default=None, ge=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        return several(self.prompt)


class EmbeddingsBody(Body):
    """The body of /v1/embeddings; pooling: None for the server's."""

    model: str | None = None
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    pooling: Literal["mean", "last"] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, one or several."""
        return several(self.input)


class TokenizeBody(Body):
    """The body of /tokenize: a text, or messages as the chat template renders them."""

    content: str | None = None
    prompt: str | None = None
    messages: Several[Message] | None = Field(default=None, max_length=MOST_MESSAGES)
    tools: Several[Tool] | None = None
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeBody(Body):
    """The body of /detokenize."""

    tokens: Several[TokenId]


class TemplateBody(Body):
    """The body of /apply-template."""

    messages: Several[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    tools: Several[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
