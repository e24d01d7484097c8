"""What connections can do to the real server: after each batch it answers as before, and has lost nothing."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.ranks import memory_of, ranks_of
from tests.server.running import Server, read_some, served
from tests.tiers import slow

PROMPT = {"prompt": "This module provides", "max_tokens": 12, "temperature": 0}
MOST_GROWTH = 250 << 20  # bytes that all batches together may leave behind in a rank; 700 MB are sent


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(2, "--nthreads", "1", "--header-timeout", "2") as found:
        yield found
        assert "Traceback" not in found.log.read_text()


@pytest.fixture(scope="module")
def before(server: Server) -> tuple[str, list[int]]:
    """Return what a normal request gets, and each rank's bytes of memory then."""
    for _ in range(3):
        text = answer(server)
    return text, memory_of(server)


def answer(server: Server) -> str:
    text: str = server.post("/v1/completions", PROMPT).json()["choices"][0]["text"]
    return text


@pytest.fixture(autouse=True)
def unharmed(server: Server, before: tuple[str, list[int]]) -> Iterator[None]:
    """Check after each test that the server is as before it."""
    yield
    text, memory = before
    assert answer(server) == text
    server.until_idle()
    assert server.get("/cluster").json()["engine"]["pages_used"] == 0
    for now, then in zip(memory_of(server), memory, strict=True):
        assert now - then < MOST_GROWTH


