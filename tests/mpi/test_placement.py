"""Weights that come from rank 0, from a cache or from a slice on the disk give what a whole model's files give.

Each rank runs in a folder of its own, which stands for a host's disk: `model` and `cache` are looked for there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mpi.launch import ROOT, Done, launcher, launcher_options, run
from tests.mpi.pool import pool
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model

JOB = str(ROOT / "tests" / "mpi" / "placement_job.py")
ENDS_THE_JOB = ("table",)
"""Disturbances of one rank that the others learn of by MPI's abort."""


def on_hosts(folders: list[Path], args: list[str]) -> Done:
    """Run `python args` on one rank a folder, each with that as its working directory."""
    if args[-1] not in ENDS_THE_JOB:
        return pool(len(folders)).run(args, folders=folders, check=False)
    command = [launcher(), *launcher_options()]
    for i, folder in enumerate(folders):
        command += [":"] * (i > 0) + ["-n", "1", "-wdir", str(folder), sys.executable, *args]
    return run(command)


def job(folders: list[Path], how: str = "", **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what a job that has to end well prints, and its lines on stderr."""
    done = on_hosts(folders, [JOB, json.dumps({"cache_dir": "cache", **options}), how])
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("compiling kernels")]
    return json.loads(done.stdout), lines


def fails(folders: list[Path], how: str = "", **options: Any) -> str:
    """Return the one line of a job that has to end with a user's mistake."""
    done = on_hosts(folders, [JOB, json.dumps({"cache_dir": "cache", **options}), how])
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def hosts(tmp_path: Path) -> Callable[..., list[Path]]:
    """Return what makes folders, one a rank; those whose rank is named get the model of a case."""

    def made(count: int, case: str = "llama3_gqa", having: tuple[int, ...] = (0,)) -> list[Path]:
        folders = [tmp_path / f"host{rank}" for rank in range(count)]
        for rank, folder in enumerate(folders):
            folder.mkdir()
            if rank in having:
                write_model(CASES[case], folder / "model")
        return folders

    return made


def cached(folder: Path) -> list[Path]:
    """Return the files in a host's cache."""
    return sorted(path for path in (folder / "cache").glob("*") if path.name != ".lock")


def convert(*args: str) -> None:
    """Run the command on one rank."""
    pool(1).run(["-m", "dllama_mpi", "convert", *args])


@pytest.mark.parametrize(
    ("case", "weights", "split"),
    [("llama3_gqa", "q40", None), ("llama32_tied", "f16", None), ("llama_bias", "q80", "3,1,2"),
     ("qwen3_bf16", "q40", "1,2,1"),
     ("llama_heads6", "q4m", "1,5,2"), ("qwen2", "q4m,lm_head=q80", None), ("llama_heads7", "q40", None)],
)  # fmt: skip
def test_received_weights_are_those_of_the_files(
    case: str, weights: str, split: str | None, hosts: Callable[..., list[Path]]
) -> None:
    folders = hosts(3, case)
    options: dict[str, Any] = {"weights": weights, "split": split}
    local, lines = job([folders[0]] * 3, **options)
    assert local["origins"] == ["read"] * 3
    assert lines == []
    first, lines = job(folders, **options)
    assert first["origins"] == ["read", "received", "received"]
    assert first["in_memory"] == [0, 0, 0]
    assert len(lines) == 1
    assert "rank 0 read model, ranks 1-2 on " in lines[0]
    assert " MB from rank 0" in lines[0]
    assert [len(cached(folder)) for folder in folders] == [0, 1, 1]
    assert cached(folders[1])[0].stat().st_size == first["received"][1]
    second, lines = job(folders, **options)
    assert second["origins"] == ["read", "cache", "cache"]
    assert second["received"] == [0, 0, 0]
    assert "from their cache" in lines[0]
    for other in (first, second):
        assert (other["logits"], other["tokens"]) == (local["logits"], local["tokens"])


def test_converted_model(hosts: Callable[..., list[Path]], tmp_path: Path) -> None:
    """A conversion and what it was made from count as the same model; slices of a conversion are sent as they lie."""
    folders = hosts(3, having=(1,))
    convert(str(folders[1] / "model"), str(folders[0] / "model"), "--weights", "q40")
    local, _ = job([folders[0]] * 3)
    mixed, lines = job(folders)
    assert mixed["origins"] == ["read", "read", "received"]
    assert "ranks 0-1 read model, rank 2 on " in lines[0]
    assert mixed["logits"] == local["logits"]


def test_other_values_in_the_same_places(hosts: Callable[..., list[Path]]) -> None:
    """A host with a model of the same shape that was trained on does not use it, and says so."""
    folders = hosts(2, having=(0, 1))
    path = folders[1] / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    local, _ = job([folders[0]] * 2)
    found, lines = job(folders)
    assert found["origins"] == ["read", "received"]
    assert found["logits"] == local["logits"]
    assert [line for line in lines if "holds other files than rank 0's" in line]


def test_a_hosts_own_settings_do_not_count(hosts: Callable[..., list[Path]]) -> None:
    folders = hosts(2, having=(0, 1))
    path = folders[1] / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))
    assert job(folders) == job([folders[0]] * 2)


