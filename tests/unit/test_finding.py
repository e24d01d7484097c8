"""Paths and names of models: what is understood, and what is offered for a name that is nearly right."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.hub import local
from dllama_mpi.startup.finding import find_alone, is_named, nearest_name
from dllama_mpi.startup.opening import DEMO


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models, in which the test runs; nothing is downloaded from anywhere."""
    for name in ("Qwen3-8B-converted", "llama"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    (tmp_path / "tiny-Q4_K_M.gguf").touch()
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(model: str) -> str:
    """Return what is said of a model that is not there."""
    with pytest.raises(ModelError) as caught:
        find_alone(model)
    return str(caught.value)


def test_paths_come_before_names(models: Path) -> None:
    (models / "org" / "model").mkdir(parents=True)
    (models / "qwen3-8b").mkdir()
    for path in ("org/model", "qwen3-8b", "llama", "./llama", str(models / "tiny-Q4_K_M.gguf")):
        assert find_alone(path) == Path(path)
    assert find_alone("demo") == DEMO
    assert str(find_alone("random:tiny:2")) == "random:tiny:2"


def test_what_would_be_understood_is_said(models: Path) -> None:
    said = refusal("./lama")
    assert said.startswith(
        "./lama: no such model directory or file; give a folder with config.json and *.safetensors, "
    )
    assert "a .gguf file, a .m file of Distributed Llama, or a model of the hub as ORG/NAME" in said
    assert said.endswith("(did you mean llama?)")


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("qwen3-8b-convert", "Qwen3-8B-converted"),
        ("tiny-Q4_K.gguf", "tiny-Q4_K_M.gguf"),
        ("llama3_2_1b_instruct", "llama3_2_1b_instruct_q40"),
        ("demp", "demo"),
    ],
)
def test_the_nearest_is_offered(models: Path, model: str, near: str) -> None:
    assert refusal(model).endswith(f"(did you mean {near}?)")


def test_nothing_is_offered_that_is_far(models: Path) -> None:
    assert "did you mean" not in refusal("xyzzy")
    assert "did you mean" not in refusal("note")  # a folder without a model


def test_names_by_their_form() -> None:
    assert is_named("org/name:Q4_K_M")
    assert is_named("qwen3_8b_q40")
    assert not any(map(is_named, ("demo", "random:tiny", "./org/name", "/org/name", "name")))
    assert nearest_name("qwen3-9b") == "qwen3-8b"


def test_a_model_on_this_disk_is_taken_without_asking(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "hub_folder", lambda: models / "hub")
    stored = local.Stored.of("org/name")
    snapshot = stored.snapshot("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "x-Q8_0.gguf").write_bytes(b"x")
    stored.keep("0" * 40)
    assert find_alone("org/name:Q8_0") == find_alone("org/name", quiet=True) == snapshot / "x-Q8_0.gguf"
