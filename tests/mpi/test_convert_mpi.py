"""Converting with several ranks: the same bytes as with one, and one line when it cannot be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.launch import mpiexec
from tests.tiny_models import CASES, write_model

# Files of at most 15 kB, so that a tiny model fills several. The last argument disturbs one rank.
SCRIPT = """
import sys
from pathlib import Path
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.config import ModelConfig
from dllama_mpi.model.names import matrix_shapes, vector_shapes
from dllama_mpi.parallel.group import connect
from dllama_mpi.weights import convert as module, files, partial
from dllama_mpi.weights.checkpoint import Checkpoint

def fail(*args):
    raise RuntimeError("injected")

source, destination, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
module._FILE_BYTES = 15_000
group = connect()
if how == "elsewhere" and group.rank == 1:
    partial._SECONDS_TO_APPEAR = 0.2
    destination = destination / "not" / "shared"
if how == "other source" and group.rank == 1:
    source = source.with_name("other")
if how == "fault" and group.rank == 1:
    files.load_matrix = fail
if how == "full disk" and group.rank == 1:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
config = ModelConfig.load(source)
module.convert(
    Checkpoint(source), destination, FORMATS["q40"], matrix_shapes(config), vector_shapes(config),
    config.tie_word_embeddings, group, True,
)
assert destination.is_dir()
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_several_files_are_the_same_at_every_rank_count(tmp_path: Path) -> None:
    source = write_model(CASES["qwen3_bf16"], tmp_path / "source")
    found = {}
    for ranks in (1, 2, 3, 4):
        destination = tmp_path / f"on_{ranks}"
        ended = mpiexec(ranks, ["-c", SCRIPT, str(source), str(destination), ""])
        assert (ended.stdout, ended.stderr) == ("", "")
        found[ranks] = contents(destination)
    assert len([name for name in found[1] if name.endswith(".safetensors")]) > 4
    assert found[1] == found[2] == found[3] == found[4]


@pytest.mark.parametrize("weights", ["q40", "f16"])
def test_command_writes_the_same_at_every_rank_count(weights: str, tmp_path: Path) -> None:
    source = write_model(CASES["llama_heads6"], tmp_path / "source")
    found = {}
    for ranks in (1, 2, 3, 4):
        destination = tmp_path / f"on_{ranks}"
        mpiexec(ranks, ["-m", "dllama_mpi", "convert", str(source), str(destination), "--weights", weights])
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
    ended = mpiexec(3, ["-c", SCRIPT, str(source), str(destination), how], check=False)
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, ended.stderr
    assert message in lines[0]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "new.partial").exists()
    assert destination.exists() == (how == "in use")


def test_fault_of_one_rank_ends_the_job_and_leaves_nothing_whole(tmp_path: Path) -> None:
    source = write_model(CASES["llama_heads6"], tmp_path / "source")
    ended = mpiexec(3, ["-c", SCRIPT, str(source), str(tmp_path / "new"), "fault"], check=False)
    assert ended.returncode != 0
    assert "rank 1 on " in ended.stderr
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial" / "config.json").exists()
    assert (tmp_path / "new.partial" / ".converting").is_file()  # so that the next run may remove it
    mpiexec(2, ["-c", SCRIPT, str(source), str(tmp_path / "new"), ""])
    assert not (tmp_path / "new.partial").exists()
