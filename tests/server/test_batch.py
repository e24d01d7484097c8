"""`batch` as people run it: under mpiexec, with good and bad lines, killed and told to end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mpi import guard
from tests.mpi.launch import Done, launcher, launcher_options, mpiexec, run, run_mark, start

MODEL = ["-m", "dllama_mpi", "batch", "--max-seq-len", "256", "--max-batch", "4"]
LINES: list[Any] = [
    {"prompt": "This module provides", "max_tokens": 12, "temperature": 0},
    {
        "custom_id": "one",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "gpt-x", "prompt": "Return the", "max_tokens": 8, "temperature": 0, "n": 2},
    },
    {"custom_id": "vector", "method": "POST", "url": "/v1/embeddings", "body": {"model": "e", "input": "a cat"}},
    {"custom_id": "wrong", "url": "/v1/completions", "body": {"prompt": 3.5}},
    {"custom_id": "long", "prompt": "x " * 2000},
    {"custom_id": "one", "prompt": "again"},
    b"{no json",
    {"prompt": "This module provides", "max_tokens": 12, "temperature": 0},
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def batch(folder: Path, *more: str, ranks: int = 1, check: bool = True) -> Done:
    return mpiexec(ranks, [*MODEL, "--input", str(folder / "in"), "--output", str(folder / "out"), *more], check=check)


def test_all_kinds_of_lines(tmp_path: Path) -> None:
    write(tmp_path / "in", LINES)
    done = batch(tmp_path, "--ordered", "--log", str(tmp_path / "log"), ranks=2)
    assert done.stdout == ""
    assert "8 of 8 answered (4 errors)" in done.stderr
    assert "8 of 8 answered (4 errors)" in (tmp_path / "log").read_text()
    found = answers(tmp_path / "out")
    assert [each["custom_id"] for each in found] == [
        "line-1",
        "one",
        "vector",
        "wrong",
        "long",
        "one",
        "line-7",
        "line-8",
    ]
    bodies = [each["response"] and each["response"]["body"] for each in found]
    assert [each["response"] and each["response"]["status_code"] for each in found] == [
        200, 200, 200, 400, 400, None, None, 200,
    ]  # fmt: skip
    assert len(bodies[1]["choices"]) == 2
    assert len(bodies[2]["data"][0]["embedding"]) > 8
    assert "prompt" in bodies[3]["error"]["message"]
    assert bodies[4]["error"]["code"] == "context_length_exceeded"
    assert found[5]["error"]["code"] == "duplicate_custom_id"
    assert found[6]["error"]["code"] == "invalid_json_line"
    assert bodies[0]["choices"] == bodies[7]["choices"]
    alone = mpiexec(1, ["-m", "dllama_mpi", "--prompt", LINES[0]["prompt"], "--steps", "12", "--temperature", "0"])
    assert bodies[0]["choices"][0]["text"].strip() == alone.stdout.strip()
    again = batch(tmp_path)
    assert "8 of them before" in again.stderr
    assert answers(tmp_path / "out") == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shard", "3/3"], "3/3"),
        (["--output", "IN"], "--input, too"),
        (["--input", "missing"], "missing: No such file"),
        (["--output", "/proc/nothing"], "/proc/nothing"),
        (["--log", "/proc/nothing"], "--log /proc/nothing"),
    ],
)
def test_mistakes(tmp_path: Path, options: list[str], said: str) -> None:
    write(tmp_path / "in", LINES[:1])
    given = [str(tmp_path / "in") if each == "IN" else each for each in options]
    done = batch(tmp_path, *given, ranks=2, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in done.stderr


def requests(count: int) -> list[Any]:
    return [{"prompt": f"Return {i} of", "max_tokens": 6 + i % 7, "temperature": 0} for i in range(count)]


def test_told_to_end(tmp_path: Path) -> None:
    """SIGTERM to the launcher: what is done is kept, the status says that there is more, the next run does that."""
    count = 400
    write(tmp_path / "in", [{**each, "max_tokens": 40, "ignore_eos": True} for each in requests(count)])
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--drain-timeout", "0"]
    command = [launcher(), *launcher_options(), "-n", "2", sys.executable, *MODEL, *options]
    with start(command) as process:
        until_answered(tmp_path / "out", 5)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert "give the same command again" in said
    part = answers(tmp_path / "out")
    assert 5 <= len(part) < count
    assert all(each["response"]["body"]["usage"]["completion_tokens"] == 40 for each in part)
    assert len({each["custom_id"] for each in part}) == len(part)


def until_answered(path: Path, lines: int, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < end, "no answers come"
        time.sleep(0.01)


def kill_at(folder: Path, seconds: float, answered: int) -> None:
    """Kill a run, every process of it, some seconds after there are so many answers; it may have ended before."""
    mark = f"{run_mark()}/batch-{folder.name}-{time.monotonic_ns()}"
    options = ["--input", str(folder / "in"), "--output", str(folder / "out")]
    with start([sys.executable, *MODEL, *options], {guard.VARIABLE: mark}, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 300
        while len(whole_lines(folder / "out")) < answered and process.poll() is None:
            assert time.monotonic() < end, "no answers come"
            time.sleep(0.005)
        time.sleep(seconds)
        guard.end_marked(mark)
        process.communicate()


def whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def kill_till_answered(folder: Path, count: int, kills: int, rng: random.Random) -> int:
    """Kill a batch again and again, until it is whole or this often; what was answered stays. Return how often."""
    write(folder / "in", requests(count))
    kept: list[bytes] = []
    for done in range(kills):
        if len(kept) == count:
            return done
        # At any moment of the start, or while answers come.
        moment = (rng.uniform(0.1, 3.0), 0) if rng.random() < 0.4 else (rng.uniform(0.0, 0.3), len(kept) + 1)
        kill_at(folder, *moment)
        lines = whole_lines(folder / "out")
        assert lines[: len(kept)] == kept
        kept = lines
    return kills


def texts(path: Path) -> dict[str, Any]:
    return {each["custom_id"]: each["response"]["body"]["choices"] for each in answers(path)}


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Nothing is lost, nothing is there twice. DLLAMA_MPI_KILLS: how often it is killed."""
    count, left, rng = 300, int(os.environ.get("DLLAMA_MPI_KILLS", "8")), random.Random(4)
    folder = tmp_path
    for number in range(left):  # a batch that is whole cannot be killed: then there is a new one
        folder = tmp_path / str(number)
        folder.mkdir()
        left -= kill_till_answered(folder, count, left, rng)
        done = run([sys.executable, *MODEL, "--input", str(folder / "in"), "--output", str(folder / "out")])
        assert done.returncode == 0
        found = answers(folder / "out")
        assert sorted(each["custom_id"] for each in found) == sorted(f"line-{i + 1}" for i in range(count))
        if left == 0:
            break
    run([sys.executable, *MODEL, "--input", str(folder / "in"), "--output", str(tmp_path / "whole")])
    for one in tmp_path.glob("*/out"):
        assert texts(one) == texts(tmp_path / "whole")
