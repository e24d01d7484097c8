"""Every kernel against its twin in ``tests.naive``, over odd shapes.

Quantisation, payloads and matrix products are compared bit for bit, the rest within the few roundings in which a
kernel's float32 sums may differ from the twin's float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

from dllama_mpi.errors import UsageError
from dllama_mpi.kernels import elementwise, runtime, sampling
from dllama_mpi.kernels.layout import BLOCK, FORMATS
from dllama_mpi.kernels.matmul import described
from dllama_mpi.kernels.matrix import FIELDS, Activations, Matrix, expert_of, multiply_rows
from dllama_mpi.kernels.parallel import run_parallel
from dllama_mpi.kernels.quantize import BF16_BITS, PLAIN, pack_tiles, widen_rows
from dllama_mpi.model.linear import NoMatrix, SideBySide, multiply, project
from dllama_mpi.parallel.collective.payload import decode_sum
from dllama_mpi.parallel.collective.table import PAYLOADS
from tests import naive
from tests.tiny_models import from_bfloat16
from tests.unit.kernel_inputs import (
    TOKENS,
    Tiles,
    aligned,
    assert_q80_of,
    encoded,
    fields,
    inputs,
    matmul,
    packed,
    q80_like,
    random,
    uneven,
    unpacked,
)

SHAPES = ((1, 1), (16, 32), (3, 64), (17, 33), (40, 100), (163, 160))

every_format = pytest.mark.parametrize("fmt", FORMATS)
every_payload = pytest.mark.parametrize("payload", PAYLOADS)


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_tiles(fmt: str, shape: tuple[int, int]) -> None:
    for matrix in (random(1, *shape), uneven(2, *shape), np.zeros(shape, np.float32)):
        got = packed(matrix, fmt)
        np.testing.assert_array_equal(got.tiles, naive.pack(matrix, fmt))
        if FORMATS[fmt].has_row_scales:
            np.testing.assert_array_equal(got.row_scales[: len(matrix)], naive.row_scales(matrix, fmt))
            assert not got.row_scales[len(matrix) :].any()


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_tiles(fmt: str, shape: tuple[int, int]) -> None:
    for matrix in (random(1, *shape), uneven(2, *shape)):
        scales = packed(matrix, fmt).row_scales
        got = unpacked(Tiles(fmt, naive.pack(matrix, fmt), scales))
        np.testing.assert_array_equal(got[: shape[0], : shape[1]], naive.as_stored(matrix, fmt))
        assert not got[shape[0] :].any()
        assert fmt in ("q4m", "iq4nl") or not got[:, shape[1] :].any()  # which have no code for zero


@pytest.mark.parametrize("fmt", ["q40", "mxfp4", "q80", "f16", "f32"])
def test_requantising_gives_the_same_bytes(fmt: str) -> None:
    values = random(3, 160, 320) * 10.0 ** np.random.default_rng(3).uniform(-4, 4, (160, 1)).astype(np.float32)
    values[:, 32:64] = 0
    values[7] = 0
    tiles = packed(values, fmt)
    again = packed(unpacked(tiles), fmt)
    np.testing.assert_array_equal(
        unpacked(again) if fmt == "mxfp4" else again.tiles, unpacked(tiles) if fmt == "mxfp4" else tiles.tiles
    )


@pytest.mark.parametrize("fmt", ["q40", "q80"])
def test_the_largest_in_size_may_have_either_sign_or_both(fmt: str) -> None:
    values = np.zeros((16, 32), np.float32)
    for r in range(16):
        values[r, [3, 20]] = (1.5, -1.5) if r % 2 else (-1.5, 1.5)
    np.testing.assert_array_equal(packed(values, fmt).tiles, naive.pack(values, fmt))
    got = unpacked(packed(values, fmt))
    assert (got[1::2, 3] == (1.5 if fmt == "q40" else got[1, 3])).all()
    assert (got[:, 3] * got[:, 20] < 0).all()


def test_q80_rounds_halves_away_from_zero() -> None:
    values = np.zeros((16, 32), np.float32)
    values[:, :5] = [127, 0.5, 1.5, -0.5, -2.5]  # the scale is 1
    got = unpacked(packed(values, "q80"))
    np.testing.assert_array_equal(got[0, :5], [127, 1, 2, -1, -3])


@pytest.mark.parametrize("tiles_across", [1, 3])
def test_pack_tiles_into_a_strided_view(tiles_across: int) -> None:
    matrix = random(4, 48, 32 * tiles_across)
    room = np.zeros((3, tiles_across + 2, 288), np.uint8)
    pack_tiles(FORMATS["q40"], matrix, room[:, 1:-1])
    np.testing.assert_array_equal(room[:, 1:-1], naive.pack(matrix, "q40"))
    assert not room[:, [0, -1]].any()


def test_widening_f16_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    got = np.empty((256, 256), np.float32)
    widen_rows(bits, PLAIN, got)
    np.testing.assert_array_equal(got, bits.view(np.float16).astype(np.float32))


def test_widening_bf16_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    got = np.empty((256, 256), np.float32)
    widen_rows(bits, BF16_BITS, got)
    np.testing.assert_array_equal(got.view(np.uint32), from_bfloat16(bits).view(np.uint32))


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (16, 32)], ids=str)
def test_widening_fills_the_corner_only(shape: tuple[int, int]) -> None:
    whole = random(5, 20, 50)
    part = whole[2 : 2 + shape[0], 5 : 5 + shape[1]]
    got = np.full((16, 64), -7, np.float32)
    widen_rows(part, PLAIN, got)
    np.testing.assert_array_equal(got[: shape[0], : shape[1]], part)
    got[: shape[0], : shape[1]] = -7
    assert (got == -7).all()


def test_widening_from_an_odd_address() -> None:
    bits = random(6, 4, 32).astype(np.float16)
    shifted = np.frombuffer(b"x" + bits.tobytes(), np.uint16, offset=1).reshape(4, 32)
    got = np.empty((4, 32), np.float32)
    widen_rows(shifted, PLAIN, got)
    np.testing.assert_array_equal(got, bits.astype(np.float32))


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
        np.testing.assert_array_equal(got[:, :rows], naive.matmul(matrix, fmt, x))
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
    np.testing.assert_array_equal(matmul(packed(matrix, fmt), x, 7)[:, :20], naive.matmul(matrix, fmt, x))


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
        np.testing.assert_array_equal(got[:, :24], naive.matmul(matrix[16:, first:last], fmt, x[:, first:last]))


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
    code = (
        "from tests.unit import test_kernels; from dllama_mpi.kernels import runtime;"
        "test_kernels.check_few_matmuls(); print(runtime.ISA)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {runtime.ISA_VARIABLE: "generic"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "generic"


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.ISA_VARIABLE, "mmx")
    with pytest.raises(UsageError, match=r"DLLAMA_MPI_ISA=mmx: this processor offers .*generic"):
        runtime.choose_isa()
    for isa in runtime.host_isas():
        monkeypatch.setenv(runtime.ISA_VARIABLE, isa)
        assert runtime.choose_isa() == isa
    monkeypatch.delenv(runtime.ISA_VARIABLE)
    assert runtime.choose_isa() == runtime.host_isas()[0]


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_a_number_of_threads_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=rf"--nthreads {count}: this rank may use \d+ cores; give 1 to \d+"):
        runtime.set_threads(count)


# --------------------------------------------------------------------------------------------------------------------
# Parallel regions
# --------------------------------------------------------------------------------------------------------------------


@njit
def _note_share(numbers: Any, pair: Any, factor: Any, thread: Any, threads: Any) -> None:
    """Write to a thread's own place what it has been given."""
    numbers[thread] = factor * (100 * threads + thread) + pair[0][thread] + pair[1]


