"""`plan` and `--split auto` on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.mpi.launch import mpiexec
from tests.mpi.pool import pool
from tests.tiers import slow

PLAN = ["-m", "dllama_mpi", "plan", "--nthreads", "1", "--prefill-chunk", "32", "-p", "64", "-n", "8"]
KEYS = {
    "model", "n_params", "weights", "kv_type", "buffer_float_type", "prefill_chunk", "split", "n_prompt", "n_gen",
    "n_depth", "source", "hosts", "links", "ranks", "counts", "best_ranks", "advice", "bits_per_weight",
    "bytes_per_token", "disturbances",
}  # fmt: skip
COST = {"tokens_per_second", "ms", "weights_ms", "attention_ms", "synchronisation_ms", "overhead_ms"}


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_json(ranks: int) -> None:
    model = ["--random", {1: "tiny-sparse", 2: "tiny", 3: "tiny-state"}[ranks]]
    done = pool(ranks).run([*PLAN, *model, "-o", "json"])
    report = json.loads(done.stdout)
    assert set(report) == KEYS
    assert report["source"] == "measured"
    (host,) = report["hosts"]
    assert host["ranks"] == ranks
    assert host["cores"] > 0
    assert host["free_bytes"] > 0
    assert host["read_gb_per_s"] > 0
    assert host["instruction_set"]
    assert len(report["links"]) == (ranks > 1)
    for link in report["links"]:
        assert link["latency_us"] > 0
        assert link["mbit_per_s"] > 0
    assert [rank["rank"] for rank in report["ranks"]] == list(range(ranks))
    assert all(rank["decode_gb_per_s"] > 0 and rank["prefill_gmac_per_s"] > 0 for rank in report["ranks"])
    assert [count["ranks"] for count in report["counts"]] == list(range(1, ranks + 1))
    for count in report["counts"]:
        assert count["problem"] is None
        for phase in ("decode", "prefill"):
            assert set(count[phase]) == COST
            assert count[phase]["tokens_per_second"] > 0
            assert (count[phase]["synchronisation_ms"] >= 0) if count["ranks"] > 1 else True
            assert count["ranks"] > 1 or count[phase]["synchronisation_ms"] == 0
    assert 1 <= report["best_ranks"]["decode"] <= ranks
    assert "\r" not in done.stderr  # no terminal, no progress


@pytest.mark.slow
def test_a_busy_machine_is_told() -> None:
    cores = os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        done = mpiexec(2, [*PLAN, "--random", "tiny", "-o", "json"])
    finally:
        for other in others:
            other.kill()
            other.wait()
    report = json.loads(done.stdout)
    (host,) = report["hosts"]
    assert host["other_load"] > 0.1
    assert any("other programs took" in each for each in report["disturbances"])
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "the machine was busy" in line


@pytest.mark.slow  # kernels of its own
def test_text_with_other_options() -> None:
    options = ["--weights", "q80", "--kv-type", "q80", "--buffer-float-type", "q80", "--split", "auto"]
    out = pool(2).run([*PLAN, "--random", "tiny", *options]).stdout
    assert out.startswith("random:tiny, ")
    assert "in q80, KV cache in q80, messages in q80" in out
    assert "best for prefill" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--random", "llama9"], "llama9"),
        (["--random", "tiny:5"], "tiny has 4 layers"),
        (["--weights", "q40,lm_tail=q80"], "no matrix is called 'lm_tail'"),
        (["--random", "tiny", "--model", "elsewhere"], "give one of them"),
        (["--model", "/nowhere"], "no such model directory"),
        (["--split", "1,2,3"], "has 3 shares; the job has 2 ranks"),
        (["--hosts", "/nowhere"], "/nowhere: No such file"),
    ],
)
def test_mistakes_are_one_line(options: list[str], told: str) -> None:
    done = pool(2).run([*PLAN, *options], check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    line = done.stderr.splitlines()[0]
    assert line.startswith("error: ")
    assert told in line
    assert done.stderr.count("error: ") == 1


@pytest.mark.slow
def test_more_ranks_than_heads_are_refused() -> None:
    done = mpiexec(9, [*PLAN, "--random", "tiny"], check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: num_attention_heads is 8; 9 ranks asked for; use at most 8"


@pytest.mark.parametrize("ranks", [2, slow(3)])
def test_auto_split_says_what_it_chose_and_writes_the_same_text(ranks: int) -> None:
    common = ["-m", "dllama_mpi", "--prompt", "This module provides", "--steps", "24", "--temperature", "0"]
    common += ["--nthreads", "1", "--weights", "f32", "--buffer-float-type", "f32"]
    even = pool(ranks).run(common)
    auto = pool(ranks).run([*common, "--split", "auto"])
    assert auto.stdout == even.stdout
    assert len(even.stdout) > 40
    (line,) = [line for line in auto.stderr.splitlines() if line.startswith("split auto: ")]
    shares = [int(part.split("%")[0].split(": ")[-1]) for part in line.split("split auto: ")[1].split(", ")]
    assert len(shares) == ranks
    assert abs(sum(shares) - 100) <= ranks
    assert "split auto" not in even.stderr


def test_one_rank_has_nothing_to_share_out() -> None:
    done = pool(1).run(["-m", "dllama_mpi", "--prompt", "This", "--steps", "2", "--split", "auto"])
    assert "split auto" not in done.stderr
