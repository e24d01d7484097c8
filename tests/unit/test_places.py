"""Where tensors lie in published checkpoints: fused, stacked, transposed and MXFP4 ones against plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.kernels.layout import FORMATS, MXFP4
from dllama_mpi.weights.checkpoint import Checkpoint
from dllama_mpi.weights.mapped import MappedSource, Mxfp4, Place, Ref, Stack
from dllama_mpi.weights.tiles import TileMatrix, load_matrix, load_vector
from tests import naive_formats
from tests.naive_numbers import Floats
from tests.unit.small_files import every_dtype, random, read_back, stored, write

SHUFFLED = np.random.default_rng(3).permutation(48)


def source_of(folder: Path, arrays: dict[str, tuple[str, np.ndarray]], **places: Place) -> MappedSource:
    """Return a checkpoint of these arrays, whose tensors are at places."""
    return MappedSource(Checkpoint(write(folder / "model.safetensors", arrays)), places, [r"^unused\."])


def whole(tensor_shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of a whole tensor."""
    return tuple((0, size) for size in tensor_shape)


def values_of(matrix: TileMatrix) -> Floats:
    """Return the float32 values of all experts' matrices."""
    return np.stack([matrix.to_float32(i) for i in range(len(matrix.tiles))])


MATRICES: dict[str, tuple[Ref, tuple[int, ...], Callable[[Floats], Floats]]] = {
    "as it is": (Ref("x"), (48, 64), lambda x: x),
    "rows": (Ref("x", rows=slice(17, 40)), (48, 64), lambda x: x[17:40]),
    "every other row": (Ref("x", rows=slice(1, None, 2)), (48, 64), lambda x: x[1::2]),
    "order": (Ref("x", rows=tuple(SHUFFLED)), (48, 64), lambda x: x[SHUFFLED]),
    "some in order": (Ref("x", rows=(5, 2, 40)), (48, 64), lambda x: x[[5, 2, 40]]),
    "transposed": (Ref("x", transposed=True), (64, 48), lambda x: x.T),
    "transposed rows": (Ref("x", rows=slice(0, None, 2), transposed=True), (64, 48), lambda x: x.T[::2]),
    "one of a stack": (Ref("x", index=1), (3, 48, 64), lambda x: x[1]),
    "rows of one of a stack": (Ref("x", index=2, rows=slice(16, 32)), (3, 48, 64), lambda x: x[2, 16:32]),
    "a stack": (Ref("x"), (3, 48, 64), lambda x: x),
    "rows of each": (Ref("x", rows=slice(8, 40)), (3, 48, 64), lambda x: x[:, 8:40]),
    "rows of each, transposed": (Ref("x", rows=slice(1, None, 2), transposed=True), (3, 64, 48),
                                 lambda x: x.transpose(0, 2, 1)[:, 1::2]),
}  # fmt: skip


@every_dtype
@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name: str, dtype: str, tmp_path: Path) -> None:
    place, shape, reference = MATRICES[name]
    values = random(1, *shape)
    tensor = source_of(tmp_path, {"x": stored(values, dtype)}, m=place)["m"]
    expected = reference(read_back(values, dtype))
    assert (tensor.name, tensor.shape) == ("m", expected.shape)
    got = load_matrix(tensor, expected.shape, whole(expected.shape), FORMATS["f32"])
    np.testing.assert_array_equal(values_of(got).reshape(expected.shape), expected)
    first = min(16, expected.shape[-2] - 1)
    ranges = (*whole(expected.shape)[:-2], (first, expected.shape[-2]), (32, expected.shape[-1]))
    part = load_matrix(tensor, expected.shape, ranges, FORMATS["f32"])
    np.testing.assert_array_equal(values_of(part).reshape(tuple(b - a for a, b in ranges)), expected[..., first:, 32:])


VECTORS: dict[str, tuple[Ref, tuple[int, ...], Callable[[Floats], Floats]]] = {
    "as it is": (Ref("x"), (48,), lambda x: x),
    "added to": (Ref("x", add=1.0), (48,), lambda x: x + np.float32(1)),
    "part": (Ref("x", rows=slice(5, 30)), (48,), lambda x: x[5:30]),
    "order": (Ref("x", rows=tuple(SHUFFLED)), (48,), lambda x: x[SHUFFLED]),
    "order, added to": (Ref("x", rows=tuple(SHUFFLED), add=0.5), (48,), lambda x: x[SHUFFLED] + np.float32(0.5)),
    "one of a stack": (Ref("x", index=1), (3, 48), lambda x: x[1]),
    "of each": (Ref("x", rows=slice(0, None, 2), stacked=True), (3, 48), lambda x: x[:, ::2]),
    "flat": (Ref("x", flat=True), (16, 1, 4), lambda x: x.reshape(-1)),
    "rows, flat": (Ref("x", rows=slice(4, 12), flat=True), (16, 1, 4), lambda x: x[4:12].reshape(-1)),
}