@njit
def _note(numbers: Any, pair: Any, factor: Any, threads: Any) -> None:
    run_parallel(_note_share, (numbers, pair, factor), threads)  # type: ignore[call-arg]  # an intrinsic


@pytest.mark.parametrize("threads", [1, 2, 3, 20])
def test_every_share_is_done_once(threads: int) -> None:
    """More shares than threads of the pool are done all the same; arguments come through as they are."""
    numbers, offsets = np.zeros(threads + 1), np.arange(threads, dtype=np.int32)
    for turn in range(1, 4):
        _note(numbers, (offsets, 7), 0.5, threads)
        expected = 0.5 * (100 * threads + np.arange(threads)) + np.arange(threads) + 7
        np.testing.assert_array_equal(numbers[:-1], expected, err_msg=f"turn {turn}")
        assert numbers[-1] == 0
        numbers[:] = 0


# --------------------------------------------------------------------------------------------------------------------
# Candidates
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 64, 200])
def test_top_k(k: int) -> None:
    rng = np.random.default_rng(k)
    for logits in (
        random(k, 200),
        rng.integers(-3, 3, 200).astype(np.float32),  # full of ties
        np.zeros(200, np.float32),
        np.arange(200, dtype=np.float32),
        -np.arange(200, dtype=np.float32),
        np.where(rng.random(200) < 0.5, -np.inf, random(k, 200)).astype(np.float32),
    ):
        ids, values = np.full(k, -1, np.int64), np.full(k, np.nan, np.float32)
        sampling.top_k(logits, ids, values)
        ref_ids, ref_values = naive.top_k(logits, k)
        assert ids.tolist() == ref_ids
        assert values.tolist() == ref_values


