"""A batch's requests and answers as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dllama_mpi.batch.answers import Answers, answer, failure
from dllama_mpi.batch.lines import BadLine, Requests, parse
from dllama_mpi.batch.run import unanswered
from dllama_mpi.errors import UsageError

ASKED = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def write(path: Path, *lines: Any) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


@pytest.mark.parametrize(
    ("line", "url", "body"),
    [
        (ASKED, "/v1/completions", {"prompt": "x"}),
        ({**ASKED, "url": "/v1/embeddings", "body": {"input": "x"}}, "/v1/embeddings", {"input": "x"}),
        ({"prompt": "x", "max_tokens": 3}, "/v1/completions", {"prompt": "x", "max_tokens": 3}),
        ({"messages": [], "custom_id": "b"}, "/v1/chat/completions", {"messages": []}),
        ({"input": ["x"]}, "/v1/embeddings", {"input": ["x"]}),
    ],
)
def test_asks(line: Any, url: str, body: Any) -> None:
    found = parse(json.dumps(line).encode())
    assert (found.url, json.loads(found.body)) == (url, body)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (b"{", "invalid_json_line", "not JSON"),
        (b"\xff{}", "invalid_json_line", "not UTF-8"),
        (b"[" * 100000, "invalid_json_line", "not JSON"),
        (b"[1]", "invalid_request", "list"),
        (b"{}", "invalid_request", "none of messages, prompt, input"),
        ({**ASKED, "custom_id": 3}, "invalid_custom_id", "text"),
        ({**ASKED, "custom_id": ""}, "invalid_custom_id", "text"),
        ({**ASKED, "custom_id": "x" * 513}, "invalid_custom_id", "512"),
        ({**ASKED, "custom_id": "\ud800"}, "invalid_custom_id", "text"),
        ({**ASKED, "method": "GET"}, "invalid_method", "GET"),
        ({**ASKED, "url": "/metrics"}, "invalid_url", "/v1/embeddings"),
        ({**ASKED, "body": "x"}, "invalid_request", "object"),
        ({"prompt": "x", "stream": True}, "invalid_request", "stream"),
    ],
)
def test_bad_lines(line: Any, code: str, said: str) -> None:
    with pytest.raises(BadLine, match=said) as caught:
        parse(line if isinstance(line, bytes) else json.dumps(line).encode())
    assert caught.value.code == code


def test_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "in", ASKED, b"", {"prompt": "x"}, {"prompt": "x"}, b"{", {**ASKED, "body": {"prompt": ""}})
    found = Requests(path)
    assert [line.custom_id for line in found.lines] == ["a", "line-3", "line-4", "line-5", "a"]
    assert [line.is_repeated for line in found.lines] == [False, False, False, False, True]
    assert len({line.id for line in found.lines}) == 5
    assert [found.read(line).strip() for line in found.lines][1] == b'{"prompt": "x"}'
    assert [line.id for line in Requests(path).lines] == [line.id for line in found.lines]
    with pytest.raises(BadLine, match="unique"):
        parse(found.read(found.lines[-1]), True)


def test_shards(tmp_path: Path) -> None:
    path = write(tmp_path / "in", *[{"prompt": str(i)} for i in range(7)])
    whole = {line.id for line in Requests(path).lines}
    parts = [{line.id for line in Requests(path, (i, 3)).lines} for i in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert set().union(*parts) == whole
    assert Requests(write(tmp_path / "one", ASKED), (1, 2)).lines == []


def test_no_requests(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Requests(tmp_path / "in")
    with pytest.raises(UsageError, match="no line"):
        Requests(write(tmp_path / "in", b" "))


def test_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "out"
    answers = Answers(path)
    lines = [answer("1", "a", 200, {"text": "é\n"}), answer("2", "b", 400, {}), failure("3", "c", "code", "why")]
    answers.append(lines)
    answers.append([])
    answers.close()
    again = Answers(path)
    assert (again.done, again.errors) == ({"1": "a", "2": "b", "3": "c"}, 2)
    again.close()
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines)


def test_a_cut_line_is_taken_back(tmp_path: Path) -> None:
    lines = [answer("1", "a", 200, {"text": "x"}), answer("2", "b", 200, {"text": "y" * 50})]
    whole = b"".join(line + b"\n" for line in lines)
    for size in range(len(lines[0]) + 1, len(whole)):
        path = tmp_path / "out"
        path.write_bytes(whole[:size])
        answers = Answers(path)
        assert answers.done == {"1": "a"}
        answers.append([lines[1]])
        answers.close()
        assert path.read_bytes() == whole


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "out", answer("1", "a", 200, {}), b"a letter", answer("2", "b", 200, {}))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="line 2 is no answer"):
        Answers(path)
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="directory"):
        Answers(tmp_path)


def test_one_writer(tmp_path: Path) -> None:
    first = Answers(tmp_path / "out")
    with pytest.raises(UsageError, match="another batch"):
        Answers(tmp_path / "out")
    first.close()
    Answers(tmp_path / "out").close()


def test_what_is_left(tmp_path: Path) -> None:
    requests = Requests(write(tmp_path / "in", ASKED, {"prompt": "x"}))
    answers = Answers(tmp_path / "out")
    answers.append([answer(requests.lines[1].id, "line-2", 200, {})])
    answers.close()
    answers = Answers(tmp_path / "out")
    assert unanswered(requests, answers) == [requests.lines[0]]
    changed = Requests(write(tmp_path / "in", ASKED, {"prompt": "y"}))
    with pytest.raises(UsageError, match="'line-2'"):
        unanswered(changed, answers)
    answers.close()
