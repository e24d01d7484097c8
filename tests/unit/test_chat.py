"""Commands of a conversation, its settings and messages, and how keys become messages."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit import PromptSession
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from dllama_mpi.cli import history, settings
from dllama_mpi.cli.chat_commands import Commands
from dllama_mpi.cli.conversation import Conversation
from dllama_mpi.cli.line_editor import bindings
from dllama_mpi.cli.options import add_sampling_options
from dllama_mpi.cli.screen import _redirects_output
from dllama_mpi.errors import RequestError


def options(*given: str) -> argparse.Namespace:
    """Return parsed options of sampling, with a system message."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--system")
    add_sampling_options(parser)
    return parser.parse_args(given)


class Echo(Conversation):
    """Answers with the number of messages."""

    def pieces(self, said: list[str]) -> Iterator[str]:
        said.append(str(len(self.messages)))
        yield from said

    def figures(self, all_steps: bool) -> list[str]:
        return ["fast", "each"][: 1 + all_steps]

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.args, option) for name, option in settings.NAMES.items()}


class Talk:
    """A conversation, its commands, and what these have shown."""

    def __init__(self, *given: str) -> None:
        self.conversation = Echo(options(*given))
        self.lines: list[str] = []
        self.can_answer = True
        self.commands = Commands(self.conversation, self.lines.append, self.reply)

    def reply(self) -> bool:
        said: list[str] = []
        if self.can_answer:
            list(self.conversation.pieces(said))
            self.conversation.messages.append({"role": "assistant", "content": "".join(said)})
        return self.can_answer

    def ask(self, text: str) -> None:
        self.conversation.messages.append({"role": "user", "content": text})
        self.reply()

    def run(self, line: str) -> list[str]:
        """Return what a command has shown."""
        self.lines.clear()
        self.commands.run(line)
        return list(self.lines)

    def said(self) -> list[str]:
        return [each["content"] for each in self.conversation.messages]


def test_set_changes_with_the_options_checks() -> None:
    talk = Talk("--topp", "0.5", "--stop", "x")
    talk.run("/set temperature 0")
    talk.run("/set top_k 7")
    talk.run("/set max-tokens 9")
    talk.run("/set presence_penalty -1.5")
    talk.run("/set ignore_eos on")
    talk.run("/set stop  the end")
    args = talk.conversation.args
    assert (args.temperature, args.topk, args.steps, args.presence_penalty) == (0, 7, 9, -1.5)
    assert (args.topp, args.ignore_eos, args.stop) == (0.5, True, ["the end"])
    talk.run("/set stop default")
    talk.run("/set topp default")
    assert (talk.conversation.args.stop, talk.conversation.args.topp) == ([], None)
    shown = dict(line.split(maxsplit=1) for line in talk.run("/set"))
    assert list(shown) == list(settings.NAMES)
    assert (shown["temperature"], shown["top_p"], shown["ignore_eos"], shown["stop"]) == ("0", "default", "on", "none")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set temperature 200", "/set temperature: 200 is out of range: at least 0, at most 100"),
        ("/set top_p 0", "/set top_p: 0 is out of range: above 0, at most 1"),
        ("/set seed x", "/set seed: 'x' is not a whole number"),
        ("/set ignore_eos maybe", "/set ignore_eos: 'maybe' is neither on nor off"),
        ("/set temperature", "/set temperature needs a value"),
        ("/set model x", "/set model: no such setting; there are temperature, "),
        ("/usr/bin/env is", "unknown command /usr/bin/env; /help lists them"),
        ("/stats all", "/stats all: give steps or nothing"),
        ("/save", "/save needs a file"),
        ("/save x", "/save: nothing was said yet"),
        ("/retry", "/retry: nothing was asked yet"),
        ("/undo", "/undo: nothing was asked yet"),
        ("/load /nowhere/x", "/load /nowhere/x: No such file or directory"),
    ],
)
def test_a_mistake_is_a_line_and_changes_nothing(line: str, told: str) -> None:
    talk = Talk()
    before = vars(talk.conversation.args).copy()
    with pytest.raises(RequestError) as error:
        talk.run(line)
    assert str(error.value).startswith(told)
    assert vars(talk.conversation.args) == before


