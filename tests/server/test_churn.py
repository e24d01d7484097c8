"""Many requests that come and go on three ranks: all are accounted for, no page is lost, memory does not grow."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import threading
import time
from collections import Counter

import pytest

from tests.server.ranks import memory_of
from tests.server.running import Server, read_some, served

COUNT = int(os.environ.get("DLLAMA_MPI_CHURN", "300"))
AT_ONCE = 32
WORDS = ["This", "module", "provides", "a", "list", "of", "names", "that", "are", "used", "by", "the", "compiler"]
MOST_GROWTH = 30 << 20  # bytes of a rank between a quarter of the requests and all of them


def figure(server: Server, name: str) -> float:
    """Return a figure of /metrics, all labels added up."""
    found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def ask(server: Server, rng: random.Random) -> str:
    """Make a request, and perhaps go away; return what became of it."""
    body = {
        "prompt": "Shared beginning. " * rng.randrange(4) * 10 + " ".join(rng.choices(WORDS, k=rng.randint(1, 80))),
        "max_tokens": rng.randint(1, 60),
        "n": rng.choice([1, 1, 1, 2]),
        "stream": rng.random() < 0.7,
        "ignore_eos": True,
    }
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    leaves = rng.choice(["never", "never", "at once", "soon", "later", "half"])
    with server.connect() as connection, contextlib.suppress(ConnectionError):
        if leaves == "half":
            connection.sendall((head.encode() + data)[: rng.randrange(len(head) + len(data))])
            return "half"
        connection.sendall(head.encode() + data)
        if leaves == "at once":
            return "left"
        if leaves != "never":
            time.sleep(rng.random() * (0.1 if leaves == "soon" else 1.5))
            return "left"
        text = b""
        while block := read_some(connection, 120):
            text += block
        status = text.split(b" ", 2)[1].decode()
        if status == "200":
            assert (b"data: [DONE]" in text) == body["stream"]
        return status
    return "broken"


@pytest.mark.slow
def test_requests_that_come_and_go() -> None:
    """DLLAMA_MPI_CHURN sets their number."""
    with served(3, "--nthreads", "1", "--kv-memory", "0.004") as server:
        numbers, said, lock = iter(range(COUNT)), Counter[str](), threading.Lock()
        early: list[int] = []

        def work() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                    if number is None:
                        return
                    if number == COUNT // 4:
                        early.extend(memory_of(server))
                found = ask(server, random.Random(number))
                with lock:
                    said[found] += 1

        threads = [threading.Thread(target=work) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.until_idle()
        end = time.monotonic() + 60
        while figure(server, "dllama_engine_pages_used") or figure(server, "dllama_engine_running"):
            assert time.monotonic() < end
            time.sleep(0.1)
        late = memory_of(server)
        finished = figure(server, "dllama_requests_total")
        preemptions = figure(server, "dllama_engine_preemptions")
        print(dict(said), f"finished {finished:g}, preemptions {preemptions:g}, memory", early, late)
        assert set(said) <= {"200", "left", "half"}
        assert sum(said.values()) == COUNT
        assert said["200"] <= finished <= 2 * COUNT
        for then, now in zip(early, late, strict=True):
            assert now - then < MOST_GROWTH
        assert "Traceback" not in server.log.read_text()
