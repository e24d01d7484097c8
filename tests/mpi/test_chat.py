"""Conversations and texts on a real terminal, under a real mpiexec."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import termios
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.mpi.launch import launcher, launcher_options
from tests.mpi.typist import Typist
from tests.server.running import scripted
from tests.tiers import slow

PROGRAM = [sys.executable, "-m", "dllama_mpi"]
CHAT = ["chat", "--seed", "1", "--ignore-eos", "--steps", "6"]
TEXT = ["--prompt", "Return the", "--steps", "5", "--temperature", "0"]
PROMPT = "\x1b[0;32;1m> "
LEAVES = "leaves)"


def command(ranks: int, *options: str) -> list[str]:
    """Return a command line; 0 ranks: without mpiexec."""
    start = [launcher(), *launcher_options(), "-n", str(ranks)] if ranks else []
    return [*start, *PROGRAM, *options]


def typist(line: list[str], folder: Path, **variables: str) -> Typist:
    """Start a command on a terminal that knows colours."""
    return Typist(line, {"XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm", "NO_COLOR": "", **variables})


def modes(terminal: Typist) -> list[Any]:
    """Return a terminal's modes."""
    return termios.tcgetattr(terminal.fd)


def interrupt_answers(terminal: Typist, times: int = 3) -> None:
    """Ask for long answers and stop them; mpiexec itself would end the job at the second Ctrl-C."""
    terminal.type("/set max_tokens default\r")
    terminal.until(PROMPT)
    for _ in range(times):
        terminal.type("tell me\r")
        terminal.until("tell me")
        terminal.until("\n")
        terminal.type("\x03")
    terminal.type("/set top_p 7\r")
    terminal.until("/set top_p: 7 is out of range")


@pytest.mark.parametrize("ranks", [slow(0), 2])
def test_a_conversation(ranks: int, tmp_path: Path) -> None:
    """One job for all that it can do: editing, pasting, commands, Ctrl-C, history, and the modes put back."""
    terminal = typist(command(ranks, *CHAT), tmp_path)
    before = modes(terminal)
    terminal.until(PROMPT)
    assert not modes(terminal)[3] & (termios.ISIG | termios.ECHO | termios.ICANON)
    terminal.type("wrold" + "\x1b[D" * 4 + "\x1b[3~" * 4 + "orld\r")
    terminal.until("world\x1b")
    terminal.until(PROMPT)
    terminal.type("\x1b[200~one\rtwo\nthree\x1b[201~")
    terminal.until("three")
    terminal.type("\r")
    terminal.until(PROMPT)
    terminal.type("first\x1b\rsecond\\\rthird\r")
    terminal.until("third")
    terminal.until(PROMPT)
    saved = tmp_path / "talk.json"
    terminal.type(f"/save {saved}\r")
    terminal.until("6 messages")
    messages = json.loads(saved.read_text())
    assert [each["content"] for each in messages[::2]] == ["world", "one\ntwo\nthree", "first\nsecond\nthird"]
    assert all(each["content"] for each in messages[1::2])
    interrupt_answers(terminal)
    terminal.type("abc\x03")
    terminal.until(LEAVES)
    terminal.type("\x1b[A\x1b[A")
    terminal.until("tell me")
    terminal.type("\x03")
    terminal.until(LEAVES)
    terminal.type("\x04")
    assert terminal.status() == 0
    assert modes(terminal) == before
    file = tmp_path / "state" / "dllama_mpi" / "chat_history"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "+one\n+two\n+three\n" in file.read_text()


def rank_0(job: int) -> int:
    """Return the process of a job that holds the conversation."""
    for process in psutil.Process(job).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            env = process.environ()
            rank = env.get("PMI_RANK", env.get("OMPI_COMM_WORLD_RANK"))
            if rank == "0" and process.cmdline()[1:3] == PROGRAM[1:]:
                return process.pid
    raise AssertionError("no rank 0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "whom"),
    [(0, signal.SIGTERM, "rank"), (0, signal.SIGKILL, "rank"), (2, signal.SIGKILL, "rank"), (2, signal.SIGTERM, "job")],
)
def test_a_killed_conversation_leaves_the_terminal_as_it_was(
    ranks: int, number: int, whom: str, tmp_path: Path
) -> None:
    shell = f"{shlex.join(command(ranks, *CHAT))}; echo ended; sleep 600"
    terminal = typist(["sh", "-c", shell], tmp_path)
    before = modes(terminal)
    terminal.until(PROMPT)
    job = psutil.Process(terminal.pid).children()[0].pid
    pid = job if whom == "job" or ranks == 0 else rank_0(job)
    assert modes(terminal) != before
    os.kill(pid, number)
    terminal.until("ended")
    end = time.monotonic() + 60
    while modes(terminal) != before:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(terminal.pid, signal.SIGKILL)
    os.waitpid(terminal.pid, 0)


