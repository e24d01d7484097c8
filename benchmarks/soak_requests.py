"""What the soak asks of a server: requests of every kind, good and bad, each with what has to come of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve import WORDS

_SECONDS = 300.0  # for an answer, on a machine under load
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "n": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
_ASKED = [{"role": "user", "content": "What?"}]


class UnexpectedAnswer(Exception):
    """An answer that is not what had to come."""


@dataclass(frozen=True)
class Server:
    """Where the server listens, and the positions of its context."""

    port: int
    context: int

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Send a request; return the status and the whole answer. body: JSON-ready, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> Any:
        """Post a body; return the answer's JSON.

        Raises:
            UnexpectedAnswer: the status is not 200.
        """
        status, data = self.send("POST", path, body)
        _hold(status == 200, path, status, data)
        return json.loads(data)

    def raw(self, data: bytes) -> socket.socket:
        """Send bytes as they are; return the connection."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=_SECONDS)
        connection.sendall(data)
        return connection


Ask = Callable[[Server, random.Random], None]


def _hold(is_right: bool, *about: Any) -> None:
    """Raise unless something is right."""
    if not is_right:
        raise UnexpectedAnswer(" ".join(str(each)[:300] for each in about))


def text(rng: random.Random, most: int) -> str:
    """Return up to so many words, some of them after a beginning that many prompts share."""
    words = rng.choices(WORDS, k=rng.randint(1, most))
    return " ".join(["This module provides a list of names."] * rng.choice([0, 0, 1, 4]) + words)


# ---- answers that are good


def _completion(server: Server, rng: random.Random) -> None:
    count, choices = rng.randint(1, 40), rng.choice([1, 1, 3])
    body = {
        "prompt": text(rng, 60),
        "max_tokens": count,
        "n": choices,
        "ignore_eos": True,
        "logprobs": rng.choice([0, 3]),
    }
    found = server.post("/v1/completions", body)
    _hold(len(found["choices"]) == choices, found)
    _hold(found["usage"]["completion_tokens"] == count * choices, found["usage"])


def _greedy(server: Server, rng: random.Random) -> None:
    """One prompt has one answer, whatever runs beside it."""
    bodies = {"prompt": "This module provides", "max_tokens": 12, "temperature": 0}
    first, second = (server.post("/v1/completions", bodies)["choices"][0]["text"] for _ in range(2))
    _hold(first == second, first, "then", second)


def _big_prompt(server: Server, rng: random.Random) -> None:
    room = server.context - 8
    found = server.post("/v1/completions", {"prompt": [rng.randint(10, 500) for _ in range(room)], "max_tokens": 4})
    _hold(found["usage"]["prompt_tokens"] == room, found["usage"])


def _completion_stream(server: Server, rng: random.Random) -> None:
    body = {"prompt": text(rng, 60), "max_tokens": rng.randint(1, 60), "stream": True, "ignore_eos": True}
    pieces = _events(*server.send("POST", "/v1/completions", body))
    _hold(pieces[-2]["choices"][0]["finish_reason"] == "length", pieces[-2])


def _chat(server: Server, rng: random.Random) -> None:
    messages = [{"role": "user", "content": text(rng, 40)}]
    if rng.random() < 0.5:
        messages = [{"role": "system", "content": text(rng, 10)}, *messages]
    found = server.post(
        "/v1/chat/completions", {"messages": messages, "max_tokens": rng.randint(1, 40), "stop": ["zz"]}
    )
    _hold(found["choices"][0]["finish_reason"] in ("stop", "length"), found)


