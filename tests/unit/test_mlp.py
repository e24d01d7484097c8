"""Gated feed-forward layers against their twins, with every activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from dllama_mpi.kernels import activation
from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS, ceil_to
from dllama_mpi.model.mlp import GatedMLP, gated_mlp
from tests import naive_formats
from tests.naive_numbers import Floats
from tests.unit.kernel_inputs import Tiles, assert_q80_of, fields, inputs, matmul, packed, random
from tests.unit.layer_inputs import ACTIVATIONS, mlp_scratch

every_format = pytest.mark.parametrize("fmt", FORMATS)
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def test_every_activation_is_tried() -> None:
    assert {type(kernel) for kernel, _, _ in ACTIVATIONS.values()} == set(activation.ACTIVATIONS.values())


class MLPCase(NamedTuple):
    """A feed-forward layer: two layers of matrices, of which the second is used."""

    gate: list[Tiles]
    up: list[Tiles]
    down: list[Tiles]
    biases: Floats
    weights: GatedMLP

    @classmethod
    def of(cls, formats: tuple[str, str, str], inner: int, hidden: int, bias: bool, kind: Any) -> MLPCase:
        """Make one; inputs have 64 columns, formats are those of gate, up and down."""
        gate, up, down = (
            [packed(factor * random(seed + layer, *shape), fmt) for layer in range(2)]
            for seed, fmt, shape, factor in (
                (1, formats[0], (inner, 64), 10), (3, formats[1], (inner, 64), 1), (5, formats[2], (hidden, inner), 1)
            )
        )  # fmt: skip
        biases = random(7, 2, 2, inner) if bias else np.zeros((2, 2, 0), np.float32)
        return cls(gate, up, down, biases, GatedMLP(fields(*gate), fields(*up), fields(*down), biases, kind))

    def inner(self, x: Floats, combine: Callable[[Floats, Floats], Any]) -> Floats:
        """Return what stands before the down projection (tokens, inner to 32s), from the products of the kernels."""
        size = ceil_to(self.biases.shape[2], ROWS) or self.gate[1].tiles.shape[0] * ROWS
        sums = []
        for which, matrix in enumerate((self.gate[1], self.up[1])):
            product = matmul(matrix, x)[:, :size]
            product[:, : self.biases.shape[2]] += self.biases[1, which]
            sums.append(product)
        return naive_formats.padded(np.asarray(combine(*sums), np.float32), 1, BLOCK)


def check_mlp(case: MLPCase, x: Floats, name: str, threads: int) -> None:
    """Check a layer: its inner values against a twin, their codes and the output bit for bit."""
    tokens, (_, combine, tolerance) = len(x), ACTIVATIONS[name]
    ref = case.inner(x, combine)
    quantised = FORMATS[case.down[1].fmt].quantised_activations
    scratch = mlp_scratch(tokens, ref.shape[1], quantised)
    out = np.full((tokens + 1, ROWS * len(case.down[1].tiles)), np.nan, np.float32)
    for array in (scratch.inner.values, scratch.up):
        array[:, ROWS * len(case.gate[1].tiles) :] = 0
    gated_mlp(case.weights, 1, inputs(x), scratch, tokens, out, threads)
    np.testing.assert_allclose(scratch.inner.values, ref, rtol=tolerance, atol=1e-30)
    if quantised:
        assert_q80_of(scratch.inner.values, scratch.inner[1:])
    np.testing.assert_array_equal(out[:tokens], matmul(case.down[1], scratch.inner.values))
    assert np.isnan(out[tokens]).all()


@every_format
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("inner", [32, 96, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(fmt: str, threads: int, tokens: int, inner: int, bias: bool) -> None:
    case = MLPCase.of((fmt, fmt, fmt), inner, 40, bias, activation.Silu())
    check_mlp(case, random(3, tokens, 64), "silu", threads)


@every_activation
@pytest.mark.parametrize("inner", [1, 20, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_activations(name: str, inner: int, bias: bool) -> None:
    for formats in (("f32", "f32", "f32"), ("q40", "f16", "q80"), ("f32", "q4m", "f16")):
        case = MLPCase.of(formats, inner, 33, bias, ACTIVATIONS[name][0])
        for threads in (1, 3):
            check_mlp(case, random(3, 5, 64), name, threads)


def test_no_inner_columns_give_zeros() -> None:
    """A rank may hold none of them."""
    nothing = Tiles("q40", np.zeros((0, 2, 288), np.uint8), np.zeros(0, np.float32))
    down = Tiles("q40", np.zeros((3, 0, 288), np.uint8), np.zeros(0, np.float32))
    weights = GatedMLP(
        fields(nothing), fields(nothing), fields(down), np.zeros((1, 2, 0), np.float32), activation.Silu()
    )
    out = np.full((2, 48), np.nan, np.float32)
    for threads in (1, 2):
        gated_mlp(weights, 0, inputs(random(1, 2, 64)), mlp_scratch(2, 0, True), 2, out, threads)
        assert not out.any()
