"""MXFP4 as gpt-oss stores it: read as it stands, cut anywhere, refused where it is no number; and recipes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.errors import ModelError
from dllama_mpi.kernels.layout import FORMATS, TileFormat
from dllama_mpi.model.recipe import DEFAULT, WeightRecipe
from dllama_mpi.model.tensors import Kind, tensors
from dllama_mpi.parallel.partition import Range
from dllama_mpi.startup.opening import ModelFiles, open_model
from dllama_mpi.weights.mapped import Mxfp4Tensor
from dllama_mpi.weights.tiles import load_matrix
from tests import naive_model
from tests.naive_experts import mxfp4_dequantise
from tests.tiny_models.case import Case
from tests.tiny_models.files import write_model
from tests.tiny_sparse import SPARSE_CASES

MXFP4, F32 = FORMATS["mxfp4"], FORMATS["f32"]
PREFIX = "model.layers.1.mlp.experts."
EXPERTS, INNER, HIDDEN = 4, 64, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what gives the directory of a case, written once."""
    root = tmp_path_factory.mktemp("models")

    def written(name: str) -> Path:
        return root / name if (root / name).exists() else write_model(SPARSE_CASES[name], root / name)

    return written


def stored(folder: Path, part: str) -> np.ndarray:
    """Return what the files hold of a layer's experts (experts, rows, cols): gate and up interleaved, or down."""
    every = naive_model.read_tensors(folder)
    blocks, scales = (every[f"{PREFIX}{part}_proj_{kind}"].astype(np.uint8) for kind in ("blocks", "scales"))
    return mxfp4_dequantise(blocks, scales)


@pytest.mark.parametrize("fmt", [MXFP4, F32], ids=["mxfp4", "f32"])
@pytest.mark.parametrize("rows", [(0, 64), (32, 64), (16, 48), (0, 0)])
@pytest.mark.parametrize("cols", [(0, 96), (32, 96), (64, 96)])
@pytest.mark.parametrize("part", ["gate", "up"])
def test_rows_of_gate_and_up_alternate(
    fmt: TileFormat, rows: Range, cols: Range, part: str, folder: Callable[[str], Path]
) -> None:
    files = open_model(str(folder("gpt_oss")))
    matrix = load_matrix(
        files.whole[f"{PREFIX}{part}_proj.weight"], (EXPERTS, INNER, HIDDEN), ((0, EXPERTS), rows, cols), fmt
    )
    expected = stored(folder("gpt_oss"), "gate_up")[:, part == "up" :: 2]
    for expert in range(EXPERTS):
        values = expected[expert, slice(*rows), slice(*cols)]
        np.testing.assert_array_equal(matrix.to_float32(expert), values)
        assert not values.size or values.any()


@pytest.mark.parametrize("fmt", [MXFP4, F32], ids=["mxfp4", "f32"])
@pytest.mark.parametrize("cols", [(0, 64), (32, 64), (64, 64)])
def test_columns_of_down(fmt: TileFormat, cols: Range, folder: Callable[[str], Path]) -> None:
    files = open_model(str(folder("gpt_oss")))
    ranges = ((0, EXPERTS), (0, HIDDEN), cols)
    matrix = load_matrix(files.whole[f"{PREFIX}down_proj.weight"], (EXPERTS, HIDDEN, INNER), ranges, fmt)
    for expert, values in enumerate(stored(folder("gpt_oss"), "down")):
        np.testing.assert_array_equal(matrix.to_float32(expert), values[:, slice(*cols)])


@pytest.mark.parametrize("fmt", [MXFP4, F32, FORMATS["q40"]], ids=["mxfp4", "f32", "q40"])
def test_a_scale_that_is_nan(fmt: TileFormat) -> None:
    scales = np.full((2, 16, 1), 127, np.uint8)
    scales[1, 3] = 255
    tensor = Mxfp4Tensor("experts", "F4", np.full((2, 16, 1, 16), 0x21, np.uint8), scales=scales)
    with pytest.raises(ModelError, match=r"experts has 32 values that are NaN.* expert 1"):
        load_matrix(tensor, (2, 16, 32), ((0, 2), (0, 16), (0, 32)), fmt)