def post(body: bytes, *headers: str, path: str = "/v1/completions", host: str | None = "localhost") -> bytes:
    """Return a request as it is sent; of headers that are given none is added."""
    lines = [f"POST {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else [])]
    lines += headers or [f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def told(server: Server, data: bytes, shut: bool = False) -> bytes:
    """Send this; return what comes until the server closes, or the first answer."""
    with server.connect() as connection:
        found = b""
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            connection.sendall(data)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            while block := read_some(connection):
                found += block
                if is_whole(found):
                    break
        return found


def is_whole(text: bytes) -> bool:
    """Return whether this is a whole answer with a Content-Length."""
    head, found, body = text.partition(b"\r\n\r\n")
    lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(found) and bool(lengths) and len(body) >= lengths[0]


def check_refusal(text: bytes) -> None:
    """Check that this is nothing, or an error in OpenAI's form."""
    if not text:
        return
    head, _, body = text.partition(b"\r\n\r\n")
    assert head.split(b" ")[1].startswith(b"4"), head
    assert b"application/json" in head
    assert json.loads(body)["error"]["message"]


# --------------------------------------------------------------------------------------------------------------------
# Bodies
# --------------------------------------------------------------------------------------------------------------------

GOOD = json.dumps(PROMPT).encode()
LARGE = 9_000_000  # bytes, nearly as many as are read
BODIES = {
    "cut": GOOD[:-9],
    "deep arrays": b'{"prompt":' + b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "large integer": b'{"prompt":"x","max_tokens":' + b"9" * 100_000 + b"}",
    "large exponent": b'{"prompt":"x","temperature":1e999999}',
    "not a number": b'{"prompt":"x","temperature":NaN}',
    "infinite": b'{"prompt":"x","temperature":-Infinity}',
    "no UTF-8": b'{"prompt":"\xff\xfe\x80"}',
    "lone surrogate": b'{"prompt":"\\ud800","max_tokens":1}',
    "surrogates turned": b'{"prompt":"\\udc00\\ud800","max_tokens":1}',
    "more than one": GOOD + GOOD,
    "nothing": b"",
    "zeros": b"\0" * 1000,
    "too large": b'{"prompt":"' + b"x" * 11_000_000 + b'"}',
    "a text that is much too long": b'{"prompt":"' + b"a" * LARGE + b'"}',
    "millions of wrong messages": b'{"messages":[' + b"1," * (LARGE // 2) + b"1]}",
    "millions of wrong prompts": b'{"prompt":[' + b"null," * (LARGE // 5) + b"1]}",
    "millions of ids": b'{"prompt":[' + b"1," * (LARGE // 2) + b"1]}",
}


@pytest.mark.parametrize("path", [slow("/v1/completions"), slow("/v1/chat/completions"), slow("/v1/responses")])
def test_bodies_that_are_wrong(server: Server, path: str) -> None:
    for name, body in BODIES.items():
        answer = server.post(path, body)
        assert answer.status_code == (413 if name == "too large" else 400), (name, answer.text[:300])
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"]["message"]
        assert len(answer.text) < 1000, name


def test_of_repeated_keys_the_last_counts(server: Server) -> None:
    found = server.post("/v1/completions", b'{"prompt":5,"max_tokens":1,' + GOOD[1:]).json()
    assert found["choices"][0]["text"] == answer(server)


def test_a_huge_body_keeps_nobody_waiting(server: Server) -> None:
    """While one request is read for long, the others go on: the interpreter's lock is not held."""
    with server.connect() as connection:
        connection.sendall(post(b'{"content":"' + b"a" * 1_000_000 + b'"}', path="/tokenize"))
        count = 0
        while not is_ready(connection):
            assert answer(server)
            count += 1
        assert b" 200 OK" in connection.recv(65536)
    assert count > 0


def is_ready(connection: socket.socket) -> bool:
    """Return whether something has come."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        connection.setblocking(True)


# --------------------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------------------

HEADS = {
    "two lengths": post(GOOD, f"Content-Length: {len(GOOD)}", "Content-Length: 3"),
    "negative length": post(GOOD, "Content-Length: -1"),
    "signed length": post(GOOD, f"Content-Length: +{len(GOOD)}"),
    "length in hex": post(GOOD, f"Content-Length: 0x{len(GOOD):x}"),
    "length that overflows": post(GOOD, "Content-Length: " + "9" * 40),
    "length of 5000 digits": post(GOOD, "Content-Length: " + "9" * 5000),
    "length of a superscript": post(GOOD, "Content-Length: \xb2"),
    "no length, no end": post(GOOD, "X-A: b"),
    "length and chunks": post(b"0\r\n\r\n" + GOOD, "Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunks twice": post(b"0\r\n\r\n" + GOOD, "Transfer-Encoding: chunked, chunked"),
    "chunks, then not": post(b"0\r\n\r\n" + GOOD, "Transfer-Encoding: chunked, identity"),
    "chunks unlike": post(b"0\r\n\r\n" + GOOD, "Transfer-Encoding: xchunked"),
    "space before the colon": post(GOOD, f"Content-Length : {len(GOOD)}"),
    "folded": post(GOOD, f"Content-Length: {len(GOOD)}", "X-A: b\r\n c"),
    "bad size of a chunk": post(b"ZZ\r\nx\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "negative size of a chunk": post(b"-1\r\nx\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "size of a chunk that overflows": post(b"f" * 20 + b"\r\nx\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "chunk longer than told": post(b"1\r\nxyz\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "no name": post(GOOD, ": x", f"Content-Length: {len(GOOD)}"),
    "zero in a value": post(GOOD, "X-A: \0", f"Content-Length: {len(GOOD)}"),
    "version 9": b"GET /health HTTP/9.9\r\n\r\n",
    "version 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    "unknown method": b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "other host": post(GOOD, f"Content-Length: {len(GOOD)}", host="evil.example"),
    "two hosts": post(GOOD, "Host: localhost", f"Content-Length: {len(GOOD)}", host="evil.example"),
    "long path": b"GET /" + b"x" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "long header": post(GOOD, "X-A: " + "x" * 600_000, f"Content-Length: {len(GOOD)}"),
    "many headers": post(GOOD, *[f"X-{i}: {i}" for i in range(60_000)], f"Content-Length: {len(GOOD)}"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_wrong(server: Server, name: str) -> None:
    check_refusal(told(server, HEADS[name], shut=name == "no length, no end"))


@pytest.mark.parametrize("kind", ["name", "value", "headers", "trailers", "extension"])
def test_a_head_without_end_is_cut_off(server: Server, kind: str) -> None:
    """Nothing is kept of it beyond a bound: 100 MB would be more than the test allows."""
    chunked = post(b"1\r\n{\r\n0", "Transfer-Encoding: chunked")
    start, more = {
        "name": (b"GET / HTTP/1.1\r\nX", b"x"),
        "value": (b"GET / HTTP/1.1\r\nX: ", b"x"),
        "headers": (b"GET / HTTP/1.1\r\n", b"X-A: b\r\n"),
        "trailers": (chunked + b"\r\n", b"X-A: b\r\n"),
        "extension": (chunked + b";", b"x"),
    }[kind]
    block, sent = more * (65536 // len(more)), 0
    with server.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(start)
            while sent < 100_000_000:
                connection.sendall(block)
                sent += len(block)
        assert sent < 50_000_000


def test_heads_that_are_right(server: Server) -> None:
    """What is unusual, but allowed."""
    length = f"Content-Length: {len(GOOD)}"
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (1, GOOD[i : i + 1]) for i in range(len(GOOD))) + b"0\r\nX-A: b\r\n\r\n"
    for data in (
        post(GOOD, length, *[f"X-{i}: {i}" for i in range(1000)]),
        post(GOOD, length, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        post(GOOD, length, "Connection: Upgrade", "Upgrade: websocket"),
        post(GOOD, length, host=None),
        post(chunks, "Transfer-Encoding: chunked"),
        post(GOOD, length, "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0"),
    ):
        assert b" 200 OK" in told(server, data), data[:300]


def test_a_client_may_ask_before_it_sends(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(post(b"", f"Content-Length: {len(GOOD)}", "Expect: 100-continue"))
        assert read_some(connection).startswith(b"HTTP/1.1 100 ")
        connection.sendall(GOOD)
        assert b" 200 OK" in read_some(connection)
    with server.connect() as connection:
        connection.sendall(post(b"", "Content-Length: 11000000", "Expect: 100-continue"))
        assert b" 413 " in read_some(connection)


def test_nothing_hides_behind_a_request(server: Server) -> None:
    """What one reader takes for a body is no second request to another."""
    hidden = b"GET /slots HTTP/1.1\r\nHost: localhost\r\n\r\n"
    text = told(server, post(b"0\r\n\r\n" + hidden, f"Content-Length: {5 + len(hidden)}", "Transfer-Encoding: chunked"))
    assert b" 200 OK" not in text


# --------------------------------------------------------------------------------------------------------------------
# Connections
# --------------------------------------------------------------------------------------------------------------------


def test_slow_senders_are_given_up(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        all_of = [stack.enter_context(server.connect()) for _ in range(20)]
        for connection in all_of:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        left, end = set(all_of), time.monotonic() + 60
        while left and time.monotonic() < end:
            for connection in list(left):
                try:
                    connection.sendall(b"X-A: b\r\n")
                    if is_ready(connection) or connection.recv(1, socket.MSG_DONTWAIT) == b"":
                        left.discard(connection)
                except BlockingIOError:
                    pass
                except OSError:
                    left.discard(connection)
            time.sleep(0.1)
        assert not left


def test_requests_that_break_off_anywhere(server: Server) -> None:
    rng = random.Random(1)
    data = post(json.dumps({**PROMPT, "stream": True, "max_tokens": 200}).encode())
    for number in range(60):
        with server.connect() as connection:
            connection.sendall(data[: rng.randrange(1, len(data) + 1)])
            if number % 3 == 0:
                connection.shutdown(socket.SHUT_WR)
            elif number % 3 == 1:  # gone with a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_many_requests_in_one_go(server: Server) -> None:
    count = 50
    with server.connect() as connection:
        connection.sendall(post(GOOD) * count)
        text = b""
        while text.count(b" 200 OK") < count or not text.endswith(b"}"):
            text += read_some(connection)
    with server.connect() as connection:
        connection.sendall(post(GOOD) * 5 + b"NONSENSE\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while read_some(connection):
                pass


def test_hundreds_of_idle_connections(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        all_of = [stack.enter_context(server.connect()) for _ in range(500)]
        assert answer(server)
        for connection in all_of:
            assert read_some(connection) == b""


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_nobody_reads(server: Server, stream: bool) -> None:
    """The engine is done with them; their connections stay open for a minute at most."""
    body: dict[str, Any] = {**PROMPT, "n": 4, "max_tokens": 200, "logprobs": 20, "stream": stream, "ignore_eos": True}
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(post(json.dumps(body).encode()))
        for _ in range(5):
            assert answer(server)
        server.until_idle()


def test_there_are_as_many_ranks_as_before(server: Server) -> None:
    assert len(ranks_of(server)) == 2
