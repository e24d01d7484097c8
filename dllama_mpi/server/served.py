"""The model as routes see it, and the state of the server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..engine.request import SamplingParams
from ..errors import DllamaError, RequestError
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import Tokenizer
from .errors import ApiError, unavailable
from .grammar import Grammars, MakeConstraint
from .harmony import FINAL
from .outbox import EngineLoop
from .parsing import THINK, THOUGHT, Style
from .schema import Message, ResponseFormat, Sampling, Tool

_THOUGHT = re.compile(re.escape(THOUGHT))
_COUNTED = 1 << 20  # characters of a text that is made into tokens to be told, if the context is short
_PIECE = 1 << 16  # characters of a text that are made into tokens at a time, to see whether it is too long


@dataclass(frozen=True)
class Form:
    """What an answer, or what follows its reasoning, must keep to; is_call: it is a call of a tool."""

    make: MakeConstraint
    is_call: bool = False


@dataclass(frozen=True)
class Served:
    """A model that is ready.

    Attributes:
        names: what clients may call it, the first being its own; "*" takes any. template: None for a model that does
            not chat. context: positions of a sequence. defaults: of what a request leaves open.
        tool_style: one of `parsing.STYLES`. thinks: whether the template knows of reasoning. pooling: of embeddings,
            one of `engine.request.POOLINGS`, and their hidden_size. grammars: None where
            llguidance is not installed. ranks: returns what each rank did since it was last asked; called in the
            engine's thread. details: for /props.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    vocab_size: int
    context: int
    defaults: SamplingParams
    tool_style: str = "none"
    thinks: bool = False
    pooling: str = "mean"
    hidden_size: int = 0
    grammars: Grammars | None = None
    ranks: Callable[[], list[dict[str, Any]]] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, name: str | None) -> None:
        """Raise an ApiError unless the model goes by this name, or none is given."""
        if name is not None and name not in self.names and "*" not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not served here; there is {known}",
                param="model",
                code="model_not_found",
            )

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, generate: bool = True, **more: Any
    ) -> str:
        """Return the prompt that the chat template makes of messages.

        Raises:
            ApiError: the model has no template, or it refuses the messages.
        """
        if self.template is None:
            raise ApiError(400, "the model has no chat template; use /v1/completions, or start with --chat-template")
        described = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
        try:
            return self.template.render([_plain(m) for m in messages], generate, described, **more)
        except RequestError as error:
            raise ApiError(400, str(error), param="messages") from None

    def style(self, prompt: str, tools: Sequence[Tool] | None) -> Style:
        """Return how answers to a rendered prompt are to be read."""
        schemas = {tool.function.name: tool.function.parameters for tool in tools or ()}
        end = prompt.rstrip()
        thinks = self.thinks and not end.endswith(THOUGHT)
        style = self.tool_style if tools or self.tool_style == "harmony" else "none"
        return Style(style, frozenset(schemas), thinks, thinks and end.endswith(THINK), schemas)

    def behind_thought(self, form: Form | None, style: Style) -> tuple[MakeConstraint | None, Style]:
        """Have a form begin where reasoning ends; return what makes it, and how the answer is to be read.

        An answer whose prompt has opened its reasoning ends that first; one that may reason does so if it begins with
        the token for it. Where there is no such token, forms hold from the start, and nothing is reasoning.
        """
        if form is None:
            return None, style
        grammars = self.needed_grammars("grammar")
        if style.tools == "harmony":
            return form.make if form.is_call else grammars.behind(form.make, FINAL), style
        if style.is_thinking:
            return grammars.behind(form.make, _THOUGHT), style
        first = self.tokenizer.added_tokens.get(THINK)
        if style.thinks and first is not None:
            return grammars.behind(form.make, _THOUGHT, first), style
        return form.make, replace(style, thinks=False)

    def forced(self, tools: Sequence[Tool] | None, name: str | None) -> Form:
        """Return what makes an answer a call of a tool, of this name or of any.

        Raises:
            ApiError: there is no such tool, or the model cannot.
        """
        chosen = [tool for tool in tools or () if name is None or tool.function.name == name]
        if not chosen:
            said = "there are no tools" if name is None else f"{name[:100]!r} is not among the tools"
            raise ApiError(400, f"tool_choice: {said}", param="tool_choice")
        return Form(self.needed_grammars("tool_choice").of_tools(chosen, self.tool_style), is_call=True)

    def needed_grammars(self, field: str) -> Grammars:
        """Return what makes constraints.

        Raises:
            ApiError: llguidance is not installed where the server runs.
        """
        if self.grammars is None:
            raise ApiError(400, f"{field} needs llguidance, which the server has not installed", param=field)
        return self.grammars

    def formed(self, wanted: ResponseFormat | None, field: str) -> Form | None:
        """Return what gives an answer its form, or None for any.

        Raises:
            ApiError: the schema cannot be used.
        """
        if wanted is None or wanted.type == "text":
            return None
        return Form(self.needed_grammars(field).of_format(wanted, field))

    def encode(self, prompt: str | Sequence[int], field: str, is_rendered: bool = False) -> list[int]:
        """Return a prompt's token ids, fit for the model.

        Raises:
            ApiError: empty, too long, or ids out of range; `field` is named.
        """
        if isinstance(prompt, str):
            try:
                self._check_length(prompt, field)
                ids = self.tokenizer.encode(prompt, add_special_tokens=not is_rendered)
            except RequestError as error:
                raise ApiError(400, f"{field}: {error}", param=field) from None
            if not ids and self.tokenizer.bos_id is not None:
                ids = [self.tokenizer.bos_id]
        else:
            ids = list(prompt)
        if not ids:
            raise ApiError(400, f"{field}: the prompt has no tokens; give at least one", param=field)
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"{field}: token id {wrong} is out of range 0 to {self.vocab_size - 1}", param=field)
        if len(ids) >= self.context:
            raise _too_long(field, str(len(ids)), self.context)
        return ids

    def _check_length(self, text: str, field: str) -> None:
        """Refuse a text that is far too long before all of it is made into tokens: that takes time and memory."""
        count, most = 0, 1.25 * self.context  # cutting it adds a few
        if len(text) > 2 * _PIECE:
            for start in range(0, len(text), _PIECE):
                count += len(self.tokenizer.encode(text[start : start + _PIECE], add_special_tokens=False))
                if count > most:
                    raise _too_long(field, f"more than {self.context}", self.context)

    def count(self, text: str, field: str, add_special: bool = False) -> list[int]:
        """Return the token ids of any text.

        Raises:
            ApiError: it is far longer than the model could read, or no valid Unicode; `field` is named.
        """
        most = max(_COUNTED, 16 * self.context)
        if len(text) > most:
            raise ApiError(400, f"{field}: the text has {len(text)} characters; it may have {most}", param=field)
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special)
        except RequestError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None

    def params(self, body: Sampling, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Return how tokens are chosen for a request: its own values, else the server's.

        Raises:
            ApiError: naming the field that is wrong.
        """
        repeat = body.repeat_penalty if body.repeat_penalty is not None else body.repetition_penalty
        given: dict[str, Any] = {
            "temperature": body.temperature,
            "top_k": None if body.top_k is None else max(body.top_k, 0),
            "top_p": None if body.top_p is None else max(body.top_p, 1e-6),  # OpenAI's 0 keeps the best token
            "min_p": body.min_p,
            "repeat_penalty": repeat,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "max_tokens": max_tokens,
            "ignore_eos": body.ignore_eos,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        seed = self.defaults.seed if body.seed is None else None if body.seed == -1 else body.seed % 2**63
        try:
            return replace(
                self.defaults, stop=(), seed=seed, logprobs=logprobs, logit_bias=self._biases(body), **changes
            )
        except DllamaError as error:
            raise ApiError(400, str(error), param=str(error).split(" ", 1)[0]) from None

    def stops(self, body: Sampling) -> tuple[str, ...]:
        """Return a request's stop strings, else the server's."""
        return body.stops if body.stop is not None else tuple(self.defaults.stop)

    def _biases(self, body: Sampling) -> dict[int, float]:
        biases = {}
        for key, value in (body.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < self.vocab_size):
                raise ApiError(
                    400,
                    f"logit_bias: {key[:40]!r} is not a token id from 0 to {self.vocab_size - 1}",
                    param="logit_bias",
                )
            biases[int(key)] = value
        return biases


def _too_long(field: str, count: str, context: int) -> ApiError:
    said = f"{field}: the prompt has {count} tokens; the context holds {context}, an answer included"
    return ApiError(400, said, param=field, code="context_length_exceeded")


def _plain(message: Message) -> dict[str, Any]:
    """Return a message as templates read it: content as one text, arguments of calls as objects."""
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    plain["content"] = message.text
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    if message.reasoning_content is not None and not (message.tool_calls and message.text):
        plain["thinking"] = message.reasoning_content  # gpt-oss's word; beside calls it takes this or content
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": _arguments(c.function)}}
            for c in message.tool_calls
        ]
    return plain


def _arguments(function: Any) -> Any:
    try:
        found = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        return function.arguments
    return found if isinstance(found, dict) else function.arguments


@dataclass
class State:
    """Where the server stands, for its routes; the HTTP loop's thread alone reads and writes it.

    Attributes:
        phase: "loading", "ready", "draining", or "restarting" where the job has ended badly and is to be started again.
        served, engine: once it has been ready.
    """

    phase: str = "loading"
    served: Served | None = None
    engine: EngineLoop | None = None

    def ready(self) -> tuple[Served, EngineLoop]:
        """Return what requests need.

        Raises:
            ApiError: it is not there yet, or the server is ending.
        """
        if self.phase == "draining":
            raise unavailable("the server is shutting down")
        if self.phase == "restarting":
            raise unavailable("the job has ended badly and is being started again", 5)
        if self.served is None or self.engine is None:
            raise unavailable("the model is being loaded", 2)
        return self.served, self.engine