def typed(shell: str, folder: Path) -> str:
    """Return what a terminal showed of a shell's command that ended well."""
    terminal = typist(["sh", "-c", shell], folder)
    assert terminal.status() == 0, terminal.seen
    return terminal.seen


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_text_on_a_terminal_stands_behind_its_prompt(ranks: int, tmp_path: Path) -> None:
    """And a file or a pipe gets the text alone, whoever sits at the terminal."""
    line = shlex.join(command(ranks, *TEXT))
    file, lines = tmp_path / "text", tmp_path / "lines"
    seen = typed(f"{line} >{file}; echo; {line}; {line} 2>{lines} | cat", tmp_path)
    text = file.read_text()
    redirected, shown, piped = seen.partition("\x1b[1mReturn the\x1b[0m")
    assert shown
    assert "5 tokens, " in redirected  # the speed is for the person, and stderr is seen
    assert "Return the" not in redirected
    assert text.rstrip("\n") not in redirected
    body = text.replace("\n", "\r\n")
    assert piped.startswith(body)
    assert "download` lists" in piped
    assert piped.endswith(body)
    assert "Return the" not in piped
    assert "tokens/s" not in lines.read_text()


@pytest.mark.slow
def test_a_job_without_a_terminal_leaves_that_of_others_alone(tmp_path: Path) -> None:
    """Such as a shell's further up."""
    if shutil.which("setsid") is None:
        pytest.skip("no setsid on this system")
    file = tmp_path / "text"
    seen = typed(f"setsid -w {shlex.join(command(2, *TEXT))} </dev/null >{file} 2>&1", tmp_path)
    assert seen == ""
    assert len(file.read_text()) > 5


@pytest.mark.slow
def test_ranks_marked_by_the_launcher_are_shown_by_it(tmp_path: Path) -> None:
    """Whoever asks mpiexec to mark or store what ranks write gets that."""
    mark = ["--output", "tag"] if launcher_options() else ["-l"]
    start, *rest = command(2, *TEXT)
    seen = typed(shlex.join([start, *mark, *rest]), tmp_path)
    assert "Return the" not in seen
    assert "\x1b[" not in seen


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_lines_of_a_pipe_need_no_terminal(ranks: int, tmp_path: Path) -> None:
    """Even where there is one: it is left alone."""
    line = shlex.join(command(ranks, *CHAT))
    terminal = typist(["sh", "-c", f"printf 'hello\\n/quit\\n' | {line} >{tmp_path}/text"], tmp_path)
    assert terminal.status() == 0
    assert "\x1b[?2004h" not in terminal.seen
    assert len((tmp_path / "text").read_text()) > 5


@pytest.mark.slow
def test_a_terminal_that_can_do_nothing_gets_lines(tmp_path: Path) -> None:
    if launcher_options():
        pytest.skip("Open MPI's mpirun passes on whole lines, so that no prompt is seen")
    terminal = typist(command(2, *CHAT), tmp_path, TERM="dumb")
    terminal.until("> ")
    for _ in range(3):
        terminal.type("tell me a story\n")
        terminal.until("\n")
        terminal.type("\x03")
        terminal.until("> ")
    terminal.type("/quit\n")
    assert terminal.status() == 0
    assert "\x1b[" not in terminal.seen


@pytest.mark.slow
def test_with_a_server(tmp_path: Path) -> None:
    with scripted() as server:
        terminal = typist([*PROGRAM, "chat", "--url", server.url], tmp_path, NO_COLOR="1")
        terminal.until("\x1b[0m>")
        terminal.type("say <<one>>\r")
        terminal.until("one\r\n")
        terminal.type("/reset\rgo on {{20 ms}}\r")
        terminal.until("xyz")
        terminal.type("\x03")
        server.until_idle()
        terminal.type("\x04")
        assert terminal.status() == 0
        assert "\x1b[0;32" not in terminal.seen
