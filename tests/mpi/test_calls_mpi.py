"""Calls of an `LLM` on several ranks: what is refused on all of them, and tokens that do not depend on company."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from tests.all_cases import ALL_CASES
from tests.mpi.launch import ROOT
from tests.mpi.pool import pool
from tests.tiers import all_but
from tests.tiny_models.files import write_model


def test_every_rank_is_told_what_is_wrong_and_the_next_call_works(tmp_path: Path) -> None:
    write_model(ALL_CASES["llama2"], tmp_path / "llama2")
    done = pool(2).run([str(ROOT / "tests/mpi/wrong_calls_job.py"), str(tmp_path / "llama2")])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4 * 27 + 2 * 4
    for each in found:
        root, other = each["told"]
        assert root == other, each
        assert root.startswith(("RequestError: ", "ModelError: ")), each  # the model has no tokenizer
        assert "\n" not in root, each
        assert each["works"], each


@pytest.mark.parametrize(
    ("ranks", "name"),
    all_but([(2, "qwen3")], product((1, 2), ("qwen3", "gemma3_text", "qwen3_moe", "qwen3_next", "lfm2"))),
)
def test_tokens_do_not_depend_on_company(ranks: int, name: str, tmp_path: Path) -> None:
    write_model(ALL_CASES[name], tmp_path / name)
    done = pool(ranks).run([str(ROOT / "tests/mpi/company_job.py"), str(tmp_path / name)])
    found = json.loads(done.stdout)
    for way, tokens in found["ways"].items():
        assert tokens == found["reference"], way
    assert found["preemptions"] > 0, found["pages"]