def test_codes_of_zero_with_any_scale() -> None:
    """Real files hold -0 and blocks of zeros whose scale says nothing."""
    blocks, scales = np.zeros((1, 16, 2, 16), np.uint8), np.zeros((1, 16, 2), np.uint8)
    blocks[0, :, 0], scales[0, :, 0] = 0x88, 254
    blocks[0, :, 1], scales[0, :, 1] = 0x12, 100
    tensor = Mxfp4Tensor("experts", "F4", blocks, scales=scales)
    for fmt in (MXFP4, F32):
        matrix = load_matrix(tensor, (1, 16, 64), ((0, 1), (0, 16), (0, 64)), fmt)
        np.testing.assert_array_equal(matrix.to_float32(0), mxfp4_dequantise(blocks, scales)[0])


def test_blocks_and_scales_that_do_not_fit(tmp_path: Path) -> None:
    case = SPARSE_CASES["gpt_oss"]

    def cut(given: Case) -> Iterator[tuple[str, str, np.ndarray]]:
        assert case.checkpoint is not None
        for name, dtype, values in case.checkpoint(given):
            yield name, dtype, values[:, :-2] if name == f"{PREFIX}gate_up_proj_scales" else values

    write_model(Case(**{**vars(case), "checkpoint": cut}), tmp_path)
    with pytest.raises(ModelError, match=r"gate_up_proj_blocks .* and .*gate_up_proj_scales .* do not fit"):
        open_model(str(tmp_path))


# ---- recipes


def formats(files: ModelFiles, weights: str | None) -> dict[str, set[str]]:
    """Return the formats of each role."""
    found = files.formats(weights)
    every: dict[str, set[str]] = {}
    for spec in tensors(files.config):
        if spec.kind is Kind.MATRIX:
            every.setdefault(spec.role, set()).add(found[spec.name].name)
    return every


@pytest.mark.parametrize(
    ("weights", "experts", "others"),
    [
        (None, "mxfp4", DEFAULT),
        ("q40", "mxfp4", "q40"),
        ("q4m", "mxfp4", "q4m"),
        ("mxfp4", "mxfp4", "mxfp4"),
        ("q80", "q80", "q80"),
        ("f16", "f16", "f16"),
        ("f32", "f32", "f32"),
        ("q40,experts=q4m", "q4m", "q40"),
        ("f32,experts=mxfp4", "mxfp4", "f32"),
        ("q40,expert_down=q80", None, "q40"),
    ],
)
def test_published_bits_stay(
    weights: str | None, experts: str | None, others: str, folder: Callable[[str], Path]
) -> None:
    found = formats(open_model(str(folder("gpt_oss"))), weights)
    for role in ("expert_gate", "expert_up", "expert_down"):
        assert found[role] == {experts or ("q80" if role == "expert_down" else "mxfp4")}
    assert {found[role].pop() for role in ("q", "k", "v", "o", "lm_head")} == {others}


def test_dequantised_experts_are_any_others(folder: Callable[[str], Path]) -> None:
    assert formats(open_model(str(folder("gpt_oss_bf16"))), None)["expert_up"] == {DEFAULT}
    assert formats(open_model(str(folder("qwen3_moe"))), None)["expert_up"] == {DEFAULT}


def test_what_the_files_hold_counts_more_than_what_the_config_says(folder: Callable[[str], Path]) -> None:
    """A converted directory whose experts were rounded to q40 has nothing left of MXFP4."""
    config = read_model_config(SPARSE_CASES["gpt_oss"].config)
    recipe, q40 = WeightRecipe.parse("q4m"), FORMATS["q40"]
    held = {spec.name: q40 for spec in tensors(config) if spec.kind is Kind.MATRIX}
    assert {fmt.name for name, fmt in recipe.formats(config, held).items() if "router" not in name} == {"q4m"}
    assert recipe.formats(config)[f"{PREFIX}up_proj.weight"] is MXFP4
    plain = read_model_config(SPARSE_CASES["gpt_oss_bf16"].config)
    assert recipe.formats(plain)[f"{PREFIX}up_proj.weight"] is FORMATS["q4m"]
    assert recipe.formats(plain, {f"{PREFIX}up_proj.weight": MXFP4})[f"{PREFIX}up_proj.weight"] is MXFP4


def test_a_shape_without_files_has_them_too() -> None:
    files = open_model("random:gpt-oss-20b")
    assert formats(files, None)["expert_up"] == {"mxfp4"}
    assert formats(files, "q80")["expert_up"] == {"q80"}
