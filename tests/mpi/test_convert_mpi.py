"""Converting with several ranks: the same bytes as with one, and one line when it cannot be done."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tests.mpi.launch import ROOT, mpiexec
from tests.mpi.pool import pool
from tests.tiers import slow
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model

JOB = str(ROOT / "tests/mpi/convert_job.py")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_several_files_are_the_same_at_every_rank_count(tmp_path: Path) -> None:
    source = write_model(CASES["qwen3_bf16"], tmp_path / "source")
    found = {}
    for ranks in (1, 2, 3, 4):
        destination = tmp_path / f"on_{ranks}"
        ended = pool(ranks).run([JOB, str(source), str(destination)])
        assert (ended.stdout, ended.stderr) == ("", "")
        found[ranks] = contents(destination)
    assert len([name for name in found[1] if name.endswith(".safetensors")]) > 4
    assert found[1] == found[2] == found[3] == found[4]


@pytest.mark.parametrize("weights", ["q40", slow("f16")])
def test_command_writes_the_same_at_every_rank_count(weights: str, tmp_path: Path) -> None:
    source = write_model(CASES["llama_heads6"], tmp_path / "source")
    found = {}
    for ranks in (1, 2, 3, 4):
        destination = tmp_path / f"on_{ranks}"
        pool(ranks).run(["-m", "dllama_mpi", "convert", str(source), str(destination), "--weights", weights])
        found[ranks] = contents(destination)
    assert sorted(found[1]) == ["config.json", "generation_config.json", "model.safetensors"]
    assert found[1] == found[2] == found[3] == found[4]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("elsewhere", "shared.partial, made by rank 0, is not to be seen; give a folder that all hosts share"),
        ("other source", "sees other model files than rank 0 on "),
        ("full disk", "failed: File too large"),
        ("in use", "new exists and is not empty; remove it or give another folder"),
    ],
)
def test_mistakes_are_told_once_and_leave_nothing(how: str, message: str, tmp_path: Path) -> None:
    source = write_model(CASES["llama_heads6"], tmp_path / "source")
    write_model(CASES["llama_heads7"], tmp_path / "other")
    destination = tmp_path / "new"
    if how == "in use":
        write_model(CASES["llama2"], destination)
    ended = pool(3).run([JOB, str(source), str(destination), how], check=False)
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, ended.stderr
    assert message in lines[0]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "new.partial").exists()
    assert destination.exists() == (how == "in use")


@pytest.mark.slow
def test_fault_of_one_rank_ends_the_job_and_leaves_nothing_whole(tmp_path: Path) -> None:
    source = write_model(CASES["llama_heads6"], tmp_path / "source")
    ended = mpiexec(3, [JOB, str(source), str(tmp_path / "new"), "fault"], check=False)
    assert ended.returncode != 0
    assert "rank 1 on " in ended.stderr
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial" / "config.json").exists()
    marker = tmp_path / "new.partial" / ".converting"
    assert marker.is_file()  # so that the next run may remove it
    with marker.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the launcher may have ended before the last rank
    pool(2).run([JOB, str(source), str(tmp_path / "new")])
    assert not (tmp_path / "new.partial").exists()
