"""Converted directories load to the same numbers, and a conversion that fails leaves nothing that looks whole."""

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

import numpy as np
import pytest
from safetensors import safe_open

from dllama_mpi.architectures.registry import read_config, read_model_config
from dllama_mpi.engine.llm import LLM
from dllama_mpi.errors import DllamaError, ModelError, UsageError
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.build import load
from dllama_mpi.model.recipe import WeightRecipe, slice_parts, whole_parts
from dllama_mpi.model.tensors import TABLE, Kind
from dllama_mpi.model.tensors import tensors as table
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.startup.opening import model_config, open_folder, open_model
from dllama_mpi.startup.shares import shards_of
from dllama_mpi.weights import convert as module
from dllama_mpi.weights.checkpoint import Checkpoint, name_of
from dllama_mpi.weights.convert import Conversion, convert
from dllama_mpi.weights.source import TileTensor, WeightSource
from dllama_mpi.weights.tiles import TileMatrix, load_matrix
from tests.tiny_models import CASES, load_reference, tensor_specs, tensors, write_model, write_safetensors

SHAPES = ("llama32_tied", "qwen3_bf16", "qwen2", "llama_bias", "llama_f16", "llama_heads6", "deepseek_distill_like")
Files = dict[str, bytes]


def convert_folder(source: Path, destination: Path, weights: str) -> None:
    """Convert on one rank."""
    opened = open_model(str(source), check=False)
    formats = WeightRecipe.parse(weights).formats(opened.config)
    conversion = Conversion(opened.whole, formats, whole_parts(opened.config), show_progress=True)
    convert(conversion, destination, TensorParallelGroup(None))


def run(source: Path, destination: Path, weights: str) -> Path:
    """Convert on one rank and return the new directory."""
    convert_folder(source, destination, weights)
    return destination


