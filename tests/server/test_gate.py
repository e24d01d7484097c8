"""Who may come in, and what clients that misbehave come to: nobody else notices, nothing is left running."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.running import Server, events, read_some, scripted
from tests.tiers import all_but


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with scripted() as found:
        yield found
        assert "Traceback" not in found.log.read_text()


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    with scripted("none", "the-key") as found:
        yield found


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def request(body: bytes, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    """Return a request as it is sent."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def aborted(server: Server) -> float:
    """Return how many requests have been cancelled."""
    match = re.search(r'dllama_requests_total\{finish_reason="abort"\} (\S+)', server.get("/metrics").text)
    return float(match[1]) if match else 0.0


def is_well(server: Server) -> None:
    assert server.post("/v1/chat/completions", chat("<<fine>>")).json()["choices"][0]["message"]["content"] == "fine"


def test_keys(locked: Server) -> None:
    assert locked.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "the-key"}, {"x-api-key": "the-key2"}):
        answer = locked.get("/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert locked.get("/metrics", headers=headers).status_code == 401
    for headers in ({"Authorization": "Bearer the-key"}, {"x-api-key": "the-key"}):
        assert locked.get("/v1/models", headers=headers).status_code == 200


def test_host_and_origin(server: Server) -> None:
    for host, status in (
        ("localhost:1", 200),
        ("[::1]", 200),
        ("10.0.0.7", 200),
        ("here.local", 200),
        ("evil.example", 403),
        ("[", 403),
    ):
        assert server.get("/health", headers={"Host": host}).status_code == status, host
    assert server.get("/health", headers={"Origin": "http://evil.example"}).status_code == 403
    own = {"Origin": server.url, "Host": f"127.0.0.1:{server.port}"}
    answer = server.get("/health", headers=own)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_large_bodies(server: Server) -> None:
    answer = server.post("/v1/chat/completions", b" " * 1_000_001)
    assert answer.status_code == 413
    with server.connect() as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        block = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with_errors = b""
        try:
            for _ in range(17):
                connection.sendall(block)
            with_errors = read_some(connection)
        except OSError:  # it has closed the door meanwhile
            with_errors = with_errors or b" 413 "
        assert b" 413 " in with_errors
    is_well(server)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"\xff\xfe",
        b"{" * 100000,
        b"[" * 100000,
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\u0000"}], "max_tokens": 1}',
        b'{"messages": 1e999}',
        b'{"max_tokens": 123456789012345678901234567890, "messages": [{"role": "user"}]}',
        json.dumps({"messages": [{"role": "user", "content": "x"}] * 2000}).encode(),
        json.dumps(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": "x",
                        "tool_calls": [{"function": {"name": "f", "arguments": "[" * 5000}}],
                    }
                ],
                "max_tokens": 1,
            }
        ).encode(),
    ],
)
def test_bodies_that_are_none(server: Server, body: bytes) -> None:
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
NAMES = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "tools",
    "tool_choice",
    "echo",
    "suffix",
    "response_format",
    "chat_template_kwargs",
    "content",
    "tokens",
    "system",
    "stop_sequences",
    "thinking",
    "input",
    "instructions",
]
POSTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/apply-template",
)


@pytest.mark.parametrize("path", all_but(POSTS[:1], POSTS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=3))
def test_fuzzed_fields(server: Server, path: str, changes: dict[str, Any]) -> None:
    good = {
        "messages": [{"role": "user", "content": "<<x>>"}],
        "prompt": "<<x>>",
        "max_tokens": 3,
        "content": "x",
        "input": "<<x>>",
    }
    answer = server.post(path, {**good, "tokens": [1], **changes})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"):
        assert events(answer.text)
    elif answer.status_code == 200:
        answer.json()


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: " + b"x" * 70000 + b"\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_what_is_no_http(server: Server, data: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(data)
        try:
            answer = read_some(connection)
        except ConnectionError:
            answer = b""
    assert answer == b"" or answer.split(b" ")[1].startswith(b"4")
    is_well(server)


def test_slow_heads_and_bodies_are_given_up(server: Server) -> None:
    with server.connect() as head, server.connect() as body, server.connect() as silent:
        head.sendall(b"POST /tokenize HTTP/1.1\r\nHo")
        body.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert read_some(head) == b""
        assert b" 408 " in read_some(body)
        assert read_some(silent) == b""
    is_well(server)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with server.connect() as connection:
        one, two = (request(json.dumps(chat(f"<<{word}>>")).encode()) for word in ("first", "second"))
        connection.sendall(one + two)
        text = b""
        while b"second" not in text:
            text += read_some(connection)
        assert 0 < text.index(b"first") < text.index(b"second")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_cancelled(server: Server, stream: bool) -> None:
    connection = server.connect()
    connection.sendall(request(json.dumps(chat("go on {{20 ms}}", stream=stream)).encode()))
    if stream:
        assert b"200 OK" in read_some(connection)
    while not server.get("/slots").json():
        time.sleep(0.01)
    connection.close()
    server.until_idle()
    is_well(server)


def test_a_reader_that_is_slow_holds_up_nobody(server: Server) -> None:
    before = aborted(server)
    connection = server.connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = chat("go on {{1 ms}}", stream=True, n=16, logprobs=True, top_logprobs=20, max_tokens=3000)
    connection.sendall(request(json.dumps(body).encode()))
    while not server.get("/slots").json() and aborted(server) == before:  # it may be over before one looks
        time.sleep(0.01)
    for _ in range(5):
        is_well(server)
    server.until_idle()
    assert aborted(server) > before  # its answers have 48000 tokens; it has read none
    connection.close()


def test_many_at_once(server: Server) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        answer = server.post("/v1/chat/completions", chat(f"<<answer {number}>> {{{{1 ms}}}}", stream=number % 2 == 0))
        if number % 2:
            texts[number] = answer.json()["choices"][0]["message"]["content"]
        else:
            chunks = [e for e in events(answer.text) if e != "[DONE]"]
            texts[number] = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: f"answer {number}" for number in range(32)}
    server.until_idle()


def test_running_requests_finish_when_the_server_ends() -> None:
    with scripted() as server:
        answers: list[Any] = []
        thread = threading.Thread(
            target=lambda: answers.append(server.post("/v1/chat/completions", chat("go on {{20 ms}}", max_tokens=60)))
        )
        thread.start()
        while not server.get("/slots").json():
            time.sleep(0.01)
        server.process.terminate()
        thread.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 60
        assert server.process.wait(30) == 0


def test_requests_are_told_when_time_is_up() -> None:
    with scripted() as server, server.connect() as connection:
        connection.sendall(request(json.dumps(chat("go on {{50 ms}}", stream=True)).encode()))
        assert b"200 OK" in read_some(connection)
        server.process.send_signal(2)
        time.sleep(0.3)
        server.process.send_signal(2)
        text = b""
        while block := read_some(connection):
            text += block
        assert b"shutting down" in text or b"[DONE]" not in text
        assert server.process.wait(30) == 0
