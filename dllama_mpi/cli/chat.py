"""Talk with the model: its chat template, the conversation so far, answers as they come.

Type a message and press Enter. /reset forgets the conversation, /stats shows the last answer's figures, /help lists
the commands, /quit or end of input leaves. Ctrl-C stops an answer, not the program.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..log import say
from ..parallel.launch import is_root_process
from .interrupt import on_interrupt
from .options import add_model_options, add_sampling_options, add_speculation_option, load, sampling
from .terminal import Terminal

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.request import SamplingParams
    from ..text.chat_template import ChatTemplate
    from .remote import Remote

HELP = "/reset forget the conversation, /stats figures of the last answer, /quit leave, Ctrl-C stop an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--url",
        metavar="URL",
        help="talk with a server, such as http://pi0:9990, instead of a model here",
    )
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: the variable DLLAMA_MPI_API_KEY)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="llama2, llama3, deepseek3, chatml, mistral, zephyr, or a .jinja file (default: the model's)",
    )
    parser.add_argument("--stats", action="store_true", help="show figures after each answer on stderr")
    add_speculation_option(parser)
    add_model_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the conversation on rank 0; the others serve it."""
    if args.url is not None:
        return _run_remote(args)
    from ..parallel.group import connect
    from ..text.chat_template import ChatTemplate

    group = connect(args.timeout)
    llm = load(args, group)
    with group.together():
        if group.is_root:
            template = ChatTemplate.load(llm.tokenizer, args.chat_template)
            params = sampling(args, llm.folder, None)
    terminal = Terminal(llm.cancel)
    with on_interrupt(terminal.interrupted if group.is_root else llm.cancel), llm.session() as leads:
        if leads:
            LocalConversation(llm, template, params, args, terminal).run()
    return 0


def _run_remote(args: argparse.Namespace) -> int:
    """Talk with a server; needs neither MPI nor a model here."""
    from .remote import Remote

    if not is_root_process():
        return 0
    remote = Remote(args.url, args.api_key)
    name = remote.model()
    say(f"{name} at {args.url}")
    terminal = Terminal(remote.stop)
    with on_interrupt(terminal.interrupted):
        RemoteConversation(remote, name, args, terminal).run()
    return 0


class Conversation(ABC):
    """A conversation on the root, wherever its answers come from."""

    def __init__(self, args: argparse.Namespace, terminal: Terminal) -> None:
        self.args, self.terminal = args, terminal
        self.reset()

    @abstractmethod
    def pieces(self, said: list[str]) -> Iterator[str]:
        """Yield what is to be shown of the next answer, and put what is to be remembered of it into `said`."""

    @abstractmethod
    def figures(self, all_steps: bool) -> list[str]:
        """Return the last answer's figures."""

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def run(self) -> None:
        """Read and answer until the end of input."""
        with self.terminal:
            while (line := self.terminal.read_line("> ")) is not None:
                text = line.strip()
                if text == "/quit":
                    return
                if text == "/reset":
                    self.reset()
                elif text == "/stats":
                    self._show(self.figures(True))
                elif text == "/help":
                    say(HELP)
                elif text.startswith("/"):
                    say(f"unknown command {text.split()[0]}; {HELP}")
                elif text:
                    self.answer(text)

    def answer(self, text: str) -> None:
        """Answer a message and remember both; a message that cannot be answered is forgotten."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            for piece in self.pieces(said):
                print(piece, end="", flush=True)
                self.terminal.poll()
        except RequestError as error:
            self.messages.pop()
            say(f"{error} (/reset forgets the conversation)")
            return
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(said)})
        if self.args.stats:
            self._show(self.figures(False))

    @staticmethod
    def _show(lines: list[str]) -> None:
        for line in lines:
            say(line)


class LocalConversation(Conversation):
    """A conversation with the model that these ranks hold."""

    def __init__(
        self, llm: LLM, template: ChatTemplate, params: SamplingParams, args: argparse.Namespace, terminal: Terminal
    ) -> None:
        from ..engine.stats import Stats

        super().__init__(args, terminal)
        self.llm, self.template, self.params = llm, template, params
        self.stats = Stats()

    def pieces(self, said: list[str]) -> Iterator[str]:
        """Yield the answer's text."""
        from ..engine.stats import Stats

        self.stats = Stats()
        prompt = self.template.render(self.messages)
        for piece in self.llm.stream(prompt, self.params, self.stats, is_chat=True, measure_links=self.args.stats):
            said.append(piece)
            yield piece

    def figures(self, all_steps: bool) -> list[str]:
        """Return the last answer's figures."""
        return [*(self.stats.step_lines() if all_steps else []), *self.stats.summary_lines()]


class RemoteConversation(Conversation):
    """A conversation with a server."""

    def __init__(self, remote: Remote, model: str, args: argparse.Namespace, terminal: Terminal) -> None:
        super().__init__(args, terminal)
        self.remote, self.model = remote, model
        self.timings: dict[str, Any] = {}

    def pieces(self, said: list[str]) -> Iterator[str]:
        """Yield the reasoning and the answer; the answer alone is remembered."""
        a = self.args
        given = {
            "temperature": a.temperature,
            "top_p": a.topp,
            "top_k": a.topk,
            "min_p": a.minp,
            "max_tokens": a.steps,
            "seed": a.seed,
            "stop": a.stop or None,
            "repeat_penalty": a.repeat_penalty if a.repeat_penalty != 1 else None,
            "presence_penalty": a.presence_penalty or None,
            "frequency_penalty": a.frequency_penalty or None,
            "ignore_eos": a.ignore_eos or None,
        }
        body = {name: value for name, value in given.items() if value is not None}
        self.timings = {}
        for piece, is_answer in self.remote.stream(
            {"model": self.model, "messages": self.messages, **body}, self.timings
        ):
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
