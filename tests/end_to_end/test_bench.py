"""The bench command on real ranks: what it prints can be read, and its figures can be."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest

from tests.mpi.pool import pool
from tests.tiers import slow

BENCH = ["-m", "dllama_mpi", "bench", "--nthreads", "1", "-r", "2"]
TESTS = ["-p", "16", "-n", "4,3", "-pg", "8,2", "-b", "1,3", "-d", "0,20"]
KEYS = {
    "model_filename", "model_type", "model_size", "model_n_params", "n_ranks", "n_threads", "instruction_set",
    "weights", "buffer_float_type", "n_prompt", "n_gen", "n_depth", "n_batch", "test", "test_time", "avg_ns",
    "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts", "weights_read_gb_per_s", "kv_read_gb_per_s",
    "median_step_ns", "median_read_gb_per_s", "read_limit_gb_per_s", "best_reading_gb_per_s", "share_of_limit",
    "sync_share", "bits_per_weight", "bytes_per_token",
}  # fmt: skip
NAMES = [
    f"{name}{batch}{depth}"
    for depth in ("", " @ d20")
    for batch in ("", " x3")
    for name in ("pp16", "tg4", "tg3", "pp8+tg2")
]


def check(record: dict[str, Any], ranks: int) -> None:
    """Assert that a record's figures fit each other."""
    assert set(record) >= KEYS
    assert record["n_ranks"] == ranks
    tokens = record["n_batch"] * (record["n_prompt"] + record["n_gen"])
    assert len(record["samples_ns"]) == len(record["samples_ts"]) == 2
    for nanoseconds, speed in zip(record["samples_ns"], record["samples_ts"], strict=True):
        assert speed == pytest.approx(1e9 * tokens / nanoseconds, rel=1e-3)
    assert record["avg_ts"] == pytest.approx(sum(record["samples_ts"]) / 2)
    assert record["stddev_ts"] >= 0
    assert 0 <= record["sync_share"] < 1
    assert (record["sync_share"] > 0) is (ranks > 1)
    if record["n_prompt"]:
        for key in KEYS:
            assert ("gb_per_s" in key or key == "share_of_limit") is (record[key] is None)
        return
    seconds = sum(record["samples_ns"]) / 1e9
    read = record["bytes_per_token"] * record["n_gen"] * 2 / seconds / 1e9
    if record["bytes_per_token"] == record["model_size"] or record["n_batch"] == 1:
        assert record["weights_read_gb_per_s"] == pytest.approx(read, rel=1e-3)
    else:  # some more experts than one token reads
        assert 1.01 * read < record["weights_read_gb_per_s"] < 0.99 * record["n_batch"] * read
    assert record["kv_read_gb_per_s"] > 0
    mean = record["weights_read_gb_per_s"] + record["kv_read_gb_per_s"]
    mean_step = seconds / (2 * record["n_gen"])
    assert 0 < record["median_step_ns"] < 1e9 * seconds
    assert record["median_read_gb_per_s"] == pytest.approx(mean * mean_step * 1e9 / record["median_step_ns"], rel=1e-3)
    assert 0 < record["read_limit_gb_per_s"] <= record["best_reading_gb_per_s"]
    share = record["median_read_gb_per_s"] / record["read_limit_gb_per_s"]
    assert record["share_of_limit"] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize(
    ("ranks", "model"),
    [
        slow(1, ["--model", "demo"]),
        slow(1, ["--random", "tiny"]),
        slow(2, ["--model", "demo"]),
        (2, ["--random", "tiny"]),
    ],
)
def test_json(ranks: int, model: list[str]) -> None:
    done = pool(ranks).run([*BENCH, *TESTS, *model, "-o", "json"])
    records = json.loads(done.stdout)
    assert [record["test"] for record in records] == NAMES
    for record in records:
        check(record, ranks)
    name = model[1] if model[0] == "--model" else f"random:{model[1]}"
    assert {record["model_filename"] for record in records} == {name}
    assert "\r" not in done.stderr  # no terminal, no progress


@pytest.mark.slow
def test_csv_has_the_same_columns() -> None:
    out = pool(2).run([*BENCH, "--random", "tiny", "-p", "8", "-n", "2", "-o", "csv"]).stdout
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["test"] for row in rows] == ["pp8", "tg2"]
    for row in rows:
        assert set(row) >= KEYS
        samples = json.loads(row["samples_ts"])
        assert float(row["avg_ts"]) == pytest.approx(math.fsum(samples) / len(samples))
    assert rows[0]["share_of_limit"] == ""


@pytest.mark.slow
def test_markdown_is_one_table() -> None:
    options = ["-p", "8", "-n", "2", "--weights", "q80", "--buffer-float-type", "q80"]
    out = pool(2).run([*BENCH, "--random", "tiny", *options]).stdout
    ceiling, empty, *table = out.splitlines()
    assert ceiling.startswith("Memory reads ")
    assert empty == ""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    head, rule, *rows = cells
    assert all(set(mark) <= set("-:") for mark in rule)
    records = [dict(zip(head, row, strict=True)) for row in rows]
    assert [record["test"] for record in records] == ["pp8", "tg2"]
    for record in records:
        mean, deviation = map(float, record["t/s"].split(" ± "))
        assert mean > 0
        assert deviation >= 0
        assert (record["ranks"], record["threads"], record["weights"], record["buffer"]) == ("2", "1", "q80", "q80")
    assert records[0]["GB/s"] == records[0]["limit"] == records[0]["of limit"] == "-"
    assert float(records[1]["GB/s"]) >= 0  # a busy machine may round to nothing
    assert float(records[1]["limit"]) >= 0


def test_markdown_of_prompts_alone_says_nothing_of_memory() -> None:
    out = pool(1).run([*BENCH, "--random", "tiny", "-p", "8", "-n", "0"]).stdout
    assert all(line.startswith("|") for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--random", "llama9"], "llama9"),
        (["--model", "random:llama9"], "llama9"),
        (["--random", "tiny", "-p", "-5"], "-5"),
        (["--random", "tiny", "-n", "8,-1"], "-1"),
        (["--random", "tiny", "-pg", "8"], "8"),
        (["--random", "tiny", "-b", "0"], "0"),
        (["--random", "tiny", "-r", "0"], "0"),
        (["--random", "tiny", "-p", "0", "-n", "0"], "nothing to measure"),
        (["--random", "tiny", "--model", "elsewhere"], "give one of them"),
        (["--random", "tiny", "--max-seq-len", "64"], "513"),
    ],
)
def test_mistakes_are_one_line(options: list[str], told: str) -> None:
    done = pool(1).run([*BENCH, *options], check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_mistakes_are_told_once_by_two_ranks() -> None:
    done = pool(2).run([*BENCH, "--random", "tiny", "--max-seq-len", "64"], check=False)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line] == done.stderr.splitlines()[:1]