# --------------------------------------------------------------------------------------------------------------------
# Payloads
# --------------------------------------------------------------------------------------------------------------------


@every_payload
@pytest.mark.parametrize("blocks", [1, 2, 7, 64])
def test_encode(payload: str, blocks: int) -> None:
    for x in (random(blocks, blocks, 32), uneven(blocks, blocks, 32), np.zeros((blocks, 32), np.float32)):
        np.testing.assert_array_equal(encoded(x, payload), naive.encode(x, payload))


@every_payload
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_decode_sum(payload: str, ranks: int) -> None:
    x = np.stack([uneven(rank, 9, 32) for rank in range(ranks)])
    payloads = np.stack([naive.encode(part, payload) for part in x])
    got = np.full((9, 32), np.nan, np.float32)
    decode_sum(payloads, got)
    np.testing.assert_array_equal(got, naive.decode_sum(payloads))
    # A code may be off by half a step, and by a little more where the float16 scale was rounded down.
    error = {"f32": 0, "f16": 2**-11, "q80": 0.51 / 127 + 2**-11}[payload] * np.abs(x).max(axis=2)
    allowed = 2**-20 * np.abs(x).sum(axis=0) + (error + 127 * 2.0**-24).sum(axis=0)[:, None]
    assert (np.abs(got - x.astype(np.float64).sum(axis=0)) <= allowed).all()


def test_a_sum_is_in_rank_order() -> None:
    x = np.array([1e8, -1e8, 1.0], np.float32)[:, None, None] * np.ones((1, 1, 32), np.float32)
    for order, expected in (((0, 1, 2), 1.0), ((0, 2, 1), 0.0)):
        got = np.empty((1, 32), np.float32)
        decode_sum(np.stack([encoded(x[rank], "f32") for rank in order]), got)
        assert (got == expected).all()


@every_payload
def test_a_decoded_payload_encodes_to_itself(payload: str) -> None:
    first = encoded(random(8, 20, 32), payload)
    values = np.empty((20, 32), np.float32)
    decode_sum(first[None], values)
    again = np.empty_like(values)
    decode_sum(encoded(values, payload)[None], again)
    if payload == "q80":  # its scale may move by a rounding: the largest code need not be 127
        np.testing.assert_allclose(again, values, atol=np.abs(values).max() * 2**-8)
    else:
        np.testing.assert_array_equal(again, values)
