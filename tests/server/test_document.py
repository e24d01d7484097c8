"""What the OpenAPI document allows, and what it does not, at the real server: answers and errors keep their forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.core import NOT_SET

from dllama_mpi.server.app import document
from tests.server.running import Server, events, served
from tests.tiers import slow

METHODS = ("get", "post", "put", "delete", "patch", "options", "head")
OPERATIONS = [(path, method) for path, item in document()["paths"].items() for method in item if method in METHODS]
STEPS = 4  # most tokens of an answer, where a request may say so


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(2, "--nthreads", "1", "--alias", "*") as found:
        yield found
        assert "Traceback" not in found.log.read_text()


def check(path: str, answer: Any) -> None:
    """Check an answer's status, content type, and the form of an error."""
    assert answer.status_code < 500 or (answer.status_code == 503 and "requests wait" in answer.text), answer.text
    kind = answer.headers["content-type"]
    if answer.status_code < 400:
        if kind.startswith("text/event-stream"):
            found = events(answer.text)
            assert found
            assert not any("the server has failed" in str(each) for each in found)
        elif path != "/metrics":
            assert kind == "application/json"
            answer.json()
        return
    assert kind == "application/json"
    error = answer.json()
    if path.startswith("/v1/messages"):
        assert set(error) == {"type", "error"}
        assert error["type"] == "error"
        assert set(error["error"]) == {"type", "message"}
    else:
        assert set(error) == {"error"}
        assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["message"]
    assert len(answer.text) < 2000


def brief(body: Any) -> Any:
    """Return a body that asks for few tokens only, where it asks for any number."""
    if not isinstance(body, dict):
        return body
    most = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), STEPS)
    return body | {name: value for name, value in most.items() if name not in body or _is_more(body[name])}


def _is_more(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > STEPS)


def send(server: Server, path: str, method: str, case: Any) -> None:
    """Send a generated case, and check what comes."""
    url = path
    for name, value in (case.path_parameters or {}).items():
        url = url.replace(f"{{{name}}}", str(value))
    body = None if case.body is NOT_SET else case.body
    if not isinstance(body, bytes | None):
        body = json.dumps(brief(body)).encode("utf-8", "surrogatepass")
    with server.client() as client:
        check(path, client.request(method.upper(), url, content=body))


SCHEMA = schemathesis.openapi.from_dict(document())
MODES = {"right": schemathesis.GenerationMode.POSITIVE, "wrong": schemathesis.GenerationMode.NEGATIVE}


def try_all(server: Server, path: str, method: str, mode: str, examples: int) -> None:
    """Try so many cases of an operation."""
    cases = SCHEMA[path][method].as_strategy(generation_mode=MODES[mode])

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(case=cases)
    def run(case: Any) -> None:
        send(server, path, method, case)

    run()


@pytest.mark.parametrize(("examples"), [3, slow(12)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("path", "method"), [each for each in OPERATIONS if each[1] == "post"])
def test_bodies(server: Server, path: str, method: str, mode: str, examples: int) -> None:
    try_all(server, path, method, mode, examples)


@pytest.mark.parametrize(("path", "method"), [each for each in OPERATIONS if each[1] != "post"])
@settings(max_examples=5, suppress_health_check=list(HealthCheck), deadline=None)
@given(name=st.text(min_size=1, max_size=20, alphabet=st.characters(min_codepoint=33, max_codepoint=126)))
def test_routes_without_bodies(server: Server, path: str, method: str, name: str) -> None:
    with server.client() as client:
        for part in ("{id}", "{name}"):
            path = path.replace(part, name.translate({ord(c): "x" for c in '/?#%\\.{}[]^`|"<>'}))
        check(path, client.request(method.upper(), path))


@pytest.mark.parametrize("path", sorted({path for path, _ in OPERATIONS}))
def test_methods_that_are_not_documented(server: Server, path: str) -> None:
    allowed = {method for each, method in OPERATIONS if each == path}
    with server.client() as client:
        for method in {"get", "post", "put", "patch", "delete"} - allowed:
            answer = client.request(method.upper(), path)
            assert answer.status_code == 405, (method, path)
            check(path, answer)
