"""Servers as processes: the scripted one, and the real one under mpiexec."""

from __future__ import annotations

import json
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.mpi import guard
from tests.mpi.launch import ROOT, launcher, launcher_options, run_mark, start

START_SECONDS = 300.0
END_SECONDS = 60.0


@dataclass
class Server:
    """A server that runs.

    Attributes:
        url: without /v1. log: what it has said.
    """

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.url.rsplit(":", 1)[1])

    def client(self, **options: Any) -> httpx.Client:
        """Return an HTTP client."""
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Post a JSON body, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.client() as client:
            return client.post(path, content=content, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Get a route."""
        with self.client() as client:
            return client.get(path, **options)

    def connect(self) -> socket.socket:
        """Return a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def until_idle(self) -> None:
        """Wait until no request is running."""
        end = time.monotonic() + END_SECONDS
        while self.get("/slots").json():
            assert time.monotonic() < end, "requests go on"
            time.sleep(0.05)


@contextmanager
def scripted(style: str = "hermes", *keys: str) -> Iterator[Server]:
    """Run a server whose engine says what it is told."""
    command = [sys.executable, str(ROOT / "tests/server/scripted.py"), style, *keys]
    with _running(command, re.compile(r"^(?P<port>\d+)$", re.MULTILINE)) as server:
        yield server


@contextmanager
def served(ranks: int, *options: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Run `dllama_mpi serve` on a free port; its status must be 0 in the end unless the test has asked for it."""
    command = [launcher(), *launcher_options(), "-n", str(ranks), sys.executable, "-m", "dllama_mpi", "serve"]
    with _running([*command, "--port", "0", *options], re.compile(r"http://127.0.0.1:(?P<port>\d+)"), env) as server:
        yield server


@contextmanager
def supervised(*options: str) -> Iterator[Server]:
    """Run `dllama_mpi serve --restart N` on a free port, from the time when its first job listens."""
    with _supervised("serve", "--port", "0", *options) as server:
        yield server


@contextmanager
def launched(ranks: int, restarts: int, *options: str) -> Iterator[Server]:
    """Do the same by `dllama_mpi launch --restart N`."""
    launch = ["launch", "--restart", str(restarts), "-n", str(ranks)]
    with _supervised(*launch, "--", "serve", "--port", "0", *options) as server:
        yield server


@contextmanager
def _supervised(*arguments: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "dllama_mpi", *arguments]
    with _running(command, re.compile(r"http://127.0.0.1:(?P<port>\d+)")) as server:
        yield server


@contextmanager
def _running(command: list[str], said: re.Pattern[str], env: dict[str, str] | None = None) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix=guard.folder_prefix()) as folder:
        log = Path(folder) / "log"
        mark = f"{run_mark()}/server-{Path(folder).name}"
        with log.open("w") as output:
            process = start(command, {**(env or {}), guard.VARIABLE: mark}, stdout=output, stderr=subprocess.STDOUT)
        try:
            match = _await(log, said, process)
            yield Server(f"http://127.0.0.1:{match['port']}", process, log)
            if process.poll() is None:
                process.terminate()
                process.wait(END_SECONDS)
        finally:
            guard.end_marked(mark)
            process.wait()


def _await(log: Path, said: re.Pattern[str], process: subprocess.Popen[str]) -> re.Match[str]:
    end = time.monotonic() + START_SECONDS
    while (match := said.search(log.read_text())) is None:
        assert process.poll() is None, f"the server has ended\n{log.read_text()}"
        assert time.monotonic() < end, f"the server does not start\n{log.read_text()}"
        time.sleep(0.05)
    return match


def events(text: str) -> list[Any]:
    """Return the data of a stream's events, the last "[DONE]" left as it is."""
    found = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    return [each if each == "[DONE]" else json.loads(each) for each in found]


def read_some(connection: socket.socket, seconds: float = 30) -> bytes:
    """Return what comes next, b"" at the end."""
    ready, _, _ = select.select([connection], [], [], seconds)
    assert ready, "nothing has come"
    return connection.recv(65536)
