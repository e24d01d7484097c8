"""Tensors of every GGUF type: what the package `gguf` makes of them within each format's bound, cut anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllama_mpi.errors import ModelError
from dllama_mpi.kernels.layout import FORMATS, TileFormat
from dllama_mpi.weights.gguf_types import BY_NAME, TYPES
from dllama_mpi.weights.mapped import Ref, Reordered
from dllama_mpi.weights.source import Range, Tensor
from dllama_mpi.weights.tiles import TileMatrix, load_matrix
from tests.gguf_blocks import BOUNDS, HALVES, blocks, like, values_of, written

ROWS, COLS = 45, 768
Floats = npt.NDArray[np.float32]
every_type = pytest.mark.parametrize("kind", HALVES)


def own_format(kind: str) -> TileFormat:
    """Return the format that keeps a type."""
    found = BY_NAME[kind].format
    assert found is not None
    return found


def loaded(tensor: Tensor, fmt: TileFormat, rows: Range = (0, ROWS), cols: Range = (0, COLS)) -> TileMatrix:
    return load_matrix(tensor, (ROWS, COLS), (rows, cols), fmt)


def bound(kind: str, matrix: TileMatrix, expected: Floats) -> Floats:
    """Return how far each value may be from what the file says; see `BOUNDS`."""
    which = BOUNDS[kind]
    if which == "exact":
        return np.zeros_like(expected)
    if which == "float16":
        return np.abs(expected) * np.float32(2.0**-10) + 127 * np.float32(2.0**-25)
    if which == "steps":  # half a unit of the step for each of up to 15 codes, four of the minimum
        return np.repeat(matrix.row_scales[0, : len(expected), None] * 11.6, expected.shape[1], axis=1)
    each = np.abs(expected).reshape(len(expected), -1, 32)
    if which == "q80":  # half a step, and the scale's rounding, which is coarse where it is subnormal
        return np.repeat(each.max(axis=2) * (0.51 / 127 + 2.0**-11) + 127 * 2.0**-25, 32, axis=1)
    ends = expected.reshape(each.shape)
    spread = np.maximum(ends.max(axis=2), 0) - np.minimum(ends.min(axis=2), 0)
    return np.repeat(0.2 * spread, 32, axis=1) + matrix.row_scales[0, : len(expected), None] * 16


@every_type
@pytest.mark.parametrize("seed", [0, 1])
def test_within_the_bound_of_the_format(kind: str, seed: int, tmp_path: Path) -> None:
    raw = blocks(kind, ROWS, COLS, seed, negative=seed == 1 and kind not in ("Q4_1", "Q4_K"))
    expected, matrix = values_of(kind, raw), loaded(written(tmp_path / "a.gguf", kind, raw), own_format(kind))
    error = np.abs(matrix.to_float32() - expected)
    assert (error <= bound(kind, matrix, expected)).all()
    assert (error**2).sum() <= 0.012 * (expected**2).sum()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tensor(data: st.DataObject, tmp_path: Path) -> None:
    """Of any type, size and scale, cut anywhere, in any order of rows: the package's values, or as near as is said."""
    kind, seed = data.draw(st.sampled_from(list(BOUNDS))), data.draw(st.integers(0, 2**32 - 1))
    width = BY_NAME[kind].columns
    rows, cols = data.draw(st.integers(1, 40)), max(width, 32) * data.draw(st.integers(1, 3))
    if data.draw(st.booleans(), "quantised by the package"):
        rng = np.random.default_rng(seed)
        values = rng.standard_normal((rows, cols), np.float32) * np.float32(10.0 ** data.draw(st.integers(-3, 3)))
        raw = like(values, kind)
    else:
        raw = blocks(kind, rows, cols, seed, negative=BOUNDS[kind] != "steps" and data.draw(st.booleans()))
    expected, tensor = values_of(kind, raw), written(tmp_path / "a.gguf", kind, raw)
    if data.draw(st.booleans(), "rows in another order"):
        order = np.random.default_rng(seed).permutation(rows)
        tensor, expected = replace(tensor, order=order), expected[order]
    first = data.draw(st.integers(0, rows - 1)), 32 * data.draw(st.integers(0, cols // 32 - 1))
    last = data.draw(st.integers(first[0] + 1, rows)), 32 * data.draw(st.integers(first[1] // 32 + 1, cols // 32))
    ranges = (first[0], last[0]), (first[1], last[1])
    part = expected[slice(*ranges[0]), slice(*ranges[1])]
    exact = load_matrix(tensor, (rows, cols), ranges, FORMATS["f32"])
    np.testing.assert_array_equal(exact.to_float32(), part)
    kept = load_matrix(tensor, (rows, cols), ranges, own_format(kind))
    assert (np.abs(kept.to_float32() - part) <= bound(kind, kept, part)).all()


def test_every_type_has_a_bound() -> None:
    assert set(BOUNDS) == set(HALVES) == {kind.name for kind in TYPES.values() if not kind.is_plain}
    kept = {kind: own_format(kind).name for kind in BOUNDS}
    assert all(kept[kind] == which for kind, which in BOUNDS.items() if which in ("q80", "q4m"))


@every_type
def test_float32_is_exact(kind: str, tmp_path: Path) -> None:
    raw = blocks(kind, ROWS, COLS, 2, negative=True)
    tensor = written(tmp_path / "a.gguf", kind, raw)
    expected = values_of(kind, raw)
    np.testing.assert_array_equal(loaded(tensor, FORMATS["f32"]).to_float32(), expected)
    np.testing.assert_array_equal(tensor.values(((7, 9), (0, COLS))), expected[7:9])
    assert tensor.shape == (ROWS, COLS)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_rows_with_negative_steps_are_quantised(kind: str, tmp_path: Path) -> None:
    raw = blocks(kind, ROWS, COLS, 3)
    raw[::3] = blocks(kind, ROWS, COLS, 4, negative=True)[::3]
    expected = values_of(kind, raw)
    found = loaded(written(tmp_path / "a.gguf", kind, raw), FORMATS["q4m"]).to_float32()
    error = ((found - expected) ** 2).sum(axis=1) / (expected**2).sum(axis=1)
    assert error[::3].max() < 0.02
    assert np.delete(error, np.s_[::3]).max() < 0.001


@every_type
@pytest.mark.parametrize("name", ["own", "f16", "q4m"])
def test_parts_are_those_of_the_whole(kind: str, name: str, tmp_path: Path) -> None:
    """Rows of two ranks and columns of three, cut within superblocks, rows in another order."""
    fmt = own_format(kind) if name == "own" else FORMATS[name]
    tensor = written(tmp_path / "a.gguf", kind, blocks(kind, ROWS, COLS, 5))
    tensor = replace(tensor, order=np.random.default_rng(5).permutation(ROWS))
    whole = loaded(tensor, fmt)
    values = whole.to_float32()
    for cols in ((0, 96), (96, 480), (480, COLS)):
        part = loaded(tensor, fmt, cols=cols)
        np.testing.assert_array_equal(part.tiles, whole.tiles[:, :, cols[0] // 32 : cols[1] // 32])
        np.testing.assert_array_equal(part.row_scales, whole.row_scales)
    for rows in ((0, 20), (20, ROWS)):
        np.testing.assert_array_equal(loaded(tensor, fmt, rows=rows).to_float32(), values[slice(*rows)])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_blocks_in_another_order(kind: str, tmp_path: Path) -> None:
    raw = blocks(kind, ROWS, COLS, 6)
    path = tmp_path / "a.gguf"
    plain = written(path, kind, raw)
    order = np.random.default_rng(6).permutation(COLS // 96)
    columns = [int(96 * at + i) for at in order for i in range(96)]
    tensor = Reordered("t", plain.dtype, plain.data, whole=plain, first=np.array(columns)[::32])
    for fmt in (own_format(kind), FORMATS["f32"]):
        expected = loaded(plain, fmt).to_float32()[:, columns]
        np.testing.assert_array_equal(loaded(tensor, fmt).to_float32(), expected)
        np.testing.assert_array_equal(loaded(tensor, fmt, cols=(64, 640)).to_float32(), expected[:, 64:640])


@pytest.mark.parametrize("kind", ["Q4_0", "MXFP4", "Q6_K", "Q4_K"])
def test_experts(kind: str, tmp_path: Path) -> None:
    raw = blocks(kind, 3 * ROWS, COLS, 7).reshape(3, ROWS, -1)
    tensor, fmt = written(tmp_path / "a.gguf", kind, raw), own_format(kind)
    found = load_matrix(tensor, (3, ROWS, COLS), ((1, 3), (16, ROWS), (32, COLS)), fmt)
    for expert in (1, 2):
        one = loaded(written(tmp_path / "b.gguf", kind, raw[expert]), fmt).to_float32()[16:, 32:]
        np.testing.assert_array_equal(found.to_float32(expert - 1), one)


@pytest.mark.parametrize("kind", [kind for kind in HALVES if BY_NAME[kind].is_compiled])
def test_a_scale_that_is_no_number(kind: str, tmp_path: Path) -> None:
    raw = blocks(kind, ROWS, COLS, 8)
    at = HALVES[kind][0] if HALVES[kind] else 0
    raw[3, at : at + 2] = 255
    with pytest.raises(ModelError, match=r"tensor t has .* NaN or infinite"):
        loaded(written(tmp_path / "a.gguf", kind, raw), own_format(kind))


def test_types_are_those_of_the_package() -> None:
    import gguf

    for kind in TYPES.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.number)] == (kind.columns, kind.size)
        assert gguf.GGMLQuantizationType(kind.number).name == kind.name


def test_a_vector_of_exponents_and_a_row() -> None:
    class Files:
        folder = Path("x")

        def __getitem__(self, name: str) -> Tensor:
            return Tensor(name, "F32", np.array([-1.0, -np.e], np.float32))

    opened = Ref("a", exponents=True).open("b", Files())  # type: ignore[arg-type]
    np.testing.assert_allclose(opened.values(((0, 2),)), [0, 1], atol=1e-7)
    assert Ref("a", single=True).open("b", Files()).shape == (1, 2)  # type: ignore[arg-type]
