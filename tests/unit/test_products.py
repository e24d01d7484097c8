"""Quantised activations and products, bit for bit as their twins in ``tests.naive_products``, over odd shapes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from dllama_mpi.kernels import elementwise
from dllama_mpi.kernels.layout import BLOCK, FORMATS
from dllama_mpi.kernels.matmul import described
from dllama_mpi.kernels.matrix import FIELDS, Activations, Matrix, expert_of, multiply_rows
from dllama_mpi.model.linear import NoMatrix, SideBySide, multiply, project
from tests import naive_products
from tests.unit.kernel_inputs import (
    SHAPES,
    TOKENS,
    Tiles,
    aligned,
    assert_q80_of,
    fields,
    inputs,
    matmul,
    packed,
    q80_like,
    random,
    uneven,
)
from tests.unit.other_process import run_with

every_format = pytest.mark.parametrize("fmt", FORMATS)


# --------------------------------------------------------------------------------------------------------------------
# Activations
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", TOKENS)
def test_quantise(tokens: int) -> None:
    for x in (random(tokens, tokens, 96), uneven(tokens, tokens, 160), np.zeros((tokens, 32), np.float32)):
        for threads in (1, 2):
            got = q80_like(x)
            elementwise.quantise(Activations(x, *got), tokens, threads)
            assert_q80_of(x, got)


def test_quantise_rounds_halves_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    codes, scales, offsets = got = q80_like(x)
    elementwise.quantise(Activations(x, *got), 1, 1)
    np.testing.assert_array_equal(codes[0, :6], [127, 0, 2, 2, 0, -2])
    assert scales[0, 0] == pytest.approx(1)
    assert offsets[0, 0] == -8 * (127 + 2 + 2 - 2)


def test_quantising_strided_rows() -> None:
    whole = random(7, 3, 128)
    got = q80_like(whole[:, 32:96])
    elementwise.quantise(Activations(whole[:, 32:96], *got), 3, 1)
    assert_q80_of(np.ascontiguousarray(whole[:, 32:96]), got)


# --------------------------------------------------------------------------------------------------------------------
# Matrix products
# --------------------------------------------------------------------------------------------------------------------


def check_matmul(fmt: str, shape: tuple[int, int], tokens: int) -> None:
    """Check the product with a matrix, plain and of extreme scales, bit for bit, and that its padding gives zeros."""
    rows, cols = shape
    for matrix, x in (
        (random(rows, rows, cols), random(tokens, tokens, cols)),
        (uneven(cols, rows, cols), uneven(tokens, tokens, cols)),
    ):
        got = matmul(packed(matrix, fmt), x)
        np.testing.assert_array_equal(got[:, :rows], naive_products.matmul(matrix, fmt, x))
        assert not got[:, rows:].any()


@every_format
@pytest.mark.parametrize("tokens", TOKENS)
def test_matmul(fmt: str, tokens: int) -> None:
    for shape in SHAPES:
        check_matmul(fmt, shape, tokens)


@every_format
def test_matmul_is_near_the_exact_product(fmt: str) -> None:
    matrix, x = random(1, 48, 320), random(2, 5, 320)
    got = matmul(packed(matrix, fmt), x)
    error = np.abs(got - x.astype(np.float64) @ matrix.astype(np.float64).T).max() / np.sqrt(320)
    limits = {"q40": 0.5, "q4m": 0.4, "iq4nl": 0.4, "mxfp4": 0.6, "q80": 0.05, "f16": 2e-3, "f32": 1e-5}
    assert error < limits[fmt]


@every_format
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_token_gets_the_same_bits_in_any_company(fmt: str, threads: int) -> None:
    tiles, x = packed(random(1, 80, 160), fmt), random(2, 64, 160)
    alone = np.concatenate([matmul(tiles, x[t : t + 1]) for t in range(64)])
    for tokens in TOKENS:
        np.testing.assert_array_equal(matmul(tiles, x[:tokens], threads), alone[:tokens])
        np.testing.assert_array_equal(matmul(tiles, x[-tokens:], threads), alone[-tokens:])


@every_format
def test_more_threads_than_rows_of_tiles(fmt: str) -> None:
    matrix, x = random(1, 20, 64), random(2, 3, 64)
    np.testing.assert_array_equal(matmul(packed(matrix, fmt), x, 7)[:, :20], naive_products.matmul(matrix, fmt, x))


@every_format
@pytest.mark.parametrize("cols", [(0, 1), (1, 3), (2, 5), (4, 5)], ids=str)
def test_matmul_with_a_strided_slice_of_tiles(fmt: str, cols: tuple[int, int]) -> None:
    matrix, x = random(3, 40, 160), random(4, 9, 160)
    first, last = cols[0] * BLOCK, cols[1] * BLOCK
    tiles = packed(matrix, fmt).part(slice(1, None), slice(*cols))
    got = matmul(tiles, np.ascontiguousarray(x[:, first:last]))
    copy = Tiles(fmt, aligned(tiles.tiles), tiles.row_scales)
    np.testing.assert_array_equal(got, matmul(copy, x[:, first:last]))
    if not FORMATS[fmt].has_row_scales:  # which a slice has from the whole
        np.testing.assert_array_equal(
            got[:, :24], naive_products.matmul(matrix[16:, first:last], fmt, x[:, first:last])
        )


@every_format
def test_no_columns_give_zeros(fmt: str) -> None:
    tiles = packed(random(5, 32, 64), fmt).part(slice(None), slice(0))
    np.testing.assert_array_equal(matmul(tiles, np.zeros((3, 0), np.float32)), np.zeros((3, 32)))


@every_format
def test_activations_too_small_for_a_scale_do_no_harm(fmt: str) -> None:
    x = np.full((2, 64), 1e-40, np.float32)
    x[0, ::2] = 0
    got = matmul(packed(random(6, 16, 64), fmt), x)
    assert np.abs(got).max() < 1e-20


MIXED = (("q40", 48), ("f16", 20), ("q4m", 16), ("f32", 33), ("q80", 1))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_matrices_of_different_formats_side_by_side(tokens: int, threads: int) -> None:
    """Projections of one input, of a second layer; where one is missing the next stands in its place."""
    x, columns, expected = random(4, tokens, 96), [], []
    every: list[Matrix | NoMatrix] = []
    keep = []
    for seed, (fmt, rows) in enumerate(MIXED):
        layers = [packed(random(10 * seed + layer, rows, 96), fmt) for layer in range(2)]
        keep += layers
        every.append(fields(*layers))
        expected.append(matmul(layers[1], x))
        columns.append(expected[-1].shape[1])
        if seed == 1:
            every.append(NoMatrix())
    whole = np.concatenate(expected, axis=1)
    out = np.full((tokens + 1, sum(columns) + 2), np.nan, np.float32)
    project(SideBySide(*every), 1, inputs(x), out, tokens, threads)
    np.testing.assert_array_equal(out[:tokens, :-2], whole)
    assert np.isnan(out[tokens]).all()
    assert np.isnan(out[:, -2:]).all()
    for matrix, ref in zip([m for m in every if isinstance(m, Matrix)], expected, strict=True):
        alone = np.full((tokens, ref.shape[1]), np.nan, np.float32)
        multiply(matrix, 1, inputs(x), alone, tokens, threads)
        np.testing.assert_array_equal(alone, ref)


@every_format
def test_one_expert_of_many(fmt: str) -> None:
    """Matrices of all experts are one array; some tokens of a larger input are multiplied with one of them."""
    experts = [packed(random(seed, 40, 96), fmt) for seed in range(3)]
    tiles = aligned(np.stack([one.tiles for one in experts]))
    scales = np.stack([one.row_scales for one in experts]) if FORMATS[fmt].has_row_scales else None
    m, every, x = np.empty(FIELDS, np.int64), described(FORMATS[fmt], tiles, scales), random(9, 7, 96)
    given = inputs(x)
    for e, one in enumerate(experts):
        expert_of(every, e, m)
        out = np.full((3, 48), np.nan, np.float32)
        multiply_rows(m, 1, 3, given, 2, 3, out.ctypes.data, out.strides[0])  # rows of tiles 1 and 2, tokens 2 to 4
        assert np.isnan(out[:, :16]).all()
        np.testing.assert_array_equal(out[:, 16:], matmul(one, x[2:5])[:, 16:])


def check_few_matmuls() -> None:
    """Check a few shapes of every format; what another process runs for another instruction set."""
    for fmt, shape, tokens in product(FORMATS, ((1, 1), (17, 33), (40, 160)), (1, 3, 17)):
        check_matmul(fmt, shape, tokens)


@pytest.mark.slow  # kernels are compiled anew
def test_generic_instruction_set() -> None:
    run_with("generic", "test_products", "check_few_matmuls")
