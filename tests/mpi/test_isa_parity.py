"""The parity of every instruction set this processor can run: forced, one rank, a few architectures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi.launch import ROOT, run
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model

pytestmark = pytest.mark.slow  # kernels are compiled anew
CHOSEN = ("llama31", "qwen3", "llama_heads6")


def offered() -> list[str]:
    """Return the instruction sets of this processor, as a process without restrictions finds them."""
    code = "from dllama_mpi.kernels import runtime; print(*runtime.host_isas())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("isa", offered()[1:])
def test_parity_on_another_instruction_set(isa: str, tmp_path: Path) -> None:
    for name in CHOSEN:
        write_model(CASES[name], tmp_path / name)
    job = [sys.executable, str(ROOT / "tests/mpi/parity_job.py"), str(tmp_path), *CHOSEN]
    done = run(job, 600, {"DLLAMA_MPI_ISA": isa})
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["case"] for result in results] == list(CHOSEN), done.stderr
    for result in results:
        assert max(result["errors"].values()) < 1e-4
        assert all(tokens == result["expected"] for tokens in result["greedy"].values())
