"""Random weights at named shapes: the right sizes, sane values, the same whatever the cut."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi import LLM, SamplingParams
from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.errors import UsageError
from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS, TileFormat
from dllama_mpi.model.build import check_files
from dllama_mpi.model.config import AttentionConfig, DeltaNetConfig, ExpertsConfig, MLPConfig
from dllama_mpi.model.recipe import parameters
from dllama_mpi.model.shapes import SHAPES, shape_config
from dllama_mpi.planning.bench import Bench, Test, combine
from dllama_mpi.startup.opening import open_model
from dllama_mpi.weights.tiles import load_matrix, load_vector

PUBLISHED = {  # parameters as the models' cards give them, in billions
    "tinyllama-1.1b": 1.10,
    "llama3.2-1b": 1.24,
    "llama3.2-3b": 3.21,
    "llama3.1-8b": 8.03,
    "qwen3-0.6b": 0.60,
    "qwen3-4b": 4.02,
    "qwen2.5-7b": 7.62,
    "mistral-7b": 7.25,
    "qwen3-30b-a3b": 30.53,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_models(name: str) -> None:
    config = read_model_config(shape_config(name))
    if name in PUBLISHED:
        assert parameters(config) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)
    assert config.hidden_size % BLOCK == config.vocab_size % ROWS == 0
    for layer in config.layers:
        feed = layer.feed.expert if isinstance(layer.feed, ExpertsConfig) else layer.feed
        assert isinstance(feed, MLPConfig)
        sizes = [feed.intermediate_size]
        if isinstance(layer.mixer, AttentionConfig):
            sizes.append(layer.mixer.num_heads * layer.mixer.head_dim)
            assert layer.mixer.head_dim % ROWS == 0
        elif isinstance(layer.mixer, DeltaNetConfig):
            sizes += [
                layer.mixer.num_key_heads * layer.mixer.key_dim,
                layer.mixer.num_value_heads * layer.mixer.value_dim,
            ]
        assert all(size % BLOCK == 0 for size in sizes)  # so that no tile has padding


def test_unknown_shape() -> None:
    with pytest.raises(UsageError, match="'llama9' is not a shape known here; known are tiny, "):
        open_model("random:llama9")


def test_the_source_fits_the_config() -> None:
    lineages = set()
    for name in ("tiny", "qwen3-0.6b", "qwen2.5-7b", "qwen3-30b-a3b"):
        files = open_model(f"random:{name}")
        source, formats = files.whole, files.formats(None)
        check_files(source, files.config)
        assert ("lm_head.weight" in source) is not files.config.tie_word_embeddings
        assert source.lineage(formats) == open_model(f"random:{name}").whole.lineage(formats)
        lineages.add(source.lineage(formats))
    assert len(lineages) == 4


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_values_are_sane_and_the_same_in_any_cut(fmt: TileFormat) -> None:
    source = open_model("random:tiny").whole
    tensor, shape = source["model.layers.1.mlp.down_proj.weight"], (256, 768)
    whole = load_matrix(tensor, shape, ((0, 256), (0, 768)), fmt)
    assert whole.tiles.shape == (1, *fmt.shape(*shape))
    assert whole.tiles.ctypes.data % 64 == 0
    values = whole.to_float32()
    assert np.isfinite(values).all()
    assert 0.015 < values.std() < 0.025
    part = load_matrix(tensor, shape, ((32, 80), (96, 320)), fmt)
    np.testing.assert_array_equal(part.to_float32(), values[32:80, 96:320])
    other = load_matrix(source["model.layers.0.mlp.down_proj.weight"], shape, ((0, 256), (0, 768)), fmt)
    assert not np.array_equal(other.tiles, whole.tiles)


@pytest.mark.parametrize("fmt", ["q40", "q4m"])
def test_experts_are_the_same_in_any_cut(fmt: str) -> None:
    source, name = open_model("random:qwen3-30b-a3b:1").whole, "model.layers.0.mlp.experts.up_proj.weight"
    shape = (128, 768, 2048)
    some = load_matrix(source[name], shape, ((3, 6), (0, 768), (0, 2048)), FORMATS[fmt])
    part = load_matrix(source[name], shape, ((4, 6), (32, 80), (96, 320)), FORMATS[fmt])
    for i in range(2):
        np.testing.assert_array_equal(part.to_float32(i), some.to_float32(i + 1)[32:80, 96:320])
        assert 0.015 < some.to_float32(i).std() < 0.025
        assert not np.array_equal(some.tiles[i], some.tiles[i + 1])


def test_vectors_and_table() -> None:
    source = open_model("random:tiny").whole
    np.testing.assert_array_equal(load_vector(source["model.norm.weight"], (256,), ((0, 256),)), np.ones(256))
    table = source["model.embed_tokens.weight"]
    assert table.shape == table.data.shape == (2048, 256)
    rows = [table.values(((i, i + 1), (0, 256)))[0] for i in (0, 7, 2047)]
    assert all(0.01 < row.std() < 0.03 for row in rows)
    assert not np.array_equal(rows[0], rows[1])
    again = open_model("random:tiny").whole["model.embed_tokens.weight"]
    np.testing.assert_array_equal(rows[1], again.values(((7, 8), (0, 256)))[0])


def test_names_and_sizes_of_tests() -> None:
    assert [test.name for test in combine([512, 0], [128], [(64, 8)], [0, 4000], [1, 8])] == [
        "pp512", "tg128", "pp64+tg8", "pp512 x8", "tg128 x8", "pp64+tg8 x8",
        "pp512 @ d4000", "tg128 @ d4000", "pp64+tg8 @ d4000",
        "pp512 x8 @ d4000", "tg128 x8 @ d4000", "pp64+tg8 x8 @ d4000",
    ]  # fmt: skip
    assert Test(512, 128, 100, 8).tokens == 8 * 640
    assert Test(512, 128, 100, 8).positions == 741
    with pytest.raises(UsageError, match="nothing to measure"):
        combine([0], [0], [], [0], [1])


@pytest.mark.parametrize("test", [Test(20, 0), Test(0, 5), Test(20, 5, 30, 2), Test(0, 5, 40, 2), Test(7, 0, 40)])
def test_a_sample_is_the_steps_it_should_be(test: Test) -> None:
    """What is in the cache is not fed again, what is not is, and all sequences go in step."""
    llm = LLM("random:tiny", nthreads=1, max_batch=2, max_seq_len=test.positions, prefill_chunk=64)
    bench = Bench(llm)
    result = bench.run(test, 3, readings=0)
    assert result is not None
    for sample in result.samples:
        fed = [step.tokens for step in sample.steps]
        assert fed == [test.batch * test.prompt] * (test.prompt > 0) + [test.batch] * test.generated
    lengths = [test.depth + test.prompt + 1 + i for i in range(test.generated)]
    position = 2 * 4 * 4 * 32 * 2  # keys and values, layers, KV heads, head_dim, bytes
    assert result.kv_bytes == position * sum(lengths) * test.batch
    assert bench.record(result)["share_of_limit"] is None  # the limit was not measured


def test_a_random_model_generates() -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    first, second = (LLM("random:tiny", max_seq_len=64).generate([1, 2, 3], params) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == 4