@pytest.mark.parametrize("damage", ["one bit", "truncated", "header"])
def test_damaged_cache_is_replaced(damage: str, hosts: Callable[..., list[Path]]) -> None:
    folders = hosts(3)
    first, _ = job(folders)
    (path,) = cached(folders[2])
    data = bytearray(path.read_bytes())
    if damage == "one bit":  # in the first matrix
        data[8 + int.from_bytes(data[:8], "little") + 1000] ^= 4
    elif damage == "header":
        data[data.index(b"rank 2 of 3")] ^= 1
    path.write_bytes(data[:-100] if damage == "truncated" else data)
    again, lines = job(folders)
    assert again["origins"] == ["read", "cache", "received"]
    assert again["logits"] == first["logits"]
    warnings = [line for line in lines if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "rank 2 on " in warnings[0]
    assert "it is received anew" in warnings[0]
    assert "rank 2 on " in lines[-1]
    assert job(folders)[0]["origins"] == ["read", "cache", "cache"]


def test_damaged_table_is_found_when_it_is_used(hosts: Callable[..., list[Path]]) -> None:
    folders = hosts(2)
    job(folders)
    assert "is damaged in model.embed_tokens.weight; remove it and start again" in fails(folders, "table")


@pytest.mark.parametrize("how", ["no cache", "small disk", "small limit"])
def test_received_into_memory(how: str, hosts: Callable[..., list[Path]]) -> None:
    folders = hosts(2)
    local, _ = job([folders[0]] * 2)
    every: dict[str, dict[str, Any]] = {"no cache": {"cache_dir": "none"}, "small limit": {"cache_limit": 1e-6}}
    options = every.get(how, {})
    found, lines = job(folders, how, **options)
    assert found["origins"] == ["read", "received"]
    assert found["in_memory"][1] > 0
    assert found["logits"] == local["logits"]
    assert cached(folders[1]) == []
    assert "kept in memory" in lines[-1]
    assert [line for line in lines if "no room in the cache" in line] == (lines[:1] if how != "no cache" else [])


@pytest.mark.parametrize("how", ["sender fails", "writer fails"])
def test_failure_in_the_middle(how: str, hosts: Callable[..., list[Path]]) -> None:
    folders = hosts(3)
    assert f"rank {int(how == 'writer fails')} on " in (line := fails(folders, how))
    assert "the disk is broken" in line
    assert [cached(folder) for folder in folders] == [[], [], []]


# ---- slices written by convert


@pytest.fixture
def sliced(hosts: Callable[..., list[Path]], tmp_path: Path) -> list[Path]:
    """Return three folders with their ranks' slices of a model at 3 ranks, split 2,1,1."""
    folders = hosts(3, having=())
    source = write_model(CASES["llama_bias"], tmp_path / "source")
    convert(str(source), str(tmp_path / "all"), "--ranks", "3", "--split", "2,1,1", "--only", "0,1,2")
    for rank, folder in enumerate(folders):
        others = [f"slice-{other}-of-3.safetensors" for other in range(3) if other != rank]
        shutil.copytree(tmp_path / "all", folder / "model", ignore=shutil.ignore_patterns(*others))
    return folders


def test_slices(sliced: list[Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copytree(tmp_path / "source", whole / "model")
    local, _ = job([whole] * 3, split="2,1,1")
    found, lines = job(sliced, split="2,1,1")
    assert found["origins"] == ["slice"] * 3
    assert found["logits"] == local["logits"]
    assert "ranks 0-2 on " in lines[0]
    assert "read their slices in model" in lines[0]
    for folders in ([whole, *sliced[1:]], [sliced[0], whole, sliced[2]]):
        found, _ = job(folders, split="2,1,1")
        assert sorted(found["origins"]) == ["read", "slice", "slice"]
        assert found["logits"] == local["logits"]
    assert "holds other weights than q80; leave out --weights" in fails(sliced, split="2,1,1", weights="q80")


def test_slices_of_another_split(sliced: list[Path], tmp_path: Path) -> None:
    assert "holds no weights for rank 0 of 3, but the slice of rank 0 of 3 with --split 2,1,1" in fails(sliced)
    assert "for rank 1 of 2, but" in fails(sliced[:2])
    swapped = [sliced[0], sliced[2], sliced[1]]
    assert "for rank 1 of 3 with --split 2,1,1, but the slice of rank 2" in fails(swapped, split="2,1,1")
    (tmp_path / "empty").mkdir()
    missing = fails([*sliced[:2], tmp_path / "empty"], split="2,1,1")
    assert "rank 2 on " in missing
    assert "give this host the slice of rank 2 of 3 with --split 2,1,1 (convert --only)" in missing
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copytree(tmp_path / "source", whole / "model")
    found, lines = job([whole, *sliced[1:]])
    assert found["origins"] == ["read", "received", "received"]
    assert len([line for line in lines if "the weights are received from rank 0" in line]) == 2


def test_damaged_slice(sliced: list[Path], tmp_path: Path) -> None:
    """A slice that the user put there is not touched; without the whole model the job ends with one line."""
    path = sliced[1] / "model" / "slice-1-of-3.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 1000] ^= 4
    path.write_bytes(data)
    assert "is damaged in model.layers.0." in fails(sliced, split="2,1,1")
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copytree(tmp_path / "source", whole / "model")
    found, _ = job([whole, *sliced[1:]], split="2,1,1")
    assert found["origins"] == ["read", "received", "slice"]
    assert path.read_bytes() == data


def test_convert_mistakes(tmp_path: Path) -> None:
    source = str(write_model(CASES["llama3_gqa"], tmp_path / "source"))
    for options, words in (
        (["--only", "1"], "--only R and --ranks N belong together"),
        (["--only", "4", "--ranks", "4"], "--only 4: with --ranks 4 the ranks are 0 to 3"),
        (["--only", "0", "--ranks", "2", "--split", "1,2,3"], "3 shares"),
        (["--only", "0", "--ranks", "99"], "num_attention_heads is"),
    ):
        args = ["-m", "dllama_mpi", "convert", source, str(tmp_path / "new"), *options]
        done = pool(2).run(args, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("error:") == 1
    assert not (tmp_path / "new").exists()


# ---- the command


def test_cache_command(hosts: Callable[..., list[Path]]) -> None:
    folders = hosts(2)
    job(folders)

    def command(*args: str) -> str:
        return pool(2).run(["-m", "dllama_mpi", "cache", *args, "--cache-dir", str(folders[1] / "cache")]).stdout

    (entry,) = json.loads(command("list", "--json"))["entries"]
    assert (entry["model"], entry["weights"], entry["slice"]) == ("model", "q4m", "rank 1 of 2")
    assert entry["bytes"] == cached(folders[1])[0].stat().st_size
    assert "rank 1 of 2" in command("list")
    assert "1 removed" in command("clear")
    assert cached(folders[1]) == []
    assert command("list") == "no weights are kept\n"
