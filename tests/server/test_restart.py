"""The job is started again when it ends badly, and clients are told meanwhile."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from dllama_mpi.cli.serve import without_options
from dllama_mpi.server import supervisor
from dllama_mpi.server.run import ServeOptions
from tests.mpi.launch import ROOT, environment, launcher, launcher_options, run
from tests.mpi.pool import pool
from tests.server.running import END_SECONDS, START_SECONDS, Server, launched, read_some, supervised
from tests.tiers import slow

PROMPT = "This module provides"


def ranks_of(server: Server) -> list[psutil.Process]:
    """Return the processes of the job's ranks, rank 0 first."""
    found = []
    for each in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if "--supervised" in each.cmdline() and each.cmdline()[1:3] == ["-m", "dllama_mpi"]:
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return sorted(
        found, key=lambda each: int(each.environ().get("PMI_RANK", each.environ().get("OMPI_COMM_WORLD_RANK", 0)))
    )


def health(server: Server) -> tuple[int, str, str | None]:
    """Return the status, the word, and Retry-After; (0, "", None) where the connection broke with the job."""
    try:
        found = server.get("/health")
    except httpx.TransportError:
        return 0, "", None
    return found.status_code, found.json()["status"], found.headers.get("Retry-After")


def until_ready(server: Server) -> list[tuple[int, str, str | None]]:
    """Return what /health says until it says ok."""
    end, told = time.monotonic() + START_SECONDS, [health(server)]
    while told[-1][0] != 200:
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.05)
        told.append(health(server))
    return told


def stream(server: Server) -> Any:
    """Return a connection over which a long answer comes."""
    connection = server.connect()
    body = json.dumps({"prompt": PROMPT, "max_tokens": 450, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    read_some(connection)
    return connection


def ends(connection: Any) -> bytes:
    """Return what still comes over a connection before it closes."""
    data = b""
    try:
        while more := read_some(connection):
            data += more
    except ConnectionError:
        pass
    return data


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    launch = shlex.join([launcher(), *launcher_options(), "-n", "2"])
    with supervised("--restart", "2", "--launch", launch, "--nthreads", "1") as found:
        yield found


@pytest.mark.slow
def test_a_job_whose_rank_is_killed_comes_back_until_it_has_too_often(server: Server) -> None:
    until_ready(server)
    for victim, number in ((1, 1), (0, 2)):
        with stream(server) as connection:
            ranks = ranks_of(server)
            assert len(ranks) == 2
            ranks[victim].kill()
            assert b"[DONE]" not in ends(connection)
        told = until_ready(server)
        # MPICH ends the other ranks by SIGTERM, on which the root begins to drain.
        assert {each[1] for each in told if each[0] == 503} <= {"draining", "restarting", "loading"}
        assert ("restarting", "5") in [each[1:] for each in told]
        assert f"restart {number} of 2" in server.log.read_text()
        answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5})
        assert answer.json()["usage"]["completion_tokens"] >= 1
    ranks_of(server)[1].kill()
    assert server.process.wait(END_SECONDS) not in (0, 2)
    assert "after 2 restarts (--restart 2)" in server.log.read_text()
    with pytest.raises(httpx.TransportError):
        server.get("/health")


@pytest.mark.slow
def test_launch_restarts_as_serve_does() -> None:
    launcher()
    with launched(2, 1, "--nthreads", "1") as server:
        until_ready(server)
        assert len(ranks_of(server)) == 2
        ranks_of(server)[1].kill()
        while "restart 1 of 1" not in server.log.read_text():
            assert server.process.poll() is None, server.log.read_text()
            time.sleep(0.05)
        until_ready(server)
        assert len(ranks_of(server)) == 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(END_SECONDS) == 0, server.log.read_text()


def test_other_routes_while_it_restarts() -> None:
    with supervised("--restart", "1", "--nthreads", "1") as server:
        until_ready(server)
        assert len(ranks_of(server)) == 1
        ranks_of(server)[0].kill()
        while health(server)[1] != "restarting":
            time.sleep(0.01)
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        answer = server.post("/v1/chat/completions", body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json()["error"]["type"] == "service_unavailable_error"
        assert server.post("/v1/messages", body).json()["error"]["type"] == "overloaded_error"
        server.process.send_signal(signal.SIGTERM)  # between two jobs, or while one loads: nothing is lost
        assert server.process.wait(END_SECONDS) == 0, server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_job(number: int) -> None:
    launch = shlex.join([launcher(), *launcher_options(), "-n", "2"])
    with supervised("--restart", "2", "--launch", launch, "--nthreads", "1") as server:
        until_ready(server)
        with stream(server) as connection:
            server.process.send_signal(number)
            assert b"[DONE]" in ends(connection)
        assert server.process.wait(END_SECONDS) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_job_whose_supervisor_is_killed_ends() -> None:
    with supervised("--restart", "2", "--nthreads", "1") as server:
        until_ready(server)
        [root] = ranks_of(server)
        server.process.kill()
        assert psutil.wait_procs([root], END_SECONDS)[1] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--restart", "2", "--model", "/nowhere"], "/nowhere"),
        (["--restart", "2", "--launch", "no-such-launcher -n 2"], "no-such-launcher"),
        slow(["--restart", "2", "--launch", "mpiexec '"], "--launch"),
        slow(["--restart", "0"], "--restart"),
        (["--launch", "mpiexec -n 2"], "needs --restart"),
        slow(["--restart", "2", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["--supervised", "/nowhere"], "--restart"),
    ],
)
def test_mistakes_are_told_once_and_nothing_is_started_again(options: list[str], said: str) -> None:
    done = run([sys.executable, "-m", "dllama_mpi", "serve", "--port", "0", *options])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_not_shared(server_port: int) -> None:
    done = run([sys.executable, "-m", "dllama_mpi", "serve", "--port", str(server_port), "--restart", "1"])
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
    assert f"port {server_port}" in done.stderr


@pytest.fixture
def server_port() -> Iterator[int]:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_under_a_launcher_it_says_how_it_is_started() -> None:
    done = pool(2).run(["-m", "dllama_mpi", "serve", "--port", "0", "--restart", "3"], check=False)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert '--launch "mpiexec -n 2"' in done.stderr


def test_the_supervisor_needs_neither_mpi_nor_compiled_code() -> None:
    code = "import sys, dllama_mpi.cli, dllama_mpi.server.supervisor; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment()
    )
    assert not {"mpi4py", "numba", "llvmlite"} & {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(("steady", "runs", "status"), [(600.0, 2, 7), (0.0, 4, 0)])
def test_a_job_that_has_served_long_starts_the_count_anew(
    steady: float, runs: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job: ready at once, ends with 7 three times, then with 0."""
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", steady)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.01)
    job = (
        "import pathlib, socket, sys; line = socket.socket(socket.AF_UNIX); line.connect(sys.argv[-1])\n"
        "line.sendall(b'LR'); file = pathlib.Path(sys.argv[1]); file.write_text(file.read_text() + 'x')\n"
        "sys.exit(7 if len(file.read_text()) < 4 else 0)"
    )
    (tmp_path / "runs").write_text("")
    found = supervisor.Supervisor([sys.executable, "-c", job, str(tmp_path / "runs")], ServeOptions(port=0), 1)
    assert found.run() == status
    assert len((tmp_path / "runs").read_text()) == runs


def test_which_arguments_the_job_gets() -> None:
    given = ["serve", "--restart", "3", "--port=1", "--launch=mpiexec -n 2", "--launch", "x", "--alias", "--restarted"]
    assert without_options(given, ("--restart", "--launch")) == ["serve", "--port=1", "--alias", "--restarted"]
