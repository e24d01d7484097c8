"""A rank's buffers: what is predicted of them, and the memory of caches and states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dllama_mpi.model.buffers import HEAD_ROWS, KV_TYPES, Buffers, Maker, Sizes, memory_bytes
from dllama_mpi.model.config import (
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    ShortConvConfig,
)
from dllama_mpi.model.recipe import WeightRecipe
from dllama_mpi.model.rope import RopeConfig
from dllama_mpi.model.tensors import axes
from dllama_mpi.parallel.partition import Shard, shards

ROPE = RopeConfig("default", 20, 1e4)
ATTENTION = AttentionConfig(6, 3, 40, ROPE, 1.0, gate=True)
EXPERTS = ExpertsConfig(MLPConfig(100), 5, 2, shared=MLPConfig(40), shared_gate=True)
MIXERS = {"attention": ATTENTION, "delta net": DeltaNetConfig(3, 6, 16, 24, 4), "short convolution": ShortConvConfig(3)}
FEEDS = {"dense": MLPConfig(100), "experts": EXPERTS}
MIXED = tuple(LayerConfig(mixer, feed) for mixer in MIXERS.values() for feed in FEEDS.values() for _ in range(2))

every_kv_type = pytest.mark.parametrize("kv_type", KV_TYPES)


def config(*layers: LayerConfig) -> ModelConfig:
    """Return a model of these layers."""
    return ModelConfig("any", 70, 72, 64, 1e-6, False, layers)


def buffers(model: ModelConfig, recipe: str = "q40", sizes: Sizes | None = None) -> Iterator[Buffers]:
    """Yield the buffers of each of three unlike ranks."""
    for shard in shards(axes(model), [1, 3, 2]):
        formats = WeightRecipe.parse(recipe).formats(model)
        yield Buffers(model, shard, formats, sizes or Sizes(9, 2, 3, "f16"))


def arrays(value: Any) -> Iterator[np.ndarray]:
    """Yield every array in tuples of tuples."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from arrays(each)


@every_kv_type
@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("name", MIXERS)
def test_memory_begins_as_zeros_where_vector_loads_need_it(name: str, pages: int, kv_type: str) -> None:
    model = config(LayerConfig(MIXERS[name], MLPConfig(64)))
    for own in buffers(model, sizes=Sizes(4, 3, pages, kv_type)):
        for array in arrays(own.memory(own.runs[0], Maker())):
            if array.size:  # scales of what is not quantised are empty
                assert array.ctypes.data % 64 == 0
                assert array.flags.c_contiguous
                assert not array.any()
                begins = (pages,) if name == "attention" else (1, 3)  # of all layers; layers and slots
                assert array.shape[: len(begins)] == begins


@every_kv_type
@pytest.mark.parametrize("recipe", ["q40", "f32", "f16,lm_head=q80", "q40,down=f16,expert_down=f32,o=f32"])
def test_predicted_bytes_are_those_that_are_taken(recipe: str, kv_type: str) -> None:
    model = config(*MIXED)
    for own in buffers(model, recipe, Sizes(9, 2, 3, kv_type)):
        make = Maker()
        hidden = own.hidden(make)
        made = [own.residual(make), own.logits(make), *arrays(hidden)]
        for run in own.distinct():
            made += [array for part in own.scratch(run, hidden, make)[1:] for array in arrays(part)]
        assert own.scratch_bytes() == sum(array.nbytes for array in made)
        held = [array for run in own.runs for array in arrays(own.memory(run, make))]
        assert own.memory_bytes() == sum(array.nbytes for array in held)


def test_equal_layers_share_their_buffers() -> None:
    once, twice = (config(*layers) for layers in (MIXED, MIXED + MIXED))
    for one, other in zip(buffers(once), buffers(twice), strict=True):
        assert one.scratch_bytes() == other.scratch_bytes()
        assert 2 * one.memory_bytes() == other.memory_bytes()
        assert len(one.runs) == len(list(one.distinct())) == len(MIXED) // 2


@every_kv_type
def test_bytes_of_a_position(kv_type: str) -> None:
    """A sequence takes what it takes whatever its length, and as much again for each position."""
    model = config(*MIXED)
    for shard in shards(axes(model), [1, 3, 2]):
        once, each = memory_bytes(model, shard, kv_type)
        formats = WeightRecipe.parse("q40").formats(model)
        for slots, pages in ((1, 1), (3, 5), (2, 8)):
            own = Buffers(model, shard, formats, Sizes(1, slots, pages, kv_type))
            assert own.memory_bytes() == slots * once + 256 * pages * each
        assert once > 0
        assert each == 4 * position_bytes(shard, kv_type)  # of the layers with attention


def position_bytes(shard: Shard, kv_type: str) -> int:
    """Return the bytes of one position of one layer of `ATTENTION` on a rank."""
    first, last = shard.units(next(axis for axis in shard.ranges if axis.name == "kv_heads"))
    width, rows = 64, 48  # of 40 dimensions, keys take whole blocks and values whole tiles
    element = {"f16": 2, "f32": 4, "q80": 1}[kv_type]
    scales = 2 * 2 * (width // 32) if kv_type == "q80" else 0
    return (last - first) * ((width + rows) * element + scales)


def test_inputs_are_quantised_where_a_matrix_wants_it() -> None:
    model = config(LayerConfig(ATTENTION, MLPConfig(100)))
    for recipe, quantised in (("f32", False), ("q40", True), ("f16,q=q80", True), ("f16,lm_head=q40", True)):
        for own in buffers(model, recipe):
            hidden = own.hidden(Maker())
            assert bool(hidden.codes.size) is quantised
            assert hidden.values.shape == (HEAD_ROWS, 96)
    for recipe, quantised in (("q40,down=f16", False), ("f16,down=q40", True)):
        for own in buffers(model, recipe):
            scratch = own.scratch(own.runs[0], own.hidden(Maker()), Maker())
            assert bool(scratch.feed.inner.codes.size) is quantised
