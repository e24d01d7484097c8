"""Random weights at named shapes: the right sizes, sane values, the same whatever the cut."""

from __future__ import annotations

import numpy as np
import pytest

from dllama_mpi import LLM, SamplingParams
from dllama_mpi.errors import UsageError
from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS
from dllama_mpi.model.config import ModelConfig
from dllama_mpi.model.names import check_files
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
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_models(name: str) -> None:
    config = ModelConfig.from_hf(shape_config(name))
    if name in PUBLISHED:
        assert config.parameters / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)
    for size in (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim):
        assert size % BLOCK == 0  # so that no tile has padding
    assert config.head_dim % ROWS == config.vocab_size % ROWS == 0


def test_unknown_shape() -> None:
    with pytest.raises(UsageError, match="'llama9' is not a shape known here; known are tiny, "):
        open_model("random:llama9")


def test_the_source_fits_the_config() -> None:
    for name in ("tiny", "qwen3-0.6b", "qwen2.5-7b"):
        _, config, source = open_model(f"random:{name}")
        check_files(source, config)
        assert ("lm_head.weight" in source) is not config.tie_word_embeddings
        assert source.fingerprint() == open_model(f"random:{name}")[2].fingerprint()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_values_are_sane_and_the_same_in_any_cut(fmt) -> None:
    _, _, source = open_model("random:tiny")
    name, shape = "model.layers.1.mlp.down_proj.weight", (256, 768)
    whole = load_matrix(source, name, shape, (0, 256), (0, 768), fmt)
    assert whole.tiles.shape == fmt.shape(*shape)
    assert whole.tiles.ctypes.data % 64 == 0
    values = whole.to_float32()
    assert np.isfinite(values).all()
    assert 0.015 < values.std() < 0.025
    part = load_matrix(source, name, shape, (32, 80), (96, 320), fmt)
    np.testing.assert_array_equal(part.to_float32(), values[32:80, 96:320])
    other = load_matrix(source, "model.layers.0.mlp.down_proj.weight", shape, (0, 256), (0, 768), fmt)
    assert not np.array_equal(other.tiles, whole.tiles)


def test_vectors_and_table() -> None:
    _, _, source = open_model("random:tiny")
    np.testing.assert_array_equal(load_vector(source, "model.norm.weight", 256), np.ones(256))
    table = source["model.embed_tokens.weight"]
    assert table.data.shape == (2048, 256)
    rows = [table.rows(i, i + 1)[0] for i in (0, 7, 2047)]
    assert all(0.01 < row.std() < 0.03 for row in rows)
    assert not np.array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[1], open_model("random:tiny")[2]["model.embed_tokens.weight"].rows(7, 8)[0])


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
