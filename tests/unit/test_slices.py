"""A slice file gives what the whole model gives, of the parts it holds; damage is found; another part is refused."""

from __future__ import annotations

import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dllama_mpi.errors import ModelError
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.config import ModelConfig
from dllama_mpi.model.context import Context
from dllama_mpi.model.names import slice_parts, vector_shapes
from dllama_mpi.model.transformer import Transformer
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.parallel.partition import Shard, shards
from dllama_mpi.weights import slices as module
from dllama_mpi.weights.checkpoint import Checkpoint
from dllama_mpi.weights.files import TABLE, Entry, File, Part
from dllama_mpi.weights.slices import (
    CHECKSUMS,
    DamagedSlice,
    Recipe,
    SliceCheckpoint,
    SliceInMemory,
    SliceReader,
    slices_in,
)
from dllama_mpi.weights.tiles import TileMatrix, load_matrix, load_vector
from tests.tiny_models import CASES, write_model

SPLITS = ((1.0,), (1.0, 5.0, 2.0))


def cut(config: ModelConfig, split: tuple[float, ...]) -> list[Shard]:
    """Return the shards of a model."""
    return shards(config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size, split)


def write(source: Checkpoint, recipe: Recipe, file: File, path: Path) -> SliceCheckpoint:
    """Write a slice file and open it."""
    reader = SliceReader(source, recipe.format, file)
    with path.open("wb") as out:
        out.write(file.header)
        for index in range(len(file.entries)):
            for _, _, data in reader.read(index):
                out.write(data.tobytes())
    assert path.stat().st_size == file.size
    return SliceCheckpoint(path)


def receive(source: Checkpoint, recipe: Recipe, file: File) -> Checkpoint:
    """Return a slice in memory."""
    sink, reader = SliceInMemory(file, recipe), SliceReader(source, recipe.format, file)
    for index in range(len(file.entries)):
        for entry, start, data in reader.read(index):
            sink.write(entry, start, data)
    return sink.finish()


