"""The real server: the demo model on one rank and on two, and how jobs end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.mpi import guard
from tests.mpi.launch import ROOT, environment
from tests.mpi.pool import pool
from tests.server.ranks import ranks_of
from tests.server.running import Server, events, read_some, served
from tests.tiers import slow

PROMPTS = ["This module provides", "Return the", "A list of", "Convert a", "Raise an", "The default is"]


@pytest.fixture(scope="module", params=[1, slow(3)])
def one(request: pytest.FixtureRequest) -> Iterator[Server]:
    with served(request.param, "--nthreads", "1", "--api-key", "the-key") as found:
        yield found


@pytest.fixture(scope="module", params=[2])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with served(request.param, "--nthreads", "1", "--alias", "gpt-x", env={"DLLAMA_MPI_API_KEY": "other"}) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0) as found:
        yield found


def generated(prompt: str, steps: int) -> str:
    """Return what the command generate says on two ranks."""
    args = ["-m", "dllama_mpi", "generate", "--prompt", prompt, "--steps", str(steps), "--temperature", "0", "--json"]
    text: str = json.loads(pool(2).run([*args, "--nthreads", "1"]).stdout.splitlines()[0])["text"]
    return text


def test_the_text_is_that_of_generate(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=30, temperature=0)
    assert answer.choices[0].text == generated(PROMPTS[0], 30)


def test_answers_at_once_are_those_of_one_by_one(client: openai.OpenAI) -> None:
    def ask(prompt: str) -> str:
        return client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0).choices[0].text

    alone = [ask(prompt) for prompt in PROMPTS]
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: together.__setitem__(i, ask(p))) for i, p in enumerate(PROMPTS * 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(threads))] == alone * 4


def test_seeds_and_biases(client: openai.OpenAI, server: Server) -> None:
    def ask(**more: Any) -> str:
        return client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=12, **more).choices[0].text

    assert ask(seed=7, temperature=1.5) == ask(seed=7, temperature=1.5)
    assert ask(seed=7, temperature=1.5) != ask(seed=8, temperature=1.5)
    headers = {"Authorization": "Bearer other"}
    token = server.post("/tokenize", {"content": "the"}, headers=headers).json()["tokens"][0]
    assert ask(temperature=0, logit_bias={str(token): 100}) == "the" * 12


def test_logprobs_are_those_of_the_model(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=8, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    for value, top in zip(found.token_logprobs, found.top_logprobs or [], strict=True):
        assert value == max(top.values())
        assert len(top) == 3
        assert max(top.values()) <= 0


def test_a_second_turn_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    text = "This module provides a list of names. " * 12
    usage = [
        client.chat.completions.create(
            model="gpt-x", messages=[{"role": "user", "content": text + more}], max_tokens=2, temperature=0
        ).usage
        for more in ("one", "two")
    ]
    assert all(each is not None and each.prompt_tokens_details is not None for each in usage)
    first, second = (each.prompt_tokens_details.cached_tokens for each in usage)  # type: ignore[union-attr]
    assert first == 0
    prompt_tokens = usage[1].prompt_tokens  # type: ignore[union-attr]
    if prompt_tokens > 256:  # a page
        assert second == 256


def test_anthropic(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="other", max_retries=0) as client:
        answer = client.messages.create(model="demo", max_tokens=5, messages=[{"role": "user", "content": "What?"}])
    assert answer.usage.output_tokens <= 5


def test_cluster(server: Server, client: openai.OpenAI) -> None:
    headers = {"Authorization": "Bearer other"}
    client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=5)
    found = server.get("/cluster", headers=headers).json()
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert sum(rank["share"] for rank in found["ranks"]) == pytest.approx(1, abs=0.01)
    assert all(rank["compute_ms"] > 0 for rank in found["ranks"])
    assert found["engine"]["running"] == 0
    text = server.get("/metrics", headers=headers).text
    assert "dllama_engine_pages_total" in text
    told = re.findall(r'^dllama_rank_(compute|wait)_seconds_total{host="[^"]+",rank="(\d)"} (\S+)$', text, re.MULTILINE)
    assert [each[:2] for each in told] == [("compute", "0"), ("compute", "1"), ("wait", "0"), ("wait", "1")]
    for _, rank, seconds in told[:2]:
        assert float(seconds) >= 1e-3 * found["ranks"][int(rank)]["compute_ms"] - 1e-9
    assert server.get("/cluster").status_code == 401


def test_no_page_of_the_cache_is_lost_to_clients_that_go_away(server: Server, client: openai.OpenAI) -> None:
    headers = {"Authorization": "Bearer other"}
    for number in range(6):
        connection = server.connect()
        body = json.dumps({"prompt": "word " * 50 * number + "x", "max_tokens": 400, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Authorization: Bearer other\r\n\r\n"
        connection.sendall(head.encode() + body)
        read_some(connection)
        connection.close()
    end = time.monotonic() + 60
    while (found := server.get("/cluster", headers=headers).json()["engine"])["running"] or found["pages_used"]:
        assert time.monotonic() < end, found
        time.sleep(0.1)
    assert client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=5).choices[0].text


def test_on_other_numbers_of_ranks(one: Server) -> None:
    headers = {"Authorization": "Bearer the-key"}
    body = {"prompt": PROMPTS[0], "max_tokens": 20, "temperature": 0}
    whole = one.post("/v1/completions", body, headers=headers).json()["choices"][0]["text"]
    chunks = events(one.post("/v1/completions", {**body, "stream": True}, headers=headers).text)
    assert "".join(c["choices"][0]["text"] for c in chunks if c != "[DONE]") == whole
    assert len(whole) > 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish(number: int) -> None:
    with served(2, "--nthreads", "1") as server:
        answers: list[Any] = []
        body = {"prompt": PROMPTS[0], "max_tokens": 300, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
        thread.start()
        while not server.get("/slots").json():
            time.sleep(0.01)
        for rank in ranks_of(server):
            rank.send_signal(number)
        thread.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 300
        assert server.process.wait(60) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_rank_that_dies_ends_job_and_streams() -> None:
    with served(2, "--nthreads", "1") as server, server.connect() as connection:
        body = json.dumps({"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        read_some(connection)
        ranks_of(server)[-1].kill()
        try:
            while read_some(connection):
                pass
        except ConnectionError:
            pass
        assert server.process.wait(60) != 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["--ssl-keyfile", "key.pem"], "--ssl-certfile"),
        (["--ssl-certfile", "nowhere.pem"], "nowhere.pem"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--api-key", ""], "--api-key is empty"),
        (["--port", "70000"], "70000"),
        (["--chat-template", "nonsense"], "nonsense"),
    ],
)
def test_mistakes_are_told_in_a_line(options: list[str], said: str) -> None:
    done = pool(2).run(["-m", "dllama_mpi", "serve", "--port", "0", *options], check=False)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_health_while_loading(tmp_path: Path) -> None:
    """The server answers 503 from the time it listens until the model is there."""
    script = """
import sys, threading, urllib.request, urllib.error
from dllama_mpi.server.run import HttpServer, ServeOptions
server = HttpServer(ServeOptions(port=0))
server.start()
for path in ("/health", "/v1/models"):
    try:
        urllib.request.urlopen(server.url + path)
    except urllib.error.HTTPError as error:
        print(error.code, error.headers["Retry-After"], error.read().decode())
server.close()
"""
    file = tmp_path / "loading.py"
    file.write_text(script)
    env = environment() | {guard.VARIABLE: environment()[guard.VARIABLE]}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["503", "2"], ["503", "2"]]
    assert '"status":"loading"' in lines[0]
