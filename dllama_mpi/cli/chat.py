"""Talk with the model: its chat template, the conversation so far, answers as they come.

Type a message and press Enter; /help lists commands and keys. Ctrl-C stops an answer, not the program; /quit, Ctrl-D
or the end of input leaves.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..log import say
from ..parallel.launch import is_root_process
from .chat_commands import Commands
from .conversation import Conversation, LocalConversation, RemoteConversation
from .interrupt import on_interrupt
from .options import add_model_options, add_sampling_options, add_speculation_option, add_stats_option, load
from .screen import Screen, find_streams
from .terminal import Terminal

if TYPE_CHECKING:
    from .line_editor import LineEditor


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
    add_stats_option(parser)
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
    chat: Chat | None = None
    with Screen(find_streams() if group.is_root else None) as screen:
        with group.together():
            if group.is_root:
                template = ChatTemplate.load(llm.tokenizer, args.chat_template)
                chat = Chat(LocalConversation(llm, template, args), screen, llm.cancel)
        with on_interrupt(llm.cancel if chat is None else chat.interrupted), llm.session():
            if chat is not None:
                chat.run()
    return 0


def _run_remote(args: argparse.Namespace) -> int:
    """Talk with a server; needs neither MPI nor a model here."""
    from .remote import Remote

    if not is_root_process():
        return 0
    remote = Remote(args.url, args.api_key)
    name = remote.model()
    say(f"{name} at {args.url}")
    with Screen(find_streams()) as screen:
        chat = Chat(RemoteConversation(remote, name, args), screen, remote.stop)
        with on_interrupt(chat.interrupted):
            chat.run()
    return 0


class Chat:
    """Reads messages and commands, and shows answers. stop: ends the answer that comes."""

    def __init__(self, conversation: Conversation, screen: Screen, stop: Callable[[], None]) -> None:
        self._conversation, self._screen = conversation, screen
        self._commands = Commands(conversation, screen.say, self._reply)
        self._reader = _reader(screen, stop, self._commands.names)
        self._commands.keys = self._reader.KEYS

    def interrupted(self) -> None:
        """Do what a signal asks for: end the answer, or say how to leave."""
        self._reader.interrupted()

    def run(self) -> None:
        """Read and answer until the end of input."""
        with self._reader:
            while not self._commands.is_over and (line := self._reader.read_line("> ")) is not None:
                try:
                    if line.startswith("/"):
                        self._commands.run(line)
                    elif text := line.strip():
                        self._answer(text)
                except RequestError as error:
                    self._screen.say(str(error))

    def _answer(self, text: str) -> None:
        """Answer a message and remember both; a message that cannot be answered is forgotten."""
        messages = self._conversation.messages
        messages.append({"role": "user", "content": text})
        if not self._reply():
            messages.pop()

    def _reply(self) -> bool:
        """Answer the last message, and remember that; return whether it could be answered."""
        said: list[str] = []
        is_begun = False
        try:
            with self._reader.answering():
                for piece in self._conversation.pieces(said):
                    self._screen.write_text(piece)
                    is_begun = True
                    self._reader.poll()
        except RequestError as error:
            if is_begun:
                self._screen.write_text("\n")
            self._screen.say(f"{error} (/reset forgets the conversation)")
            return False
        self._screen.write_text("\n")
        self._conversation.messages.append({"role": "assistant", "content": "".join(said)})
        if self._conversation.args.stats is not None:
            for line in self._conversation.figures(self._conversation.args.stats == "steps"):
                self._screen.say(line)
        return True


def _reader(screen: Screen, stop: Callable[[], None], commands: Sequence[str]) -> Terminal | LineEditor:
    """Return a line editor where standard input comes from a terminal that can be drawn on."""
    streams = screen.streams
    if streams is None or not streams.stdin or os.environ.get("TERM", "dumb") == "dumb":
        return Terminal(stop, streams)
    from .line_editor import LineEditor  # 0.2 s that a pipe need not wait

    return LineEditor(screen, stop, commands)
