"""Directories of quantised safetensors: every method's values, whole and cut, against plain numpy's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dllama_mpi.cli import main
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.recipe import slice_parts
from dllama_mpi.model.tensors import Kind, tensors
from dllama_mpi.startup.opening import ModelFiles, open_model
from dllama_mpi.startup.shares import shards_of
from dllama_mpi.weights.source import WeightSource
from dllama_mpi.weights.tiles import load_matrix
from tests.all_cases import ALL_CASES
from tests.one_rank import OneRank
from tests.quantised_files import VARIETIES, change_config, write_quantised
from tests.tiers import all_but

F32 = FORMATS["f32"]
MOST_ERROR = {"q40": 1e-12, "q4m": 8e-5, "q80": 6e-5}  # relative squared; of q4m as of Q4_K, see kernels/repack.py
ODD = "llama_heads6", "int8-zeros"  # columns that are no multiple of 32, and codes of 0 that are no values of 0
FEW = ("gptq", "gptq-zeros", "gptq-act-order", "awq", "packed-4-zeros", "int8", "fp8-block")
Write = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return what gives the directories of a case in a variety, each written once: quantised, and plain."""
    root = tmp_path_factory.mktemp("models")

    def write(name: str, variety: str) -> tuple[Path, Path]:
        folder = root / name / variety
        if not folder.exists():
            write_quantised(ALL_CASES[name], VARIETIES[variety], folder)
        return folder / "quantised", folder / "plain"

    return write


def whole(source: WeightSource, files: ModelFiles, name: str, fmt: str = "f32") -> np.ndarray:
    """Return the values of a matrix, or of all experts' matrices (experts, rows, cols), by way of a format."""
    spec = next(spec for spec in tensors(files.config) if spec.name == name)
    matrix = load_matrix(source[name], spec.shape, tuple((0, n) for n in spec.shape), FORMATS[fmt])
    return np.stack([matrix.to_float32(e) for e in range(spec.experts)]).reshape(spec.shape)


def matrices(files: ModelFiles) -> list[str]:
    """Return the names of the matrices that are quantised in the files."""
    held = files.formats(None)
    return [
        spec.name for spec in tensors(files.config) if spec.kind is Kind.MATRIX and held[spec.name].name in MOST_ERROR
    ]


@pytest.mark.parametrize(
    ("name", "variety"),
    all_but(
        [*(("llama31", variety) for variety in VARIETIES), ("phi3_longrope", "gptq-zeros"), ("qwen3_moe", "awq"), ODD],
        [ODD, *((name, variety) for name in ("llama31", "phi3_longrope", "qwen3_moe") for variety in VARIETIES)],
    ),
)
def test_values_are_those_stored(name: str, variety: str, written: Write) -> None:
    quantised, plain = (open_model(str(folder)) for folder in written(name, variety))
    found = matrices(quantised)
    assert len(found) == 7 * quantised.config.num_layers
    for matrix in found:
        expected = whole(plain.whole, plain, matrix)
        np.testing.assert_array_equal(whole(quantised.whole, quantised, matrix), expected)
        kept = quantised.formats(None)[matrix].name
        error = np.square(whole(quantised.whole, quantised, matrix, kept) - expected).sum()
        bound = 1e-12 if VARIETIES[variety].exact else MOST_ERROR[kept]
        assert error <= bound * np.square(expected).sum()
    kept = quantised.formats(None)["model.layers.0.self_attn.q_proj.weight"].name
    assert kept == VARIETIES[variety].kept


# Where groups end in the middle of a rank's part; llama_heads6 has rows and columns that are no multiples of a tile's.
CUT = [
    *((name, variety, ranks) for name in ("phi3_longrope", "qwen3_moe") for variety in VARIETIES for ranks in (2, 3)),
    *(("llama_heads6", variety, ranks) for variety in ("int8", "fp8-block-48", "packed-4") for ranks in (2, 3)),
]


