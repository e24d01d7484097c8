"""How a job on three ranks ends: a rank that is killed, and signals, while answers are streamed."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.server.ranks import ranks_of
from tests.server.running import Server, events, read_some, served
from tests.tiers import slow

STREAMS = 4


@pytest.fixture
def server() -> Iterator[Server]:
    with served(3, "--nthreads", "1", "--timeout", "10", "--drain-timeout", "300") as found:
        yield found


@contextlib.contextmanager
def streams(server: Server, tokens: int) -> Iterator[list[socket.socket]]:
    """Begin some streams; all have begun to come."""
    body = json.dumps({"prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(server.connect()) for _ in range(STREAMS)]
        for connection in found:
            connection.sendall(head.encode() + body)
        for connection in found:
            assert b" 200 OK" in read_some(connection)
        yield found


def rest_of(connection: socket.socket) -> str:
    """Return what comes until the end, of whatever kind it is."""
    text = b""
    with contextlib.suppress(ConnectionError):
        while block := read_some(connection):
            text += block
            if text.endswith(b"0\r\n\r\n"):
                break
    return text.decode()


@pytest.mark.parametrize("rank", [slow(0), slow(1), slow(2)])
def test_a_rank_that_is_killed_ends_the_job_and_all_streams(server: Server, rank: int) -> None:
    with streams(server, 450) as connections:
        begun = time.monotonic()
        ranks_of(server)[rank].kill()
        for connection in connections:
            assert "[DONE]" not in rest_of(connection)
        assert server.process.wait(60) != 0
        print(f"over after {time.monotonic() - begun:.1f} s")


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_streams_finish_when_all_ranks_are_told_to_end(server: Server, number: int) -> None:
    with streams(server, 300) as connections:
        for rank in ranks_of(server):
            rank.send_signal(number)
        for connection in connections:
            found = events("\n".join(line for line in rest_of(connection).splitlines() if line.startswith("data:")))
            assert found[-1] == "[DONE]"
            assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_second_interrupt_ends_streams_at_once(server: Server) -> None:
    with streams(server, 450) as connections:
        root = ranks_of(server)[0]
        root.send_signal(signal.SIGINT)
        time.sleep(0.2)
        root.send_signal(signal.SIGINT)
        texts: list[str] = []
        threads = [threading.Thread(target=lambda c=c: texts.append(rest_of(c))) for c in connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any("[DONE]" in text for text in texts)
        assert server.process.wait(60) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()
