"""What every rank computes alike: the norm of the residual, what is added to it, the choice of experts.

Unlike machines must get the same bits from the same bytes, or they would choose different experts: the norm is compared
with a twin that computes in the same order, and all of it between instruction sets.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from numba import njit

from dllama_mpi.kernels import runtime
from dllama_mpi.kernels.activation import sigmoids
from dllama_mpi.kernels.elementwise import normalise_row
from dllama_mpi.kernels.layout import BLOCK, FORMATS
from dllama_mpi.kernels.matrix import Activations
from dllama_mpi.kernels.simd import address
from dllama_mpi.model.experts import SIGMOID, SOFTMAX, Routing, route
from dllama_mpi.model.forward import Residual, Sum, add_and_normalise
from dllama_mpi.parallel.collective.table import PAYLOADS
from tests import naive_formats, naive_layers, naive_numbers, naive_payloads
from tests.naive_numbers import Floats
from tests.unit.kernel_inputs import NO_CODES, TOKENS, assert_q80_of, encoded, matmul, packed, q80_like, random, uneven
from tests.unit.layer_inputs import routing_scratch
from tests.unit.other_process import run_with

EMPTY = np.zeros(0, np.float32)
NOTHING = Sum(np.zeros(4, np.int64), EMPTY, EMPTY, 1.0)
EPS = 1e-5


def filled(values: Floats, size: int) -> Floats:
    """Return values with zeros from column `size` on."""
    values = values.copy()
    values[..., size:] = 0
    return values


# --------------------------------------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100, 160, 163, 1024, 4095])
def test_a_norm_has_the_bits_of_its_order(size: int) -> None:
    width = -(-size // BLOCK) * BLOCK
    weight = filled(random(1, width), size)
    rows = [*random(2, 3, width), *uneven(3, 7, width), np.zeros(width, np.float32), 1e16 * random(4, width)]
    for row in rows:
        row, out = filled(row, size), np.full(width, np.nan, np.float32)
        normalise_row(row, weight, size, np.float32(EPS), out)
        np.testing.assert_array_equal(out[:size], naive_layers.rms_norm_in_order(row[:size], weight[:size], EPS))
        assert not out[size:].any()
        np.testing.assert_allclose(out[:size], naive_layers.rms_norm(row[:size], weight[:size], EPS), rtol=3e-6)
        normalise_row(row, weight, size, np.float32(EPS), row)  # in place
        np.testing.assert_array_equal(row, out)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", [1, 32, 100, 163])
def test_rms_norm(tokens: int, size: int) -> None:
    width = -(-size // BLOCK) * BLOCK
    weight = filled(random(1, width), size)
    for x in (random(2, tokens, width), uneven(3, tokens, width)):
        x = filled(x, size)
        for threads in (1, 2):
            out, residual = Activations(np.full_like(x, np.nan), *q80_like(x)), Residual(x.copy(), size, EPS)
            add_and_normalise(residual, NOTHING, weight, out, 0, threads)
            ref = naive_layers.rms_norm(x[:, :size], weight[:size], EPS)
            np.testing.assert_allclose(out.values[:, :size], ref, rtol=3e-6)
            assert not out.values[:, size:].any()
            assert_q80_of(out.values, out[1:])
            np.testing.assert_array_equal(residual.rows, x)
        plain = Activations(np.full_like(x, np.nan), *NO_CODES)
        add_and_normalise(Residual(x, size, EPS), NOTHING, weight, plain, 0, 1)
        np.testing.assert_array_equal(plain.values, out.values)


# --------------------------------------------------------------------------------------------------------------------
# Additions
# --------------------------------------------------------------------------------------------------------------------


def summed(x: Floats, payloads: naive_numbers.Bytes, bias: Floats) -> Floats:
    """Return x plus each rank's payload in turn and a bias, float32 after each addition."""
    for one in payloads:
        x = x + naive_payloads.decode(one).reshape(x.shape)
    return x + bias if bias.size else x


SIZE, WIDTH = 40, 64


def given(tokens: int, ranks: int, payload: str) -> tuple[Floats, naive_numbers.Bytes]:
    """Return a residual, and what so many ranks send to be added."""
    parts = [filled(random(10 + rank, tokens, WIDTH), SIZE) for rank in range(ranks)]
    return filled(random(1, tokens, WIDTH), SIZE), np.stack([encoded(part.reshape(-1, 32), payload) for part in parts])


def source_of(payloads: naive_numbers.Bytes, payload: str) -> np.ndarray:
    """Return how compiled code finds payloads."""
    return np.array([payloads.ctypes.data, len(payloads), payloads[0].nbytes, PAYLOADS[payload]], np.int64)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_add_and_normalise(tokens: int, has_bias: bool, ranks: int, payload: str) -> None:
    """The residual takes what each rank sent, in order, and the bias; its norm follows."""
    x, payloads = given(tokens, ranks, payload)
    bias = filled(random(3, WIDTH), SIZE) if has_bias else EMPTY
    weight, ref = filled(random(4, WIDTH), SIZE), summed(x, payloads, bias)
    addend = Sum(source_of(payloads, payload), bias, EMPTY, 1.0)
    for threads in (1, 3):
        residual, out = Residual(x.copy(), SIZE, EPS), Activations(np.full_like(x, np.nan), *q80_like(x))
        add_and_normalise(residual, addend, weight, out, 0, threads)
        np.testing.assert_array_equal(residual.rows, ref)
        np.testing.assert_allclose(
            out.values[:, :SIZE], naive_layers.rms_norm(ref[:, :SIZE], weight[:SIZE], EPS), rtol=3e-6
        )
        assert_q80_of(out.values, out[1:])


