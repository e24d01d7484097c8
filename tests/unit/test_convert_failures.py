"""A conversion that is refused, fails or is killed leaves nothing that looks whole."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from dllama_mpi.architectures.registry import read_config, read_model_config
from dllama_mpi.errors import DllamaError, ModelError, UsageError
from dllama_mpi.model.recipe import WeightRecipe, whole_parts
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.weights.checkpoint import Checkpoint
from dllama_mpi.weights.convert import Conversion, convert
from dllama_mpi.weights.tiles import load_matrix
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_safetensors
from tests.tiny_models.tensors import tensors
from tests.unit.conversions import contents, run, write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with sizes that are no multiples of a tile's, an odd number of tiles, and the files beside it."""
    return write_source(tmp_path / "source")


# ---- mistakes


def refused(kind: type[DllamaError], pattern: str, source: Path, destination: Path) -> None:
    """Check that a conversion raises one line that matches, and leaves no DST.partial of its own."""
    with pytest.raises(kind, match=pattern) as raised:
        run(source, destination, "q40")
    assert "\n" not in str(raised.value)


def test_destination_in_use(source: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    refused(UsageError, "exists and is not empty; remove it", source, tmp_path / "new")
    refused(UsageError, "exists and is not a folder", source, tmp_path / "new" / "notes.txt")
    assert contents(tmp_path / "new") == {"notes.txt": b"mine"}


def test_empty_destination_and_missing_parents_are_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty", "q40")
    assert contents(run(source, tmp_path / "a" / "b", "q40")) == contents(tmp_path / "empty")


def test_destination_in_or_at_the_source(source: Path, tmp_path: Path) -> None:
    refused(UsageError, "is the source itself", source, tmp_path / "other" / ".." / "source")
    refused(UsageError, "would lie in the source", source, source / "q40")
    (tmp_path / "link").symlink_to(source)
    refused(UsageError, "is the source itself", tmp_path / "link", source)
    refused(UsageError, "would lie in the source", source, tmp_path / "link" / "q40")
    twin = source.rename(tmp_path / "twin.partial")
    refused(UsageError, "would lie in the source", twin, tmp_path / "twin")
    assert (twin / "model.safetensors").is_file()


def test_parent_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(UsageError, r"converting to .*file/new failed: .*mend that", source, tmp_path / "file" / "new")


def test_disk_too_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("dllama_mpi.weights.partial.shutil.disk_usage", lambda _: usage(10**9, 10**9 - 20_000, 20_000))
    refused(UsageError, r"needs 0\.\d\d GB, and 0\.00 GB are free in .*; free space", source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_source_that_does_not_fit_its_config(source: Path, tmp_path: Path) -> None:
    values = dict(tensors(CASES["llama_heads6"]))
    wrong = {**values, "model.norm.weight": values["model.norm.weight"][:-1]}
    write_safetensors(source / "model.safetensors", wrong, "F32")
    refused(
        ModelError, r"model.norm.weight has shape \[143\], but config.json implies \[144\]", source, tmp_path / "new"
    )
    wrong = {**values, "lm_head.weight": values["lm_head.weight"].T.copy()}
    write_safetensors(source / "model.safetensors", wrong, "F32")
    refused(ModelError, r"lm_head.weight has shape \[144, 163\]", source, tmp_path / "new")
    del values["model.layers.1.mlp.up_proj.weight"]
    write_safetensors(source / "model.safetensors", values, "F32")
    refused(ModelError, r"model.layers.1.mlp.up_proj.weight is missing", source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_leftover_that_is_not_ours_is_kept(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "new.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    refused(UsageError, r"new\.partial is in the way .*; remove it", source, tmp_path / "new")
    assert contents(partial) == {"thesis.txt": b"mine"}
    partial.rename(tmp_path / "elsewhere")
    partial.symlink_to(tmp_path / "elsewhere")
    refused(UsageError, r"new\.partial is in the way", source, tmp_path / "new")


def test_another_conversion_at_the_same_place(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "new.partial"
    partial.mkdir()
    with (partial / ".converting").open("w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        refused(UsageError, "is being written by another conversion", source, tmp_path / "new")
    run(source, tmp_path / "new", "q40")
    assert not partial.exists()


# ---- interruptions


def whole_after(source: Path, tmp_path: Path) -> bool:
    """Return whether a second run works and gives what an undisturbed one does."""
    again = contents(run(source, tmp_path / "new", "q40"))
    return again == contents(run(source, tmp_path / "undisturbed", "q40")) and not (tmp_path / "new.partial").exists()


@pytest.mark.parametrize("call", [0, 1, 7, 14])
@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt(), ModelError("injected")])
def test_exception_in_the_middle(
    call: int, error: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def failing(*args: Any) -> Any:
        if next(calls) == call:
            raise error
        return real(*args)

    real = load_matrix
    with monkeypatch.context() as patch:
        patch.setattr("dllama_mpi.weights.files.load_matrix", failing)
        with pytest.raises(type(error)):
            run(source, tmp_path / "new", "q40")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert whole_after(source, tmp_path)


def test_exception_at_the_end(source: Path, tmp_path: Path) -> None:
    config = (source / "config.json").rename(tmp_path / "config.json")
    parsed = read_model_config(json.loads(config.read_text()))
    conversion = Conversion(Checkpoint(source), WeightRecipe.parse("q40").formats(parsed), whole_parts(parsed), False)
    with pytest.raises(ModelError, match=r"no config\.json"):
        convert(conversion, tmp_path / "new", TensorParallelGroup(None))
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial").exists()


SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
from dllama_mpi.weights import convert, files, partial
from tests.unit.conversions import run

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function, calls):
    left = iter(range(calls))
    return lambda *args: function(*args) if next(left, None) is not None else die()

source, destination, how = sys.argv[1:]
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
elif how == "rename":
    Path.rename = die
else:
    name, calls = how.split()
    homes = [home for home in (convert, files, partial) if hasattr(home, name)]
    disturbed = after(getattr(homes[0], name), int(calls))
    for home in homes:
        setattr(home, name, disturbed)
try:
    run(Path(source), Path(destination), "q40")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def in_process(source: Path, destination: Path, how: str) -> subprocess.CompletedProcess[str]:
    """Convert in a process of its own, disturbed in a way that SCRIPT knows."""
    command = [sys.executable, "-c", SCRIPT, str(source), str(destination), how]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("moment", ["load_matrix 0", "load_matrix 9", "sync 0", "sync 1", "sync 4", "rename"])
def test_killed_in_the_middle(moment: str, source: Path, tmp_path: Path) -> None:
    assert in_process(source, tmp_path / "new", moment).returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    partial = tmp_path / "new.partial"
    assert (partial / ".converting").is_file()
    if moment != "rename":  # the last step: all is there but the name
        with pytest.raises(ModelError):
            read_config(partial)
    assert whole_after(source, tmp_path)


def test_file_that_cannot_be_written_whole(source: Path, tmp_path: Path) -> None:
    ended = in_process(source, tmp_path / "new", "limit")
    assert re.fullmatch(r"UsageError: converting to .*new failed: File too large; .*\n", ended.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