@every_dtype
@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name: str, dtype: str, tmp_path: Path) -> None:
    place, shape, reference = VECTORS[name]
    values = random(2, *shape)
    tensor = source_of(tmp_path, {"x": stored(values, dtype)}, v=place)["v"]
    expected = reference(read_back(values, dtype))
    assert (tensor.name, tensor.shape) == ("v", expected.shape)
    got = load_vector(tensor, expected.shape, whole(expected.shape))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    ranges = (*whole(expected.shape)[:-1], (3, 11))
    np.testing.assert_array_equal(load_vector(tensor, expected.shape, ranges), expected[..., 3:11])


@every_dtype
def test_experts_of_their_own(dtype: str, tmp_path: Path) -> None:
    """A stack of fused matrices, each in its own tensor, and their biases."""
    matrices, biases = random(3, 4, 48, 64), random(4, 4, 48)
    arrays = {f"{i}.w": stored(matrices[i], dtype) for i in range(4)}
    arrays |= {f"{i}.b": stored(biases[i], dtype) for i in range(4)}
    source = source_of(
        tmp_path,
        arrays,
        w=Stack(tuple(Ref(f"{i}.w", rows=slice(16, 48)) for i in range(4))),
        b=Stack(tuple(Ref(f"{i}.b") for i in range(4))),
    )
    expected = read_back(matrices, dtype)[:, 16:]
    assert source["w"].shape == (4, 32, 64)
    got = load_matrix(source["w"], (4, 32, 64), ((1, 4), (5, 32), (32, 64)), FORMATS["f32"])
    np.testing.assert_array_equal(values_of(got), expected[1:, 5:, 32:])
    np.testing.assert_array_equal(
        load_vector(source["b"], (4, 48), ((1, 3), (7, 20))), read_back(biases, dtype)[1:3, 7:20]
    )


def test_experts_of_different_shapes(tmp_path: Path) -> None:
    arrays = {"0": stored(random(1, 16, 32), "F32"), "1": stored(random(1, 16, 64), "F32")}
    with pytest.raises(ModelError, match=r"w: the experts' tensors have different shapes, .*\(16, 32\)"):
        source_of(tmp_path, arrays, w=Stack((Ref("0"), Ref("1"))))["w"]


def test_an_expert_with_values_that_are_no_numbers(tmp_path: Path) -> None:
    values = random(1, 3, 32, 64)
    values[2, 20, 5] = np.nan
    tensor = source_of(tmp_path, {"x": stored(values, "BF16")}, w=Ref("x"))["w"]
    with pytest.raises(ModelError, match="tensor w has 1 values that are NaN or infinite in rows 0 to 31 of expert 2"):
        load_matrix(tensor, values.shape, whole(values.shape), FORMATS["q40"])


# --------------------------------------------------------------------------------------------------------------------
# MXFP4
# --------------------------------------------------------------------------------------------------------------------

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP Microscaling Formats 1.0, table 5.3.3


