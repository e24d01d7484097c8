"""Turn a conversation into one prompt, by the model's own template or a built-in one.

A template is a Jinja program that comes with the model. It is rendered as transformers does it
(utils/chat_template_utils.py there): in a sandbox, with the same filters, functions and white-space rules; and in a
process of its own (template_process.py), with limits of time, memory and output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllama_mpi.errors import ModelError, RequestError, UsageError

from .builtin_templates import BUILT_IN
from .files import read_json, read_text
from .template_process import PROCESS, EndedError
from .tokenizer import Tokenizer

CHOICES = "|".join(BUILT_IN)
Message = Mapping[str, Any]
ANOTHER = f"choose one by --chat-template {CHOICES}, or give a .jinja file"


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
        ModelError: a source is not a Jinja template or takes too long to compile, or "default" is missing.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], origin: str) -> None:
        self.origin, self.sources = origin, dict(sources)
        self.special_tokens = dict(special_tokens)
        if "default" not in sources:
            raise ModelError(f"{origin} has the chat templates {sorted(sources)}, none named default; {ANOTHER}")
        try:
            answer = PROCESS.check(self.sources)
        except EndedError as error:
            answer = {"exceeds": str(error)}
        if answer:
            what = answer.get("broken") or answer.get("exceeds") or f"cannot be used: {answer.get('failed')}"
            raise ModelError(f"the chat template of {origin} {what}; {ANOTHER}")

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
        sources, origin = template_sources(tokenizer)
        if sources:
            return cls(sources, tokenizer.special_tokens, origin)
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
            RequestError: the template refuses the messages, cannot read them, or takes too much time or memory.
        """
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        values = {
            **self.special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        try:
            answer = PROCESS.render(self.sources, name, values)
        except EndedError as error:
            raise RequestError(f"the chat template of {self.origin} {error} for these messages; send less") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages cannot be given to a chat template: {error}; send JSON") from None
        match answer:
            case {"text": str(text)}:
                return text
            case {"refused": why}:
                raise RequestError(f"the model's chat template refuses these messages: {why}")
            case {"exceeds": what}:
                raise RequestError(f"the chat template of {self.origin} {what} for these messages; send less")
        raise RequestError(
            f"the chat template of {self.origin} fails on these messages: {answer.get('failed')}; "
            f'each needs a "role" and a "content" the template can read'
        )


def template_sources(tokenizer: Tokenizer) -> tuple[dict[str, str], str]:
    """Return the templates that came with a tokenizer or its model, by name, and where they are from; {} if none."""
    if tokenizer.templates:
        return tokenizer.templates, tokenizer.origin
    for folder in tokenizer.folders:
        if sources := sources_in(folder):
            return sources, str(folder)
    return {}, ""


def _chosen(choice: str) -> str:
    """Return the source of a built-in template or of a file."""
    built_in = BUILT_IN.get(choice.lower())
    if built_in is not None:
        return built_in
    if Path(choice).is_file():
        return read_text(Path(choice))
    raise UsageError(f"--chat-template is {choice!r}; it must be {CHOICES} or the path of a .jinja file")


def sources_in(folder: Path) -> dict[str, str]:
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