@pytest.mark.parametrize(
    ("name", "variety", "ranks"),
    all_but(
        [
            *(("phi3_longrope", variety, 3) for variety in FEW),
            ("qwen3_moe", "gptq", 2),
            ("qwen3_moe", "awq", 3),
            ("llama_heads6", "packed-4", 2),
            ("llama_heads6", "fp8-block-48", 3),
        ],
        CUT,
    ),
)
def test_parts_are_those_of_the_whole(name: str, variety: str, ranks: int, written: Write) -> None:
    files = open_model(str(written(name, variety)[0]))
    held = files.formats(None)
    for shard in shards_of(files.config, [1.0] * ranks):
        parts = slice_parts(files.config, shard)
        for matrix in matrices(files):
            part, fmt = parts[matrix], held[matrix]
            made = load_matrix(files.whole[matrix], part.shape, part.ranges, fmt)
            expected = whole(files.whole, files, matrix, fmt.name)[tuple(slice(*r) for r in part.ranges)]
            got = np.stack([made.to_float32(e) for e in range(len(made.tiles))]).reshape(expected.shape)
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("name", "variety"),
    [ODD, ("llama_heads6", "fp8-block-48"), ("llama31", "gptq-act-order-zeros"), ("qwen3_moe", "gptq-8-zeros")],
)
def test_by_value_tiles_are_those_of_the_values(name: str, variety: str, written: Write) -> None:
    """To the bit, also beyond the columns that there are."""
    quantised, plain = (open_model(str(folder)) for folder in written(name, variety))
    for spec in tensors(plain.config):
        if quantised.formats(None).get(spec.name) is FORMATS["q80"]:
            ranges = tuple((0, n) for n in spec.shape)
            made, expected = (
                load_matrix(files.whole[spec.name], spec.shape, ranges, FORMATS["q80"]).tiles
                for files in (quantised, plain)
            )
            np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    ("name", "variety"),
    all_but(
        [("llama31", "gptq"), ("qwen3_moe", "awq"), ("qwen2", "packed-4-zeros"), ("phi3_longrope", "fp8-block")],
        [(name, variety) for name in ("llama31", "qwen2", "phi3_longrope", "qwen3_moe") for variety in FEW],
    ),
)
def test_logits_are_those_of_the_values(name: str, variety: str, written: Write) -> None:
    ids = np.random.default_rng(1).integers(0, 100, 40).tolist()
    quantised, plain = written(name, variety)
    made = [OneRank(path, weights="f32", nthreads=1, quiet=True).logits(ids) for path in (quantised, plain)]
    assert np.abs(made[1]).max() > 1
    np.testing.assert_allclose(made[0], made[1], atol=1e-4)
    kept = OneRank(quantised, nthreads=1, quiet=True).logits(ids)
    assert np.corrcoef(kept.ravel(), made[1].ravel())[0, 1] > 0.98


def test_weights_that_are_told_requantise(written: Write) -> None:
    files = open_model(str(written("llama31", "gptq")[0]))
    assert files.told(None) == "quantised: GPTQ, 4 bits, groups of 32, symmetric: kept as q40,lm_head=f16"
    assert "--weights q80: quantised is quantised already and is requantised, from " in files.told("q80")
    assert {fmt.name for fmt in files.formats("q80").values()} == {"q80"}


def test_symmetric_codes_stay_in_q4m(written: Write) -> None:
    quantised, plain = (open_model(str(folder)) for folder in written("llama31", "gptq"))
    name = "model.layers.0.mlp.down_proj.weight"
    expected = whole(plain.whole, plain, name)
    error = np.square(whole(quantised.whole, quantised, name, "q4m") - expected).sum()
    assert error <= MOST_ERROR["q4m"] * np.square(expected).sum()


@pytest.mark.parametrize(
    ("name", "variety"), [("llama31", "awq"), ("llama31", "gptq-act-order"), ("qwen3_moe", "gptq")]
)
def test_a_conversion_runs_alone(name: str, variety: str, written: Write, tmp_path: Path) -> None:
    source = written(name, variety)[0]
    assert main(["convert", str(source), str(tmp_path / "made")]) == 0
    ids = list(range(20))
    made = [OneRank(path, nthreads=1, quiet=True).logits(ids) for path in (source, tmp_path / "made")]
    np.testing.assert_array_equal(made[0], made[1])


def test_info_tells_what_is_stored(written: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(written("llama31", "awq")[0])]) == 0
    out = capsys.readouterr().out
    assert "AWQ (gemm), 4 bits, groups of 32, with zero-points" in out
    assert "q4m,lm_head=f16" in out


def test_fused_experts_in_float8(written: Write) -> None:
    quantised, plain = (open_model(str(folder)) for folder in written("qwen3_5_moe_text", "fp8-block"))
    found = [name for name in matrices(quantised) if ".experts." in name]
    assert len(found) == 3 * quantised.config.num_layers
    for name in found:
        np.testing.assert_array_equal(whole(quantised.whole, quantised, name), whole(plain.whole, plain, name))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("quantize_config.json", '{"bits": 4, "group_size": 32, "sym": true, "desc_act": false}'),
        ("quant_config.json", '{"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": true}'),
    ],
)
def test_what_stands_in_a_file_beside(file: str, content: str, written: Write, tmp_path: Path) -> None:
    variety = "gptq" if "quantize" in file else "awq"
    quantised, _ = write_quantised(ALL_CASES["llama31"], VARIETIES[variety], tmp_path)
    change_config(quantised, quantization_config=None)
    (quantised / file).write_text(content)
    expected = open_model(str(written("llama31", variety)[0])).told(None)
    assert open_model(str(quantised)).told(None) == expected