def shapes(folder: Path, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors of a kind."""
    return {spec.name: spec.shape for spec in table(model_config(str(folder))) if spec.kind is kind}


def opened(folder: Path) -> WeightSource:
    """Return a model directory's weights."""
    return open_folder(folder, model_config(str(folder))).whole


def contents(folder: Path) -> Files:
    """Return the bytes of every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def without_lineage(folder: Path) -> dict[str, Any]:
    """Return a directory's contents; in place of model.safetensors its header, but for the lineage, and its data."""
    files: dict[str, Any] = contents(folder)
    data = files.pop("model.safetensors")
    start, entries = header(folder / "model.safetensors")
    del entries["__metadata__"]["dllama_mpi.lineage"]
    return {**files, "header": entries, "data": data[start:]}


def logits(folder: Path, weights: str | None, tokens: list[int]) -> np.ndarray:
    """Return the logits after each token."""
    model = LLM(str(folder), group=TensorParallelGroup(None), weights=weights, nthreads=1)
    found = model.logits(tokens)
    assert found is not None
    return found


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where a safetensors file's data begins, and its header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with sizes that are no multiples of a tile's, an odd number of tiles, and the files beside it."""
    folder = write_model(CASES["llama_heads6"], tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "LICENSE-MODEL.txt"):
        (folder / name).write_text(f"contents of {name}\n")
    (folder / "pytorch_model.bin").write_bytes(b"of no use here")
    return folder


# ---- what is written


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_and_shapes_are_those_of_the_checkpoint(case: Any) -> None:
    expected = tensor_specs(case.config)
    found = {spec.name: spec.shape for spec in table(read_model_config(case.config))}
    assert found == {**expected, "lm_head.weight": expected[TABLE]}


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_quantising_while_loading(name: str, weights: str, tmp_path: Path) -> None:
    case, reference = CASES[name], load_reference(CASES[name])
    folder = write_model(case, tmp_path / "source")
    tokens = reference.tokens[:12].tolist()
    converted = run(folder, tmp_path / "new", weights)
    assert name_of(Checkpoint(converted).formats) == weights
    np.testing.assert_array_equal(logits(converted, None, tokens), logits(folder, weights, tokens))


def test_f32_of_an_f32_source_equals_the_reference(tmp_path: Path) -> None:
    reference = load_reference(CASES["llama_heads6"])
    converted = run(write_model(CASES["llama_heads6"], tmp_path / "source"), tmp_path / "new", "f32")
    found = logits(converted, None, reference.tokens.tolist())
    np.testing.assert_allclose(found, reference.logits, rtol=0, atol=2e-5 * np.abs(reference.logits).max())


def test_f32_tiles_hold_the_source_exactly(source: Path, tmp_path: Path) -> None:
    old, new = dict(tensors(CASES["llama_heads6"])), Checkpoint(run(source, tmp_path / "new", "f32"))
    for name, (rows, cols) in shapes(source, Kind.MATRIX).items():
        matrix = TileMatrix(new[name].data[None], np.zeros((1, 0), np.float32), rows, cols, FORMATS["f32"])
        np.testing.assert_array_equal(matrix.to_float32(), old[name])


@pytest.mark.parametrize("weights", FORMATS)
def test_file_is_good_safetensors_and_tiles_are_aligned(weights: str, source: Path, tmp_path: Path) -> None:
    path = run(source, tmp_path / "new", weights) / "model.safetensors"
    start, entries = header(path)
    assert start % 64 == 0
    metadata = entries.pop("__metadata__")
    lineage = f"{Checkpoint(source).fingerprint()}>{weights}"
    assert metadata == {"dllama_mpi.weights": weights, "dllama_mpi.layout": "1", "dllama_mpi.lineage": lineage}
    with safe_open(path, framework="numpy") as opened:
        assert sorted(opened.keys()) == sorted(entries)
        for name, shape in shapes(source, Kind.MATRIX).items():
            tiles = opened.get_tensor(name)
            assert tiles.dtype == np.uint8
            assert tiles.shape == FORMATS[weights].shape(*shape)
            assert (start + entries[name]["data_offsets"][0]) % 64 == 0
    assert any(name.startswith("padding.") for name in entries) == FORMATS[weights].quantised_activations
    for name in shapes(source, Kind.MATRIX):
        assert (f"{name}.row_scales" in entries) == FORMATS[weights].has_row_scales


@pytest.mark.parametrize("name", ["llama32_tied", "llama_f16", "llama_bias"])
def test_what_is_not_a_matrix_stays_as_it_is(name: str, tmp_path: Path) -> None:
    folder = write_model(CASES[name], tmp_path / "source")
    old, new = Checkpoint(folder), Checkpoint(run(folder, tmp_path / "new", "q40"))
    assert new[TABLE].dtype == old[TABLE].dtype == CASES[name].dtype
    np.testing.assert_array_equal(new[TABLE].data, old[TABLE].data)
    for tensor, shape in shapes(folder, Kind.VECTOR).items():
        whole = tuple((0, size) for size in shape)
        assert new[tensor].dtype == "F32"
        np.testing.assert_array_equal(new[tensor].values(whole), old[tensor].values(whole))


def test_files_beside_the_weights_are_copied(source: Path, tmp_path: Path) -> None:
    old, new = contents(source), contents(run(source, tmp_path / "new", "q40"))
    assert set(old) - set(new) == {"pytorch_model.bin"}
    assert {name: data for name, data in new.items() if name != "model.safetensors"} == {
        name: data for name, data in old.items() if name not in ("model.safetensors", "pytorch_model.bin")
    }


def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(CASES["llama_heads6"], tmp_path / "source")
    whole = run(folder, tmp_path / "whole", "q80")
    monkeypatch.setattr(module, "_FILE_BYTES", 40_000)
    monkeypatch.setattr(module, "PIECE_BYTES", 16 * 144 * 4)
    cut = run(folder, tmp_path / "cut", "q80")
    paths = sorted(cut.glob("*.safetensors"))
    assert len(paths) > 3
    assert [path.name for path in paths] == [
        f"model-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, 1 + len(paths))
    ]
    for path in paths:
        assert path.stat().st_size < 45_000 or len(header(path)[1]) == 2  # the metadata and one large tensor
    index = json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]
    assert {(cut / name) for name in index.values()} == set(paths)
    one, many = Checkpoint(whole), Checkpoint(cut)
    for name in (spec.name for spec in table(model_config(str(folder)))):
        assert name in header(cut / index[name])[1]
        np.testing.assert_array_equal(one[name].data, many[name].data)


def test_tied_table_may_be_called_lm_head(tmp_path: Path) -> None:
    case = CASES["llama32_tied"]
    folder = write_model(case, tmp_path / "source")
    expected = without_lineage(run(folder, tmp_path / "new", "q40"))
    values = dict(tensors(case))
    values["lm_head.weight"] = values.pop(TABLE)
    write_safetensors(folder / "model.safetensors", values, case.dtype)
    assert without_lineage(run(folder, tmp_path / "other", "q40")) == expected


@pytest.mark.parametrize(
    ("name", "first"), [(n, f) for n in ("qwen3_bf16", "llama_f16") for f in ("q40", "f16", "f32")]
)
def test_converting_again_gives_the_same_bytes(name: str, first: str, tmp_path: Path) -> None:
    folder = write_model(CASES[name], tmp_path / "source")
    again = run(run(folder, tmp_path / first, first), tmp_path / "again", "q40")
    assert without_lineage(again) == without_lineage(run(folder, tmp_path / "direct", "q40"))


@pytest.mark.parametrize("recipe", ["q4m,lm_head=q80", "q80,down=q4m,attention=f16", "mxfp4,v=f32"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mixed_formats_are_those_of_quantising_while_loading(recipe: str, ranks: int, tmp_path: Path) -> None:
    folder = write_model(CASES["llama_heads6"], tmp_path / "source")
    converted, config = run(folder, tmp_path / "new", recipe), model_config(str(folder))
    formats = WeightRecipe.parse(recipe).formats(config)
    held = open_model(str(converted)).formats(None)
    assert held == formats
    for shard in shards_of(config, [1.0] * ranks):
        old, new = (load(opened(each), config, shard, formats) for each in (folder, converted))
        assert old.held.keys() == new.held.keys() == slice_parts(config, shard).keys() - {TABLE}
        for name, tensor in old.held.items():
            other = new.held[name]
            if isinstance(tensor, TileMatrix):
                assert isinstance(other, TileMatrix)
                np.testing.assert_array_equal(tensor.tiles, other.tiles)
                np.testing.assert_array_equal(tensor.row_scales, other.row_scales)
            else:
                np.testing.assert_array_equal(tensor, np.asarray(other))
    assert all(isinstance(opened(converted)[name], TileTensor) for name in formats)


def test_nothing_is_printed_without_a_terminal(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "new", "q40")
    assert capfd.readouterr() == ("", "")


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
from tests.unit.test_convert import run

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