def held(value: Any) -> list[np.ndarray]:
    """Return every array of weights in a model, in the order in which its parts were made."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, TileMatrix):
        return [value.tiles]
    if isinstance(value, list):
        return [array for each in value for array in held(each)]
    if type(value).__module__.startswith("dllama_mpi.model") and not isinstance(value, (ModelConfig, Context)):
        kept = {k: v for k, v in vars(value).items() if "matrices" not in k}  # addresses of the tiles
        return [array for each in kept.values() for array in held(each)]
    return []


class Made:
    """A model and slices of it: 3 ranks, the second one's."""

    def __init__(self, folder: Path, case: str = "llama3_gqa", weights: str = "q40") -> None:
        write_model(CASES[case], folder / "model")
        self.config, self.source = ModelConfig.load(folder / "model"), Checkpoint(folder / "model")
        self.recipe = Recipe.of(self.source, FORMATS[weights], vector_shapes(self.config))
        self.parts = slice_parts(self.config, cut(self.config, (1.0, 5.0, 2.0))[1])
        self.file = self.recipe.file(self.parts, "rank 1 of 3")
        self.path = folder / "slice.safetensors"

    def write(self) -> SliceCheckpoint:
        """Write the file and open it."""
        return write(self.source, self.recipe, self.file, self.path)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Return a small model."""
    return Made(tmp_path)


# ---- what is held


@pytest.mark.parametrize(("case", "weights"), [*((case, "q40") for case in CASES), ("qwen2", "f16"), ("qwen2", "f32")])
def test_a_model_loads_the_same_from_its_slice(case: str, weights: str, tmp_path: Path) -> None:
    """The slice holds exactly what the layers ask for, whatever the architecture and the split."""
    source, config = Checkpoint(write_model(CASES[case], tmp_path)), ModelConfig.load(tmp_path)
    recipe = Recipe.of(source, FORMATS[weights], vector_shapes(config))
    for split in SPLITS:
        for rank, shard in enumerate(cut(config, split)):
            context = Context(TensorParallelGroup(None), shard, FORMATS[weights], 1)
            expected = Transformer(source, config, context)
            file = recipe.file(slice_parts(config, shard), f"rank {rank}")
            for found in (write(source, recipe, file, tmp_path / "slice"), receive(source, recipe, file)):
                model = Transformer(found, config, context)
                pairs = list(zip(held(expected), held(model), strict=True))
                assert len(pairs) > 7 * config.num_layers
                assert all(np.array_equal(one, other) for one, other in pairs)
                rows = np.arange(config.vocab_size, dtype=np.int32)
                one, other = (np.zeros((len(rows), config.hidden_size), np.float32) for _ in range(2))
                expected.embedding(rows, one)
                model.embedding(rows, other)
                np.testing.assert_array_equal(one, other)


def test_pieces_make_the_same_file(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made.write()
    whole = made.path.read_bytes()
    monkeypatch.setattr(module, "STREAM_BYTES", 3000)
    many = [len(entry.pieces(3000)) for entry in made.file.entries if entry.name != CHECKSUMS]
    assert max(many) > 3
    made.write()
    assert made.path.read_bytes() == whole


def test_a_slice_is_a_good_safetensors_file(made: Made) -> None:
    made.write()
    found = load_file(made.path) if CASES["llama3_gqa"].dtype != "BF16" else {}
    if found:
        np.testing.assert_array_equal(found[TABLE], made.source[TABLE].data.view(found[TABLE].dtype))
    assert made.path.stat().st_size < (made.source.folder / "model.safetensors").stat().st_size


def test_little_memory_is_taken_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path, "llama3_gqa", "f32")
    monkeypatch.setattr(module, "STREAM_BYTES", 1 << 14)
    reader, largest = SliceReader(made.source, made.recipe.format, made.file), 0
    list(reader.read(0))
    tracemalloc.start()
    try:
        for index in range(1, len(made.file.entries)):
            for _, _, data in reader.read(index):
                largest = max(largest, len(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest <= 1 << 15
    assert peak < made.file.size / 2


# ---- keys


def test_key_names_source_format_and_parts(made: Made, tmp_path: Path) -> None:
    other = Made(tmp_path / "other", "llama31")
    keys = {
        made.recipe.key(made.parts),
        made.recipe.key(slice_parts(made.config, cut(made.config, (1.0, 1.0))[1])),
        replace(made.recipe, format=FORMATS["q80"]).key(made.parts),
        replace(made.recipe, lineage=other.recipe.lineage).key(made.parts),
    }
    assert len(keys) == 4
    assert made.write().key == made.recipe.key(made.parts)
    same = replace(made.recipe, model="another name")
    assert same.key(made.parts) == made.recipe.key(made.parts)


def test_equal_parts_have_one_key_however_they_were_cut(made: Made) -> None:
    halves = [slice_parts(made.config, cut(made.config, split)[1]) for split in ((1.0, 1.0), (2.0, 2.0))]
    assert made.recipe.key(halves[0]) == made.recipe.key(halves[1])


def test_lineage(made: Made) -> None:
    fingerprint = made.source.fingerprint()
    assert made.source.lineage(FORMATS["q40"]) == f"{fingerprint}>q40"
    found = made.write()
    assert found.lineage(FORMATS["q40"]) == f"{fingerprint}>q40"
    assert found.lineage(FORMATS["q80"]) == f"{fingerprint}>q40>q80"


# ---- what is refused


def test_other_parts_are_refused(made: Made) -> None:
    found = made.write()
    name = "model.layers.0.self_attn.q_proj.weight"
    part = made.parts[name]
    shape, (rows, cols) = (part.shape[0], part.shape[1]), part.ranges
    assert load_matrix(found, name, shape, rows, cols, FORMATS["q40"]).rows == rows[1] - rows[0]
    with pytest.raises(ModelError) as caught:
        load_matrix(found, name, shape, (0, rows[1]), cols, FORMATS["q40"])
    assert str(caught.value) == (
        f"{made.path} holds {rows[0]}..{rows[1]} x 0..{cols[1]} of {name}, and 0..{rows[1]} x 0..{cols[1]} is needed;"
        " give a slice made for this number of ranks and this --split, or the whole model"
    )
    with pytest.raises(ModelError, match="holds tiles of another format than q80"):
        load_matrix(found, name, shape, rows, cols, FORMATS["q80"])
    with pytest.raises(ModelError, match=r"config\.json implies"):
        load_matrix(found, name, (shape[0] + 16, shape[1]), rows, cols, FORMATS["q40"])
    norm = "model.norm.weight"
    size = made.parts[norm].shape[0]
    assert load_vector(found, norm, size).shape == (size,)
    with pytest.raises(ModelError, match=rf"holds 0\.\.{size} of {norm}, and 1\.\.{size} is needed"):
        load_vector(found, norm, size, (1, size))


@pytest.mark.parametrize("where", ["matrix", "vector", "table", "checksums", "header", "end"])
def test_damage_is_found(where: str, made: Made) -> None:
    made.write()
    data = bytearray(made.path.read_bytes())
    name = {"matrix": "model.layers.1.mlp.down_proj.weight", "vector": "model.norm.weight", "table": TABLE}.get(where)
    start = len(made.file.header)
    for entry in made.file.entries:
        if entry.name in (name, CHECKSUMS):
            break
        start += entry.size
    at = {"header": data.index(b"rank 1 of 3"), "checksums": start, "end": 0}.get(where, start + 37)
    data[at] ^= where != "end"
    made.path.write_bytes(data[:-1] if where == "end" else data)
    if where in ("checksums", "header", "end"):
        with pytest.raises(DamagedSlice, match=r"damaged in its header|truncated or corrupt"):
            SliceCheckpoint(made.path)
        return
    found = SliceCheckpoint(made.path)
    with pytest.raises(DamagedSlice, match=f"is damaged in {name}"):
        take(found, made, name or "")
    other = "model.layers.0.input_layernorm.weight"
    np.testing.assert_array_equal(take(found, made, other), take(made.source, made, other))  # the rest can be read
    np.testing.assert_array_equal(found[TABLE].rows(20, 21), made.source[TABLE].rows(20, 21))


def take(source: Checkpoint, made: Made, name: str) -> np.ndarray:
    """Return what a rank loads of a tensor; of the table one row."""
    if name == TABLE:
        return source[TABLE].rows(0, 1)
    part = made.parts[name]
    if len(part.shape) == 1:
        return load_vector(source, name, part.shape[0], part.ranges[0])
    shape = (part.shape[0], part.shape[1])
    return load_matrix(source, name, shape, part.ranges[0], part.ranges[1], FORMATS["q40"]).tiles


def test_every_bit_of_a_slice_is_under_a_checksum(made: Made) -> None:
    """CRC-32 finds any single wrong bit; here, that no byte of the file is left out."""
    found = made.write()
    data, sums = made.path.read_bytes(), [zlib.crc32(made.file.header)]
    start = len(made.file.header)
    for entry in made.file.entries[:-1]:
        unit = entry.unit or max(entry.size, 1)
        ends = range(start, start + max(entry.size, 1), unit)
        sums += [zlib.crc32(data[first : min(first + unit, start + entry.size)]) for first in ends]
        start += entry.size
    np.testing.assert_array_equal(sums, found._sums)


def test_files_that_are_no_slices(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no slice of a model; write one with convert --only"):
        SliceCheckpoint(made.source.folder / "model.safetensors")
    assert slices_in(tmp_path) == []
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


def test_parts_say_what_they_are() -> None:
    assert str(Part((64, 96), ((16, 32), (0, 96)))) == "16..32 x 0..96"
    assert Part.whole(3, 4) == Part((3, 4), ((0, 3), (0, 4)))
    assert Entry("a", "a", "U8", (0, 3, 288), Part((64, 96), ((5, 5), (0, 96)))).pieces(1000) == []