def microscaled(experts: int, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray, Floats]:
    """Return blocks and scales as a checkpoint has them, and the values (experts, rows, cols), one by one."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (experts, rows, cols // 32, 16), np.uint8)
    scales = rng.integers(118, 128, (experts, rows, cols // 32), np.uint8)
    values = np.zeros((experts, rows, cols), np.float32)
    for (e, r, b, i), byte in np.ndenumerate(blocks):
        for c, code in ((2 * i, int(byte) & 15), (2 * i + 1, int(byte) >> 4)):
            values[e, r, 32 * b + c] = (-1) ** (code >> 3) * E2M1[code & 7] * 2.0 ** (int(scales[e, r, b]) - 127)
    return blocks, scales, values


@pytest.mark.parametrize("rows", [slice(None), slice(0, None, 2), slice(1, None, 2)], ids=str)
@pytest.mark.parametrize("fmt", ["f32", "q80", "mxfp4"])
@pytest.mark.parametrize(
    "ranges", [((0, 2), (0, 32), (0, 96)), ((1, 2), (16, 32), (32, 96)), ((0, 2), (5, 20), (0, 64))]
)
def test_mxfp4(rows: slice, fmt: str, ranges: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    blocks, scales, values = microscaled(2, 64, 96)
    source = source_of(tmp_path, {"b": ("U8", blocks), "s": ("U8", scales)}, w=Mxfp4("b", "s", rows))
    assert source.formats == {"w": MXFP4}
    expected = values[:, rows]
    shape = (2, len(values[0, rows]), 96)
    assert source["w"].shape == shape
    got = load_matrix(source["w"], shape, ranges, FORMATS[fmt])
    of_experts, of_rows, of_cols = (slice(*each) for each in ranges)
    for i, whole_rows in enumerate(expected[of_experts, of_rows]):
        reference = whole_rows if fmt != "q80" else naive_formats.as_stored(whole_rows, fmt)
        np.testing.assert_array_equal(got.to_float32(i), reference[:, of_cols])


@pytest.mark.parametrize("fmt", ["q80", "mxfp4"])
def test_an_mxfp4_scale_that_is_no_number(fmt: str, tmp_path: Path) -> None:
    blocks, scales, _ = microscaled(2, 16, 64)
    scales[1, 3, 1] = 255
    source = source_of(tmp_path, {"b": ("U8", blocks), "s": ("U8", scales)}, w=Mxfp4("b", "s"))
    with pytest.raises(ModelError, match=r"tensor w has 32 values that are NaN .*expert 1; get it again"):
        load_matrix(source["w"], (2, 16, 64), whole((2, 16, 64)), FORMATS[fmt])


def test_an_mxfp4_value_beyond_float32(tmp_path: Path) -> None:
    blocks, scales = np.full((1, 16, 2, 16), 0x17, np.uint8), np.full((1, 16, 2), 127, np.uint8)  # 6 and 0.5
    scales[0, 3, 1] = 254
    source = source_of(tmp_path, {"b": ("U8", blocks), "s": ("U8", scales)}, w=Mxfp4("b", "s"))
    with pytest.raises(
        ModelError, match=r"tensor w has 16 values that are NaN or infinite in rows 0 to 15 of expert 0"
    ):
        load_matrix(source["w"], (1, 16, 64), whole((1, 16, 64)), FORMATS["q80"])
    half = load_matrix(source["w"], (1, 16, 64), ((0, 1), (0, 16), (0, 32)), FORMATS["f32"])
    np.testing.assert_array_equal(half.to_float32(), np.tile([np.float32(6), np.float32(0.5)], (16, 16)))


def test_mxfp4_blocks_and_scales_that_do_not_fit(tmp_path: Path) -> None:
    blocks, scales, _ = microscaled(2, 16, 64)
    source = source_of(tmp_path, {"b": ("U8", blocks), "s": ("U8", scales[:, :8])}, w=Mxfp4("b", "s"))
    with pytest.raises(ModelError, match=r"tensors b \(2, 16, 2, 16\) and s \(2, 8, 2\) do not fit"):
        source["w"]


# --------------------------------------------------------------------------------------------------------------------
# What is there
# --------------------------------------------------------------------------------------------------------------------


def test_what_no_place_stands_for(tmp_path: Path) -> None:
    one = stored(random(1, 16), "F32")
    arrays = dict.fromkeys(("a", "b", "c", "unused.d"), one)
    source = source_of(tmp_path, arrays, v=Ref("a"), w=Stack((Ref("b"), Ref("gone"))), x=Ref("gone"))
    assert [name in source for name in ("v", "w", "x", "a")] == [True, False, False, False]
    assert source.unknown(["v", "w"]) == ["c"]
    assert source.unknown(["v"]) == ["b", "c"]
    with pytest.raises(ModelError, match="tensor gone is missing"):
        source["w"]


def test_renamed_places() -> None:
    places: list[Place] = [Ref("a", rows=slice(2)), Stack((Ref("a"), Ref("b"))), Mxfp4("a", "b", slice(0, None, 2))]
    for place in places:
        again = place.renamed(lambda name: "model." + name)
        assert list(again.names) == ["model." + name for name in place.names]
        assert again.renamed(lambda name: name.removeprefix("model.")) == place
