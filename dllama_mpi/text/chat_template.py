"""Turn a conversation into one prompt, by the model's own template or a built-in one.

A template is a Jinja program that comes with the model. It is rendered as transformers does it
(utils/chat_template_utils.py there): in a sandbox, with the same filters, functions and white-space rules.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dllama_mpi.errors import ModelError, RequestError, UsageError

from .builtin_templates import BUILT_IN
from .files import read_json, read_text
from .tokenizer import Tokenizer

CHOICES = "|".join(BUILT_IN)
Message = Mapping[str, Any]
LONGEST_PROMPT = 64_000_000  # characters
LONGEST_SECONDS = 20.0


class ChatTemplate:
    """Render messages as the text a model was trained to answer.

    The rendered prompt has its own BOS where the format has one: encode it with `add_special_tokens=False`.

    Args:
        sources: Jinja programs by name; "default" must be there, "tool_use" is taken for requests with tools.
        special_tokens: variables of the template, such as {"bos_token": "<s>"}.
        origin: where the template came from, for messages.

    Attributes:
        sources: the programs by name.

    Raises:
        ModelError: a source is not a Jinja template, or "default" is missing.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], origin: str) -> None:
        self.origin, self.sources = origin, dict(sources)
        self.special_tokens = dict(special_tokens)
        if "default" not in sources:
            raise ModelError(
                f"{origin} has the chat templates {sorted(sources)}, none named default; "
                f"choose one by --chat-template {CHOICES}, or give a .jinja file"
            )
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template of {origin} is broken in line {error.lineno}: {error.message}; "
                f"choose one by --chat-template {CHOICES}, or give a .jinja file"
            ) from None

    @classmethod
    def load(cls, tokenizer: Tokenizer, choice: str | None = None) -> ChatTemplate:
        """Find a template: the one chosen, else the one that came with the tokenizer or the model.

        Args:
            tokenizer: gives the special tokens, and the folders to look in.
            choice: the name of a built-in template in any case, a path to a .jinja file, or None.

        Raises:
            UsageError: the choice is neither a name nor a file.
            ModelError: nothing was chosen and the model has no template.
        """
        if choice is not None:
            # A format made for other models may name tokens that this one lacks.
            special_tokens = {"bos_token": "", "eos_token": ""} | tokenizer.special_tokens
            return cls({"default": _chosen(choice)}, special_tokens, choice)
        for folder in tokenizer.folders:
            sources = _sources_in(folder)
            if sources:
                return cls(sources, tokenizer.special_tokens, str(folder))
        where = " and ".join(str(folder) for folder in tokenizer.folders) or "the tokenizer"
        raise ModelError(
            f"{where} has no chat template; a base model continues text and does not chat; "
            f"if this one does, choose its format by --chat-template {CHOICES}, or give a .jinja file"
        )

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt for a conversation.

        Args:
            messages: dicts with "role" and "content", oldest first.
            add_generation_prompt: end with what opens the assistant's answer.
            tools: JSON schemas of the functions the model may call.
            variables: whatever else the template reads, such as `enable_thinking`.

        Raises:
            RequestError: the template refuses the messages or cannot read them.
        """
        template = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        try:
            return _within_limits(
                template,
                {
                    **self.special_tokens,
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **variables,
                },
            )
        except RequestError:
            raise
        except _RefusedError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error.message}") from None
        except Exception as error:  # the template is the model's program; the messages are the user's
            raise RequestError(
                f"the chat template of {self.origin} fails on these messages: {type(error).__name__}: {error}; "
                f'each needs a "role" and a "content" the template can read'
            ) from error


def _within_limits(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Render piece by piece, and give up on a template that writes too much or takes too long."""
    pieces, length, end = [], 0, time.monotonic() + LONGEST_SECONDS
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST_PROMPT or time.monotonic() > end:
            raise RequestError(
                f"the chat template makes more than {LONGEST_PROMPT} characters of these messages, or takes longer than"
                f" {LONGEST_SECONDS:g} s; send less"
            )
    return "".join(pieces)


class _RefusedError(jinja2.TemplateError):
    """Raised by a template's own `raise_exception`."""


class _GenerationTag(Extension):
    """Accept `{% generation %}...{% endgeneration %}`, which marks answers for training, as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> Node | list[Node]:
        """Return the marked statements themselves."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Build the sandbox; it allows no access to Python's internals and no change to the messages."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as models saw it in training: Jinja's own filter escapes <, >, & and ' for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _chosen(choice: str) -> str:
    """Return the source of a built-in template or of a file."""
    built_in = BUILT_IN.get(choice.lower())
    if built_in is not None:
        return built_in
    if Path(choice).is_file():
        return read_text(Path(choice))
    raise UsageError(f"--chat-template is {choice!r}; it must be {CHOICES} or the path of a .jinja file")


def _sources_in(folder: Path) -> dict[str, str]:
    """Return the templates of a model directory by name; {} if it has none.

    transformers writes chat_template.jinja today, and before wrote a string or a list of
    {"name", "template"} into tokenizer_config.json; multimodal models have chat_template.json.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": read_text(file)}
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, list):
            named = [entry for entry in found if isinstance(entry, dict)]
            return {str(entry.get("name")): str(entry.get("template")) for entry in named}
    return {}
