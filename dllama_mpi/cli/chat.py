"""Talk with the model: its chat template, the conversation so far, answers as they come.

Type a message and press Enter. /reset forgets the conversation, /stats shows the last answer's figures, /help lists
the commands, /quit or end of input leaves. Ctrl-C stops an answer, not the program.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..log import say
from .interrupt import on_interrupt
from .options import add_model_options, add_sampling_options, add_speculation_option, load, sampling
from .terminal import Terminal

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.request import SamplingParams
    from ..text.chat_template import ChatTemplate

HELP = "/reset forget the conversation, /stats figures of the last answer, /quit leave, Ctrl-C stop an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
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
    from ..parallel.group import connect
    from ..text.chat_template import ChatTemplate

    group = connect()
    llm = load(args, group)
    with group.together():
        if group.is_root:
            template = ChatTemplate.load(llm.tokenizer, args.chat_template)
            params = sampling(args, llm.folder, None)
    terminal = Terminal(llm.cancel)
    with on_interrupt(terminal.interrupted if group.is_root else llm.cancel), llm.session() as leads:
        if leads:
            Conversation(llm, template, params, args, terminal).run()
    return 0


class Conversation:
    """A conversation on the root."""

    def __init__(
        self, llm: LLM, template: ChatTemplate, params: SamplingParams, args: argparse.Namespace, terminal: Terminal
    ) -> None:
        from ..engine.stats import Stats

        self.llm, self.template, self.params, self.args = llm, template, params, args
        self.stats = Stats()
        self.terminal = terminal
        self.reset()

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
                    self._show(self.stats.step_lines() + self.stats.summary_lines())
                elif text == "/help":
                    say(HELP)
                elif text.startswith("/"):
                    say(f"unknown command {text.split()[0]}; {HELP}")
                elif text:
                    self.answer(text)

    def answer(self, text: str) -> None:
        """Answer a message and remember both; a message that cannot be answered is forgotten."""
        from ..engine.stats import Stats

        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        self.stats = Stats()
        try:
            prompt = self.template.render(self.messages)
            for piece in self.llm.stream(prompt, self.params, self.stats, is_chat=True, measure_links=self.args.stats):
                pieces.append(piece)
                print(piece, end="", flush=True)
                self.terminal.poll()
        except RequestError as error:
            self.messages.pop()
            say(f"{error} (/reset forgets the conversation)")
            return
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if self.args.stats:
            self._show(self.stats.summary_lines())

    @staticmethod
    def _show(lines: list[str]) -> None:
        for line in lines:
            say(line)