def test_system_retry_undo_reset() -> None:
    talk = Talk("--system", "Be brief.")
    talk.ask("a")
    talk.ask("b")
    assert talk.said() == ["Be brief.", "a", "2", "b", "4"]
    talk.run("/system Be long.")
    assert talk.said() == ["Be long.", "a", "2", "b", "4"]
    assert talk.run("/system") == ["Be long."]
    talk.run("/system none")
    talk.run("/retry")
    assert talk.said() == ["a", "2", "b", "3"]
    talk.can_answer = False
    talk.run("/retry")
    assert talk.said() == ["a", "2", "b", "3"]
    assert talk.run("/undo") == ["taken back: b"]
    assert talk.said() == ["a", "2"]
    talk.run("/system Be kind.")
    talk.run("/reset")
    assert talk.said() == ["Be kind."]
    assert talk.run("/stats steps") == ["fast", "each"]
    assert [line.split()[0] for line in talk.run("/help")[:-1]] == talk.commands.names
    talk.run("/quit")
    assert talk.commands.is_over


def test_save_and_load(tmp_path: Path) -> None:
    talk, file = Talk("--system", "Be brief."), tmp_path / "talk"
    talk.ask("what\nis\N{SNOWMAN}?")
    file.write_text("old")
    assert talk.run(f"/save {file}") == [f"{file}: 3 messages"]
    assert list(tmp_path.iterdir()) == [file]
    assert json.loads(file.read_text())[1] == {"role": "user", "content": "what\nis\N{SNOWMAN}?"}
    other = Talk()
    assert other.run(f"/load {file}") == [f"{file}: 3 messages; the last: 2"]
    assert other.said() == talk.said()
    other.run("/reset")
    assert other.said() == ["Be brief."]
    with pytest.raises(RequestError, match=r"^/save .*: No such file or directory$"):
        talk.run("/save /nowhere/at/all")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value"),
        ("[]", "a list of messages"),
        ('{"a": 1}', "a list of messages"),
        ('[{"role": "tool", "content": "x"}]', "message 1 needs a role"),
        ('[{"role": "user", "content": "x"}, {"role": "user"}]', "message 2 needs a text"),
        ('[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]', "message 2: a system message"),
        ("[" * 100_000, "no conversation"),
    ],
)
def test_a_bad_file_is_a_line(tmp_path: Path, text: str, told: str) -> None:
    talk, file = Talk(), tmp_path / "talk"
    talk.ask("a")
    file.write_text(text)
    with pytest.raises(RequestError, match=told) as error:
        talk.run(f"/load {file}")
    assert str(error.value).startswith(f"/load {file}: no conversation (")
    assert "\n" not in str(error.value)
    assert talk.said() == ["a", "1"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("hello\n", "hello"),  # typed before the terminal was in raw mode
        ("\x1b[200~a\r\nb\rc\n\x1b[201~\r", "a\nb\nc\n"),
        ("a\x1b\rb\\\rc\r", "a\nb\nc"),
        ("a\\b\x1b[D\r", "a\\b"),
        ("old\x12one\r\r", "number one"),  # found in the history
    ],
)
def test_keys_become_messages(keys: str, message: str) -> None:
    with create_pipe_input() as pipe:
        session: PromptSession[str] = PromptSession(
            input=pipe, output=DummyOutput(), multiline=True, key_bindings=bindings()
        )
        session.history.append_string("number one")
        session.history.append_string("number two")
        pipe.send_text(keys)
        assert session.prompt("> ") == message


def test_history_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(history, "MOST_BYTES", 1000)
    path = history.history_file()
    for number in range(100):
        history.History(path).store_string(f"message\n{number}")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size < 1100
    kept = list(history.History(path).load_history_strings())
    assert kept == [f"message\n{number}" for number in range(99, 99 - len(kept), -1)]
    assert len(kept) > 5
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    nowhere = history.History(Path("/proc/nowhere/file"))
    nowhere.store_string("x")
    assert list(nowhere.load_history_strings()) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("mpiexec -n 2 python -m dllama_mpi -l", False),
        ("mpiexec -l -n 2 python x", True),
        ("mpirun --output tag -np 2 /usr/bin/python3.11 x", True),
        ("mpiexec -outfile-pattern=o.%r -n 2 python x", True),
        ("mpirun --tag-output -np 2 dllama-mpi", True),
    ],
)
def test_options_of_launchers_that_change_output(line: str, told: bool) -> None:
    assert _redirects_output(line.split()) is told