def _chat_stream(server: Server, rng: random.Random) -> None:
    body = {"messages": [{"role": "user", "content": text(rng, 40)}], "max_tokens": rng.randint(1, 40), "stream": True}
    _events(*server.send("POST", "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}))


def _events(status: int, data: bytes) -> list[Any]:
    """Return a stream's events, which must end with [DONE]."""
    _hold(status == 200, status, data)
    found = [line[6:] for line in data.splitlines() if line.startswith(b"data: ")]
    _hold(found[-1:] == [b"[DONE]"], data[-300:])
    events = [json.loads(each) for each in found[:-1]]
    _hold(not any("error" in each for each in events), events[-1:])
    return [*events, None]


def _schema(server: Server, rng: random.Random) -> None:
    given = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    body = {"messages": _ASKED, "response_format": given, "max_tokens": 200, "temperature": rng.choice([0, 1.5])}
    _is_place(server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"])


def _is_place(given: str) -> None:
    found = json.loads(given)
    _hold(set(found) == {"city", "n"} and found["city"] in ("Bern", "Rome") and 10 <= found["n"] <= 99, found)


def _json(server: Server, rng: random.Random) -> None:
    body = {"messages": _ASKED, "response_format": {"type": "json_object"}, "max_tokens": 60}
    choice = server.post("/v1/chat/completions", body)["choices"][0]
    if choice["finish_reason"] == "stop":
        json.loads(choice["message"]["content"])


def _grammar(server: Server, rng: random.Random) -> None:
    """A grammar that no request had before: what is kept of them must have a bound."""
    word = f"w{rng.randrange(10**9)}"
    body = {"messages": _ASKED, "grammar": f'root ::= "{word}" [0-9]', "max_tokens": 60}
    found = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    _hold(found[:-1] == word and found[-1].isdigit(), word, found)


def _tools(server: Server, rng: random.Random) -> None:
    body = {"messages": _ASKED, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    (call,) = server.post("/v1/chat/completions", body)["choices"][0]["message"]["tool_calls"]
    _is_place(call["function"]["arguments"])


def _embeddings(server: Server, rng: random.Random) -> None:
    texts = [text(rng, 40) for _ in range(rng.randint(1, 4))]
    found = server.post("/v1/embeddings", {"input": texts})["data"]
    _hold(len(found) == len(texts) and all(abs(sum(x * x for x in e["embedding"]) - 1) < 1e-3 for e in found), found)


def _messages(server: Server, rng: random.Random) -> None:
    body = {"messages": [{"role": "user", "content": text(rng, 40)}], "max_tokens": rng.randint(1, 30)}
    found = server.post("/v1/messages", body)
    _hold(found["usage"]["output_tokens"] <= body["max_tokens"], found["usage"])


def _responses(server: Server, rng: random.Random) -> None:
    found = server.post("/v1/responses", {"input": text(rng, 40), "max_output_tokens": rng.randint(16, 30)})
    status, data = server.send("GET", f"/v1/responses/{found['id']}")
    _hold(status == 200, status, data)


def _status(server: Server, rng: random.Random) -> None:
    path = rng.choice(["/", "/health", "/metrics", "/v1/models", "/props", "/slots", "/cluster", "/openapi.json"])
    status, data = server.send("GET", path)
    _hold(status == 200, path, status, data)


def _tokens(server: Server, rng: random.Random) -> None:
    said = text(rng, 200)
    ids = server.post("/tokenize", {"content": said})["tokens"]
    _hold(server.post("/detokenize", {"tokens": ids})["content"] == said, said)


# ---- clients that go away


def _leave(server: Server, rng: random.Random) -> None:
    """Go away in mid-request, at once, or in mid-stream."""
    body = {"prompt": text(rng, 200), "max_tokens": 400, "stream": rng.random() < 0.7, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    whole = head + data
    sent = whole[: rng.randrange(len(whole))] if rng.random() < 0.2 else whole
    with server.raw(sent) as connection, contextlib.suppress(ConnectionError):
        if sent is whole and rng.random() < 0.7:
            end = time.monotonic() + rng.random()
            while (left := end - time.monotonic()) > 0:
                if select.select([connection], [], [], left)[0]:
                    _hold(connection.recv(65536) != b"", "the stream of", body["max_tokens"], "tokens has ended early")


# ---- requests that are wrong

_CHAT, _COMPLETIONS, _EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_WRONG: Sequence[tuple[str, Any]] = (
    (_COMPLETIONS, b"{no json"),
    (_COMPLETIONS, b"\xff\xfe" + b"x" * 50),
    (_COMPLETIONS, b"[" * 50_000),
    (_COMPLETIONS, []),
    (_COMPLETIONS, {}),
    (_COMPLETIONS, {"prompt": 3.5}),
    (_COMPLETIONS, {"prompt": [10**9]}),
    (_COMPLETIONS, {"prompt": [5] * 5000}),
    (_COMPLETIONS, {"prompt": "x", "max_tokens": -1}),
    (_COMPLETIONS, {"prompt": "x", "n": 10**9}),
    (_COMPLETIONS, {"prompt": "x", "stop": ["a", 3]}),
    (_CHAT, {"messages": _ASKED, "temperature": "hot"}),
    (_CHAT, {"messages": _ASKED, "top_p": 1.5}),
    (_CHAT, {"messages": _ASKED, "logit_bias": {"a": 1}}),
    (_CHAT, {"messages": []}),
    (_CHAT, {"messages": [{"role": "king", "content": "x"}]}),
    (_CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
    (_CHAT, {"messages": [{"role": "user", "content": "x " * 20_000}]}),
    (_CHAT, {"messages": _ASKED, "tool_choice": "required"}),
    (_CHAT, {"messages": _ASKED, "response_format": {"type": "xml"}}),
    (_CHAT, {"messages": _ASKED, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}),
    (_CHAT, {"messages": _ASKED, "grammar": "root ::= ((("}),
    (_CHAT, {"messages": _ASKED, "grammar": "a" * 300_000}),
    (_EMBEDDINGS, {"input": 5}),
    ("/v1/messages", {"messages": _ASKED}),
    ("/v1/responses", {"input": {"a": 1}}),
    ("/detokenize", {"tokens": [10**6]}),
)


def _wrong(server: Server, rng: random.Random) -> None:
    _refused(server, *rng.choice(_WRONG))


def _refused(server: Server, path: str, body: Any) -> None:
    status, data = server.send("POST", path, body)
    _hold(status == 400 and json.loads(data)["error"]["message"], path, str(body)[:100], status, data)


def _nowhere(server: Server, rng: random.Random) -> None:
    found = rng.choice([("GET", "/nothing", 404), ("GET", _CHAT, 405), ("GET", f"/v1/responses/{rng.random()}", 404)])
    method, path, wanted = found
    status, data = server.send(method, path)
    _hold(status == wanted, path, status, data)


def _no_http(server: Server, rng: random.Random) -> None:
    """Bytes that are no request: the answer is 400 or the end of the connection."""
    data = rng.choice([b"\x16\x03\x01\x02\x00" + rng.randbytes(200), b"GET\r\n\r\n", b"POST / HTTP/9.9\r\nA\r\n\r\n"])
    with server.raw(data) as connection, contextlib.suppress(ConnectionError):
        connection.shutdown(socket.SHUT_WR)
        said = connection.recv(65536)
        _hold(not said or said.startswith(b"HTTP/1.1 4"), data[:40], said)


KINDS: dict[str, tuple[float, Ask]] = {
    "completion": (4, _completion),
    "the same twice, greedy": (1, _greedy),
    "big prompt": (1, _big_prompt),
    "completion, stream": (4, _completion_stream),
    "chat": (4, _chat),
    "chat, stream": (4, _chat_stream),
    "JSON schema": (1, _schema),
    "any JSON": (1, _json),
    "grammar": (1, _grammar),
    "tool call": (1, _tools),
    "embeddings": (2, _embeddings),
    "Anthropic's messages": (2, _messages),
    "responses": (2, _responses),
    "status": (2, _status),
    "tokens": (1, _tokens),
    "client goes away": (4, _leave),
    "wrong field": (4, _wrong),
    "wrong route": (1, _nowhere),
    "no HTTP": (1, _no_http),
}
"""How often each kind is asked, in proportion, and what asks it."""


def everything() -> list[tuple[str, Ask]]:
    """Return each kind, and each wrong request, once: what a server must have seen before its memory is looked at."""
    wrong: list[tuple[str, Ask]] = [
        ("wrong field", lambda server, _, path=path, body=body: _refused(server, path, body))  # type: ignore[misc]
        for path, body in _WRONG
    ]
    return [(name, ask) for name, (_, ask) in KINDS.items()] + wrong
