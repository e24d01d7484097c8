"""Quantised safetensors on real ranks: each reads its part, or receives it, and what cannot be read ends them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.all_cases import ALL_CASES
from tests.mpi.launch import ROOT, mpiexec
from tests.mpi.pool import pool
from tests.quantised_files import VARIETIES, read_raw, write_quantised, write_raw

JOB = str(ROOT / "tests" / "mpi" / "placement_job.py")


def job(folders: list[Path]) -> tuple[dict[str, Any], str]:
    """Return what a job with a rank in each folder prints, and its stderr."""
    done = pool(len(folders)).run([JOB, json.dumps({"cache_dir": "none"})], folders=folders)
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    ("name", "variety", "kept"),
    [
        ("llama31", "gptq", "GPTQ, 4 bits, groups of 32, symmetric: kept as q40,lm_head=f16"),
        ("qwen3_moe", "awq", "AWQ (gemm), 4 bits, groups of 32, with zero-points: kept as q4m,lm_head=f16"),
    ],
)
def test_ranks_read_their_parts_or_receive_them(name: str, variety: str, kept: str, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    quantised, _ = write_quantised(ALL_CASES[name], VARIETIES[variety], tmp_path)
    quantised.rename(folders[0] / "model")
    alone, said = job(folders[:1])
    assert f"model: {kept}" in said.splitlines()
    both, said = job([folders[0]] * 2)
    assert both["origins"] == ["read", "read"]
    assert said.count(kept) == 1
    sent, _ = job(folders)
    assert sent["origins"] == ["read", "received"]
    assert sent["tokens"] == both["tokens"] == alone["tokens"]


def test_a_scale_that_is_no_number_ends_every_rank(tmp_path: Path) -> None:
    """It lies in the part of one rank alone."""
    quantised, _ = write_quantised(ALL_CASES["llama31"], VARIETIES["gptq"], tmp_path)
    parts = read_raw(quantised)
    parts["model.layers.1.mlp.up_proj.scales"][1][-1, -1] = np.uint16(0x7C00)
    write_raw(quantised, parts)
    done = mpiexec(2, ["-m", "dllama_mpi", "bench", "--model", str(quantised)], check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "tensor model.layers.1.mlp.up_proj.qweight has 1 scales that are NaN or infinite; get it again" in line
    assert "Traceback" not in done.stderr
