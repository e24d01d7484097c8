"""GGUF files over MPI: slices from rank 0 and from caches, split sets, conversions, and files of strangers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.all_cases import ALL_CASES
from tests.gguf_edit import Document, build, number, parse
from tests.gguf_files import write_gguf
from tests.mpi.pool import pool
from tests.mpi.test_convert_mpi import contents
from tests.mpi.test_placement import cached, job
from tests.tiers import all_but

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama3_gqa", {"hidden_size": 256, "intermediate_size": 512}),
    "experts": (
        "qwen3_moe",
        {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2},
    ),
}
"""Models whose matrices have whole superblocks of 256 columns."""
KINDS = [(name, kind) for name in CONFIGS for kind in ("Q4_0", "Q4_K", "Q8_0", "Q6_K")]
QUICK = [("dense", "Q4_K"), ("experts", "Q4_0")]


@pytest.fixture
def hosts(tmp_path: Path) -> Callable[..., list[Path]]:
    """Return what makes folders, one a rank, of which the first has a GGUF file in its folder `model`."""

    def made(count: int, name: str = "dense", kind: str = "Q4_0") -> list[Path]:
        folders = [tmp_path / f"host{rank}" for rank in range(count)]
        base, changes = CONFIGS[name]
        case = ALL_CASES[base]
        for folder in folders:
            folder.mkdir()
        _, path = write_gguf(replace(case, config=case.config | changes), tmp_path, lambda name, values: kind)
        found = {each.kind for each in parse(path.read_bytes()).tensors}
        assert int(gguf.GGMLQuantizationType[kind]) in found
        (folders[0] / "model").mkdir()
        shutil.move(path, folders[0] / "model" / "model.gguf")
        return folders

    return made


@pytest.mark.parametrize(("name", "kind"), all_but(QUICK[1:], KINDS))
def test_received_slices_are_those_of_the_file(name: str, kind: str, hosts: Callable[..., list[Path]]) -> None:
    folders = hosts(3, name, kind)
    alone, _ = job(folders[:1])
    for ranks in (2, 3):
        local, _ = job(folders[:1] * ranks)
        first, lines = job(folders[:ranks])
        again, _ = job(folders[:ranks])
        assert local["origins"] == ["read"] * ranks
        assert first["origins"] == ["read"] + ["received"] * (ranks - 1)
        assert " MB from rank 0" in lines[-1]
        assert again["origins"] == ["read"] + ["cache"] * (ranks - 1)
        assert first["logits"] == again["logits"] == local["logits"]
        assert first["tokens"] == again["tokens"] == local["tokens"] == alone["tokens"]
        last = np.array(alone["last"])
        np.testing.assert_allclose(local["last"], last, atol=0.02 * np.abs(last).max())
    assert [len(cached(folder)) for folder in folders] == [0, 2, 1]  # rank 1's of 2 and of 3


def halves(document: Document) -> list[Document]:
    """Return the two files of a split set."""
    middle = len(document.tensors) // 2
    parts = [Document(dict(document.keys), document.tensors[:middle]), Document({}, document.tensors[middle:])]
    for i, part in enumerate(parts):
        part.keys[b"split.no"], part.keys[b"split.count"] = number("U16", i), number("U16", 2)
        part.keys[b"split.tensors.count"] = number("I32", len(document.tensors))
    return parts


def test_split_set(hosts: Callable[..., list[Path]]) -> None:
    folders = hosts(2, "dense", "Q4_K")
    whole, _ = job(folders[:1] * 2)
    path = folders[0] / "model" / "model.gguf"
    for i, part in enumerate(halves(parse(path.read_bytes())), 1):
        path.with_name(f"model-{i:05d}-of-00002.gguf").write_bytes(build(part))
    path.unlink()
    local, _ = job(folders[:1] * 2)
    found, _ = job(folders)
    assert found["origins"] == ["read", "received"]
    assert (
        (found["logits"], found["tokens"]) == (local["logits"], local["tokens"]) == (whole["logits"], whole["tokens"])
    )


@pytest.mark.parametrize(("name", "kind"), all_but(QUICK[:1], KINDS))
def test_converted_is_the_same_model(name: str, kind: str, hosts: Callable[..., list[Path]], tmp_path: Path) -> None:
    folders = hosts(2, name, kind)
    source = str(folders[0] / "model" / "model.gguf")
    written = {}
    for ranks in (1, 2):
        destination = tmp_path / f"on_{ranks}"
        pool(ranks).run(["-m", "dllama_mpi", "convert", source, str(destination)])
        written[ranks] = contents(destination)
    assert written[1] == written[2]
    assert {"config.json", "metadata.gguf", "model.safetensors"} <= written[1].keys()
    found = [job(folders[:1] * ranks)[0] for ranks in (1, 2)]
    shutil.rmtree(folders[0] / "model")
    shutil.move(tmp_path / "on_1", folders[0] / "model")
    for ranks in (1, 2):
        converted, _ = job(folders[:1] * ranks)
        for key in ("logits", "tokens"):
            assert converted[key] == found[ranks - 1][key]


@pytest.mark.parametrize(("name", "kind"), all_but(QUICK[1:], QUICK))
def test_slices(name: str, kind: str, hosts: Callable[..., list[Path]], tmp_path: Path) -> None:
    """Slices that convert writes of a GGUF file run alone, and are that file's."""
    folders = hosts(2, name, kind)
    local, _ = job(folders[:1] * 2)
    source = str(folders[0] / "model" / "model.gguf")
    pool(1).run(["-m", "dllama_mpi", "convert", source, str(tmp_path / "all"), "--only", "0,1", "--ranks", "2"])
    shutil.copytree(tmp_path / "all", folders[1] / "model", ignore=shutil.ignore_patterns("slice-0*"))
    mixed, _ = job(folders)
    assert mixed["origins"] == ["read", "slice"]
    shutil.rmtree(folders[0] / "model")
    shutil.copytree(tmp_path / "all", folders[0] / "model", ignore=shutil.ignore_patterns("slice-1*"))
    alone, _ = job(folders)
    assert alone["origins"] == ["slice"] * 2
    assert mixed["logits"] == alone["logits"] == local["logits"]
    assert mixed["tokens"] == alone["tokens"] == local["tokens"]