@pytest.mark.parametrize("payload", ["q80", "f32"])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_after", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("has_before", [False, True])
def test_a_norm_after_and_a_scale(
    tokens: int, has_bias: bool, payload: str, has_after: bool, scale: float, has_before: bool
) -> None:
    """What is added is normalised and scaled first; without a norm before it the next half gets the residual itself."""
    x, payloads = given(tokens, 3, payload)
    bias = filled(random(3, WIDTH), SIZE) if has_bias else EMPTY
    after = filled(random(5, WIDTH), SIZE) if has_after else EMPTY
    before = filled(random(4, WIDTH), SIZE) if has_before else EMPTY
    total = summed(np.zeros_like(x), payloads, bias)
    if has_after:
        total = np.stack([naive_layers.rms_norm_in_order(row[:SIZE], after[:SIZE], EPS) for row in total])
        total = naive_formats.padded(total, 1, WIDTH)
    ref = summed(x, payloads, bias) if scale == 1 and not has_after else x + np.float32(scale) * total
    addend = Sum(source_of(payloads, payload), bias, after, scale)
    for threads in (1, 2):
        residual, out = Residual(x.copy(), SIZE, EPS), Activations(np.full_like(x, np.nan), *q80_like(x))
        add_and_normalise(residual, addend, before, out, 0, threads)
        np.testing.assert_array_equal(residual.rows, ref)
        if has_before:
            expected = naive_layers.rms_norm(ref[:, :SIZE], before[:SIZE], EPS)
            np.testing.assert_allclose(out.values[:, :SIZE], expected, rtol=3e-6)
        else:
            np.testing.assert_array_equal(out.values, ref)
        assert_q80_of(out.values, out[1:])


def test_the_last_addition_writes_no_norm() -> None:
    x, payloads = given(3, 2, "f16")
    residual, out = Residual(x.copy(), SIZE, EPS), Activations(np.full_like(x, 9), *q80_like(x))
    addend = Sum(source_of(payloads, "f16"), EMPTY, EMPTY, 1.0)
    add_and_normalise(residual, addend, EMPTY, out, 1, 1)
    np.testing.assert_array_equal(residual.rows, summed(x, payloads, EMPTY))
    assert (out.values == 9).all()
    assert (out.codes == 99).all()


# --------------------------------------------------------------------------------------------------------------------
# The same bits on every instruction set
# --------------------------------------------------------------------------------------------------------------------


@njit
def all_sigmoids(values):
    """Replace values, a multiple of 16, by their sigmoids."""
    sigmoids(address(values), np.int64(values.size))


def norms_and_sums() -> dict[str, np.ndarray]:
    """Return norms of rows and residuals after additions of each kind."""
    found = {}
    for size in (1, 40, 163, 4096):
        width = -(-size // BLOCK) * BLOCK
        weight, out = filled(random(1, width), size), np.empty(width, np.float32)
        for i, row in enumerate([*random(2, 2, width), *uneven(3, 6, width), 1e-22 * random(4, width)]):
            normalise_row(filled(row, size), weight, size, np.float32(EPS), out)
            found[f"norm {size} {i}"] = out.copy()
    weight = filled(random(4, WIDTH), SIZE)
    for payload in PAYLOADS:
        for scale, after in ((1.0, EMPTY), (0.22, EMPTY), (1.0, weight), (0.3, weight)):
            x, payloads = given(5, 3, payload)
            out = Activations(np.zeros_like(x), *q80_like(x))
            addend = Sum(source_of(payloads, payload), weight, after, scale)
            add_and_normalise(Residual(x, SIZE, EPS), addend, weight, out, 0, 1)
            name = f"sum {payload} {scale} {after.size}"
            found |= {name: x, f"{name} payloads": payloads, f"{name} norm": out.values, f"{name} codes": out.codes}
            found[f"{name} scales"] = out.scales
    return found


def choices() -> dict[str, np.ndarray]:
    """Return routers' logits by every format's matrix, their sigmoids, and who is chosen with which weights."""
    found = {}
    for fmt in FORMATS:
        found[f"logits {fmt}"] = matmul(packed(random(6, 20, 160), fmt), random(7, 9, 160))
    for name, scoring in (("softmax", SOFTMAX), ("sigmoid", SIGMOID)):
        for groups, best in ((1, 1), (4, 2)):
            routing = Routing(20, 5, scoring, 1, 2.5, groups, best)
            scratch = routing_scratch(routing, 9)
            scratch.logits[:] = found["logits f16"]
            route(random(8, 20), random(9, 20), routing, scratch, 9)
            found |= {
                f"{name} {groups} {part}": getattr(scratch, part) for part in ("logits", "scores", "chosen", "starts")
            }
    values = np.concatenate(
        [np.linspace(-100, 100, 4000), random(5, 4000), [0, -0.0, 1e-40, -1e30, 1e30, 88.8, -87.4] + [1] * 9]
    )
    values = values.astype(np.float32)
    all_sigmoids(values)
    return {**found, "sigmoids": values}


def print_digests() -> None:
    """Print a digest of everything as JSON: what another process does with another instruction set."""
    found = {**norms_and_sums(), **choices()}
    digests = {
        name: hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() for name, values in found.items()
    }
    print(json.dumps({"isa": runtime.ISA, "digests": digests}))


def digests(isa: str) -> dict[str, Any]:
    """Return what a process with an instruction set computes."""
    found: dict[str, Any] = json.loads(run_with(isa, "test_residual", "print_digests"))
    assert found["isa"] == isa
    return found


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    print_digests()
    here = json.loads(capsys.readouterr().out)
    assert len(here["digests"]) > 80
    for isa in runtime.host_isas():
        if isa != runtime.ISA:
            found = digests(isa)["digests"]
            assert [name for name, digest in here["digests"].items() if found[name] != digest] == [], isa
