"""`chat --url`: a conversation with a server from a terminal."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.mpi.launch import ROOT, environment, run
from tests.server.running import scripted


def chat(url: str, *options: str, lines: list[str]) -> Any:
    """Return what came of a conversation."""
    command = [sys.executable, "-m", "dllama_mpi", "chat", "--url", url, *options]
    return run(command, stdin="".join(f"{line}\n" for line in lines))


def test_conversation() -> None:
    with scripted("none", "the-key") as server:
        lines = ["say <<one two>>", "again", "/stats", "/reset", "<<<think>well</think>yes>>", "/quit"]
        done = chat(server.url, "--api-key", "the-key", "--steps", "30", lines=lines)
        assert done.returncode == 0
        assert done.stdout == "one two\none two\nwellyes\n"
        assert "demo at" in done.stderr
        assert "tokens/s" in done.stderr
        refused = chat(server.url, lines=["hello"])
        assert refused.returncode == 2
        assert "API key" in refused.stderr


@pytest.mark.slow
def test_mistakes_are_told_in_a_line() -> None:
    for url, said in (("http://127.0.0.1:9", "cannot be reached"), ("ftp://x", "no address of a server")):
        done = chat(url, lines=["hello"])
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_the_server_refuses_is_forgotten() -> None:
    with scripted() as server:
        done = chat(server.url, lines=["word " * 6000, "say <<fine>>"])
        assert done.stdout == "fine\n"
        assert "context" in done.stderr


def test_ctrl_c_stops_an_answer() -> None:
    with scripted() as server:
        command = [sys.executable, "-m", "dllama_mpi", "chat", "--url", server.url]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
            env=environment(), bufsize=0,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"go on {{20 ms}}\n")
        assert select.select([process.stdout], [], [], 60)[0]
        assert os.read(process.stdout.fileno(), 100)
        process.send_signal(signal.SIGINT)
        server.until_idle()
        process.stdin.write(b"say <<done>>\n")
        process.stdin.close()
        assert process.stdout.read().endswith(b"done\n")
        process.stdout.close()
        assert process.wait(60) == 0
