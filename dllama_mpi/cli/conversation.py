"""What is said in a conversation, and where its answers come from: the model of these ranks, or a server."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .options import sampling
from .settings import NAMES

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..text.chat_template import ChatTemplate
    from .remote import Remote


class Conversation(ABC):
    """A conversation on the root.

    Attributes:
        messages: what was said, in OpenAI's form. system: the system message, None without.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.system: str | None = args.system or None
        self.messages: list[dict[str, str]] = []
        self.reset()

    @abstractmethod
    def pieces(self, said: list[str]) -> Iterator[str]:
        """Yield what is to be shown of the next answer, and put what is to be remembered of it into `said`."""

    @abstractmethod
    def figures(self, all_steps: bool) -> list[str]:
        """Return the last answer's figures; all_steps: a line a token besides."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return how answers are sampled, by the names of `/set`; None where that is for others to say."""

    def take(self, args: argparse.Namespace) -> None:
        """Sample by these options from now on.

        Raises:
            RequestError: a value that cannot be; all is as before.
        """
        self.args = args

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def set_system(self, text: str | None) -> None:
        """Put another system message, or none, before what was said."""
        said = self.said()
        self.system = text
        self.reset()
        self.messages += said

    def said(self) -> list[dict[str, str]]:
        """Return the messages behind the system message."""
        return self.messages[1:] if self.messages and self.messages[0]["role"] == "system" else list(self.messages)

    def cut(self, at: int) -> list[dict[str, str]]:
        """Take away and return the messages from an index on."""
        rest = self.messages[at:]
        del self.messages[at:]
        return rest

    def last_question(self) -> int | None:
        """Return the index of the user's last message, or None without one."""
        found = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        return found[-1] if found else None


class LocalConversation(Conversation):
    """A conversation with the model that these ranks hold."""

    def __init__(self, llm: LLM, template: ChatTemplate, args: argparse.Namespace) -> None:
        from ..engine.stats import Stats

        super().__init__(args)
        self.llm, self.template = llm, template
        self.params = sampling(args, llm.folder, None)
        self.stats = Stats()

    def pieces(self, said: list[str]) -> Iterator[str]:
        """Yield the answer's text."""
        from ..engine.stats import Stats

        self.stats = Stats()
        prompt = self.template.render(self.messages)
        measure = self.args.stats is not None
        for piece in self.llm.stream(prompt, self.params, self.stats, is_chat=True, measure_links=measure):
            said.append(piece)
            yield piece

    def figures(self, all_steps: bool) -> list[str]:
        """Return the last answer's figures."""
        return [*(self.stats.step_lines() if all_steps else []), *self.stats.summary_lines()]

    def settings(self) -> dict[str, Any]:
        """Return the parameters in effect."""
        return {name: getattr(self.params, name) for name in NAMES}

    def take(self, args: argparse.Namespace) -> None:
        """Sample by these options from now on."""
        self.params = sampling(args, self.llm.folder, None)
        super().take(args)


class RemoteConversation(Conversation):
    """A conversation with a server."""

    def __init__(self, remote: Remote, model: str, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.remote, self.model = remote, model
        self.timings: dict[str, Any] = {}

    def pieces(self, said: list[str]) -> Iterator[str]:
        """Yield the reasoning and the answer; the answer alone is remembered."""
        body = {"model": self.model, "messages": self.messages}
        given = {name: value for name, value in self.settings().items() if value is not None}
        self.timings = {}
        for piece, is_answer in self.remote.stream({**body, **given}, self.timings):
            if is_answer:
                said.append(piece)
            yield piece

    def figures(self, all_steps: bool) -> list[str]:
        """Return what the server told of the last answer."""
        t = self.timings
        if not t:
            return ["no figures"]
        return [
            f"prompt {t['prompt_n']} tokens and {t.get('cache_n', 0)} from the cache, first token after"
            f" {t['prompt_ms'] / 1e3:.3f} s; output {t['predicted_n']} tokens, {t['predicted_per_second']:.1f} tokens/s"
        ]

    def settings(self) -> dict[str, Any]:
        """Return what is asked of the server; None: as it likes."""
        given = {name: getattr(self.args, option) for name, option in NAMES.items()}
        if given["repeat_penalty"] == 1:
            given["repeat_penalty"] = None
        for name in ("presence_penalty", "frequency_penalty", "stop", "ignore_eos"):
            given[name] = given[name] or None
        return given
