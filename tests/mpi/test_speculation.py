"""Drafts checked by several ranks: the same tokens as without them, in fewer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.mpi.pool import pool
from tests.tiers import slow

REPEATS = "   If the string is not found, the string is returned.\n\n" * 6
# What is sent as float32 adds up alike however many tokens a message holds, at any rank count.
COMMON = ["-m", "dllama_mpi", "--steps", "120", "--ignore-eos", "--nthreads", "1", "--buffer-float-type", "f32"]


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text(REPEATS)
    return path


def report(ranks: int, prompt: Path, *options: str) -> dict[str, Any]:
    """Return what a run prints as JSON."""
    done = pool(ranks).run([*COMMON, "--prompt-file", str(prompt), "--json", *options])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("ranks", [slow(1), 2, slow(3)])
def test_greedy_text_in_fewer_steps(ranks: int, prompt: Path) -> None:
    plain = report(ranks, prompt, "--temperature", "0")
    drafted = report(ranks, prompt, "--temperature", "0", "--speculate", "lookup")
    assert drafted["token_ids"] == plain["token_ids"]
    assert len(drafted["token_ids"]) == 120
    assert plain["stats"]["decode"]["steps"] == 119
    assert drafted["stats"]["decode"]["tokens"] == 119
    assert drafted["stats"]["decode"]["steps"] < 110
    assert drafted["stats"]["speculation"]["accepted"] > 0
    assert "speculation" not in plain["stats"]


@pytest.mark.parametrize("temperature", ["0.4", slow("1.3")])
def test_sampled_text_is_the_same_for_the_same_seed(temperature: str, prompt: Path) -> None:
    options = ["--temperature", temperature, "--topp", "1", "--topk", "0", "--seed", "5", "--presence-penalty", "0.1"]
    plain = report(3, prompt, *options)
    drafted = report(3, prompt, *options, "--speculate", "lookup", "--prefill-chunk", "5")
    assert drafted["token_ids"] == plain["token_ids"]
    assert (drafted["stats"]["full_gathers"] > 0) == (temperature == "1.3")


def test_figures_and_the_default(prompt: Path) -> None:
    done = pool(2).run(
        [*COMMON, "--prompt-file", str(prompt), "--temperature", "0", "--stats", "--speculate", "lookup"]
    )
    assert "tokens a decode step" in done.stderr
    silent = pool(2).run([*COMMON, "--prompt-file", str(prompt), "--temperature", "0", "--stats"])
    assert silent.stdout == done.stdout
    assert "drafted" not in silent.stderr


def test_an_answer_in_chat() -> None:
    args = ["-m", "dllama_mpi", "chat", "--temperature", "0", "--steps", "60", "--ignore-eos", "--nthreads", "1"]
    lines = "What is a list?\nWhat is a list?\n/stats\n/quit\n"
    plain = pool(2).run(args, stdin=lines)
    drafted = pool(2).run([*args, "--speculate", "lookup"], stdin=lines)
    assert drafted.stdout == plain.stdout
    assert "drafted" in drafted.stderr
