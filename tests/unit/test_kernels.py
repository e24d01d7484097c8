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

import numpy as np
import pytest

from dllama_mpi.errors import UsageError
from dllama_mpi.kernels import elementwise, runtime, sampling
from dllama_mpi.kernels.attention import attention
from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS
from dllama_mpi.kernels.quantize import BF16_BITS, PLAIN, pack_tiles, unpack_tiles, widen_rows
from dllama_mpi.model import forward as layers
from dllama_mpi.model.kv_cache import KVCache
from dllama_mpi.parallel.collective.payload import PAYLOADS, decode_sum, encode
from dllama_mpi.weights.tiles import aligned_empty
from tests import naive
from tests.naive import Bytes, Floats, Ints
from tests.tiny_models import from_bfloat16

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 64)  # every remainder of the blocks of 8 that kernels work in
SHAPES = ((1, 1), (16, 32), (3, 64), (17, 33), (40, 100), (163, 160))
EMPTY = np.zeros(0, np.float32)
NOTHING = np.zeros(4, np.int64)  # the source of no exchange
NO_CODES = (np.zeros((0, 0), np.int8), np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32))
Q80 = tuple[np.ndarray, np.ndarray, np.ndarray]

every_format = pytest.mark.parametrize("fmt", FORMATS)
every_payload = pytest.mark.parametrize("payload", PAYLOADS)


def random(seed: int, *shape: int) -> Floats:
    """Return normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def uneven(seed: int, rows: int, cols: int) -> Floats:
    """Return rows of values at scales from 1e-30 to 1e4, every fifth row and some blocks zero."""
    values = random(seed, rows, cols)
    values *= 10.0 ** np.random.default_rng(seed).uniform(-30, 4, (rows, 1)).astype(np.float32)
    values[0] *= 1e4 / max(np.abs(values[0]).max(), 1e-38)
    values[4::5] = 0
    values[::3, BLOCK : 2 * BLOCK] = 0
    return values


def encoded(x: Floats, payload: str) -> Bytes:
    """Return the payload of x (blocks, 32) by the kernel."""
    out = np.full((len(x), PAYLOADS[payload]), 99, np.uint8)
    encode(x, out)
    return out


def packed(matrix: Floats, fmt: str) -> Bytes:
    """Return a matrix (rows, cols) as tiles by the kernel."""
    tiles = aligned_empty(FORMATS[fmt].shape(*matrix.shape))
    pack_tiles(naive.padded(matrix, ROWS, BLOCK), tiles)
    return tiles


def unpacked(tiles: Bytes) -> Floats:
    """Return the values of tiles by the kernel, padding included."""
    values = np.full((tiles.shape[0] * ROWS, tiles.shape[1] * BLOCK), np.nan, np.float32)
    unpack_tiles(tiles, values)
    return values


def q80_like(x: Floats) -> Q80:
    """Return arrays for the Q80 form of x (tokens, cols), filled with what must not survive."""
    blocks = x.shape[1] // BLOCK
    return (
        np.full(x.shape, 99, np.int8),
        np.full((len(x), blocks), np.nan, np.float32),
        np.full((len(x), blocks), 99, np.int32),
    )


def assert_q80_of(x: Floats, got: Q80) -> None:
    """Check that arrays hold the Q80 form of x, bit for bit."""
    for part, ref in zip(got, naive.quantise_activations(x), strict=True):
        np.testing.assert_array_equal(part, ref)


def matmul(tiles: Bytes, fmt: str, x: Floats, threads: int = 1) -> Floats:
    """Return x @ matrix^T (tokens, 16 * rows of tiles) by the kernel; x (tokens, cols) may end inside a block."""
    x = naive.padded(x, 1, BLOCK)
    y = np.full((len(x), ROWS * len(tiles) + 3), np.nan, np.float32)  # longer rows: the kernel must keep to its own
    codes = q80_like(x)
    elementwise.quantise(x, *codes)
    layers.products(FORMATS[fmt].marker, described(tiles), x, *codes, y, len(x), threads)
    assert np.isnan(y[:, -3:]).all()
    return y[:, :-3]


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_tiles(fmt: str, shape: tuple[int, int]) -> None:
    for matrix in (random(1, *shape), uneven(2, *shape), np.zeros(shape, np.float32)):
        np.testing.assert_array_equal(packed(matrix, fmt), naive.pack(matrix, fmt))


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_tiles(fmt: str, shape: tuple[int, int]) -> None:
    for matrix in (random(1, *shape), uneven(2, *shape)):
        got = unpacked(naive.pack(matrix, fmt))
        np.testing.assert_array_equal(got[: shape[0], : shape[1]], naive.as_stored(matrix, fmt))
        assert not got[shape[0] :].any()
        assert not got[:, shape[1] :].any()


@every_format
def test_requantising_gives_the_same_bytes(fmt: str) -> None:
    values = random(3, 160, 320) * 10.0 ** np.random.default_rng(3).uniform(-4, 4, (160, 1)).astype(np.float32)
    values[:, 32:64] = 0
    values[7] = 0
    tiles = packed(values, fmt)
    np.testing.assert_array_equal(packed(unpacked(tiles), fmt), tiles)


@pytest.mark.parametrize("fmt", ["q40", "q80"])
def test_the_largest_in_size_may_have_either_sign_or_both(fmt: str) -> None:
    values = np.zeros((16, 32), np.float32)
    for r in range(16):
        values[r, [3, 20]] = (1.5, -1.5) if r % 2 else (-1.5, 1.5)
    np.testing.assert_array_equal(packed(values, fmt), naive.pack(values, fmt))
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
    pack_tiles(matrix, room[:, 1:-1])
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
        got = q80_like(x)
        elementwise.quantise(x, *got)
        assert_q80_of(x, got)


def test_quantise_rounds_halves_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    codes, scales, offsets = got = q80_like(x)
    elementwise.quantise(x, *got)
    np.testing.assert_array_equal(codes[0, :6], [127, 0, 2, 2, 0, -2])
    assert scales[0, 0] == pytest.approx(1)
    assert offsets[0, 0] == -8 * (127 + 2 + 2 - 2)


def test_quantising_strided_rows() -> None:
    whole = random(7, 3, 128)
    got = q80_like(whole[:, 32:96])
    elementwise.quantise(whole[:, 32:96], *got)
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
        got = matmul(packed(matrix, fmt), fmt, x)
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
    got = matmul(packed(matrix, fmt), fmt, x)
    error = np.abs(got - x.astype(np.float64) @ matrix.astype(np.float64).T).max() / np.sqrt(320)
    assert error < {"q40": 0.5, "q80": 0.05, "f16": 2e-3, "f32": 1e-5}[fmt]


@every_format
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_token_gets_the_same_bits_in_any_company(fmt: str, threads: int) -> None:
    tiles, x = packed(random(1, 80, 160), fmt), random(2, 64, 160)
    alone = np.concatenate([matmul(tiles, fmt, x[t : t + 1]) for t in range(64)])
    for tokens in TOKENS:
        np.testing.assert_array_equal(matmul(tiles, fmt, x[:tokens], threads), alone[:tokens])
        np.testing.assert_array_equal(matmul(tiles, fmt, x[-tokens:], threads), alone[-tokens:])


@every_format
def test_more_threads_than_rows_of_tiles(fmt: str) -> None:
    matrix, x = random(1, 20, 64), random(2, 3, 64)
    np.testing.assert_array_equal(matmul(packed(matrix, fmt), fmt, x, 7)[:, :20], naive.matmul(matrix, fmt, x))


@every_format
@pytest.mark.parametrize("cols", [(0, 1), (1, 3), (2, 5), (4, 5)], ids=str)
def test_matmul_with_a_strided_slice_of_tiles(fmt: str, cols: tuple[int, int]) -> None:
    matrix, x = random(3, 40, 160), random(4, 9, 160)
    first, last = cols[0] * BLOCK, cols[1] * BLOCK
    got = matmul(packed(matrix, fmt)[1:, cols[0] : cols[1]], fmt, np.ascontiguousarray(x[:, first:last]))
    ref = naive.matmul(matrix[16:, first:last], fmt, x[:, first:last])
    np.testing.assert_array_equal(got[:, :24], ref)


@every_format
def test_no_columns_give_zeros(fmt: str) -> None:
    tiles = packed(random(5, 32, 64), fmt)[:, :0]
    np.testing.assert_array_equal(matmul(tiles, fmt, np.zeros((3, 0), np.float32)), np.zeros((3, 32)))


@every_format
def test_activations_too_small_for_a_scale_do_no_harm(fmt: str) -> None:
    x = np.full((2, 64), 1e-40, np.float32)
    x[0, ::2] = 0
    got = matmul(packed(random(6, 16, 64), fmt), fmt, x)
    assert np.abs(got).max() < 1e-20


def check_few_matmuls() -> None:
    """Check a few shapes of every format; what another process runs for another instruction set."""
    for fmt, shape, tokens in product(FORMATS, ((1, 1), (17, 33), (40, 160)), (1, 3, 17)):
        check_matmul(fmt, shape, tokens)


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
# Between the matrix products
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", [1, 32, 100, 163])
def test_rms_norm(tokens: int, size: int) -> None:
    width = -(-size // BLOCK) * BLOCK
    weight, eps = random(1, size), np.float32(1e-5)
    for x in (random(2, tokens, width), uneven(3, tokens, width)):
        x[:, size:] = 0
        out = np.zeros_like(x)
        codes = q80_like(x)
        layers.add_and_normalise(x, NOTHING, EMPTY, weight, eps, out, *codes)
        np.testing.assert_allclose(out[:, :size], naive.rms_norm(x[:, :size], weight, float(eps)), rtol=3e-6)
        assert not out[:, size:].any()
        assert_q80_of(out, codes)
        plain = np.full_like(x, 7)
        layers.add_and_normalise(x, NOTHING, EMPTY, weight, eps, plain, *NO_CODES)
        np.testing.assert_array_equal(plain[:, :size], out[:, :size])
        assert (plain[:, size:] == 7).all()


def described(*matrices: Bytes) -> np.ndarray:
    """Return tiles as `kernels.layers` takes them."""
    return np.array([[m.ctypes.data, m.strides[0], *m.shape[:2]] for m in matrices], np.int64).ravel()


@every_format
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_products_side_by_side(fmt: str, threads: int, tokens: int) -> None:
    """Several matrices at once give what each gives alone."""
    matrices = [packed(random(seed, rows, 96), fmt) for seed, rows in ((1, 48), (2, 16), (3, 20))]
    x = random(4, tokens, 96)
    codes = q80_like(x)
    elementwise.quantise(x, *codes)
    out = np.full((tokens, 48 + 16 + 32), np.nan, np.float32)
    layers.products(FORMATS[fmt].marker, described(*matrices), x, *codes, out, tokens, threads)
    np.testing.assert_array_equal(out, np.concatenate([matmul(m, fmt, x) for m in matrices], axis=1))


@every_format
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("rows", [32, 96, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_gate_up(fmt: str, threads: int, tokens: int, rows: int, bias: bool) -> None:
    """The gated input of the down projection, from its parts."""
    gate, up = packed(10 * random(1, rows, 64), fmt), packed(random(2, rows, 64), fmt)
    x, width = random(3, tokens, 64), -(-rows // BLOCK) * BLOCK
    codes = q80_like(x)
    elementwise.quantise(x, *codes)
    biases = np.stack([random(4, rows), random(5, rows)]) if bias else np.zeros((2, 0), np.float32)
    sums = [matmul(m, fmt, x)[:, :rows] + (b if bias else 0) for m, b in zip((gate, up), biases, strict=True)]
    ref = naive.padded(naive.silu_mul(*sums).astype(np.float32), 1, BLOCK)
    inner, other = np.zeros((tokens, width), np.float32), np.zeros((tokens, width), np.float32)
    quantised = FORMATS[fmt].quantised_activations
    after = q80_like(inner) if quantised else NO_CODES
    layers._gate_up(FORMATS[fmt].marker, described(gate, up), biases, x, *codes, inner, *after, other, tokens, threads)
    np.testing.assert_allclose(inner, ref, rtol=4e-6, atol=1e-30)
    if quantised:
        assert_q80_of(inner, after)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [0, 40])
def test_add_and_normalise(tokens: int, bias: int, ranks: int, payload: str) -> None:
    """The residual takes what each rank sent, in order, and the bias; its norm follows."""
    x, b, weight, eps = random(1, tokens, 64), random(3, bias), random(4, 40), np.float32(1e-5)
    x[:, 40:] = 0
    parts = [random(10 + rank, tokens, 64) for rank in range(ranks)]
    for part in parts:
        part[:, 40:] = 0
    payloads = np.stack([encoded(part.reshape(-1, 32), payload) for part in parts])
    ref = x.copy()
    for one in payloads:
        ref = ref + naive.decode(one).reshape(x.shape)
    ref[:, :bias] += b
    source = np.array([payloads.ctypes.data, ranks, payloads[0].nbytes, PAYLOADS[payload]], np.int64)
    out, alone, codes = np.zeros_like(x), x.copy(), q80_like(x)
    layers.add_and_normalise(x, source, b, weight, eps, out, *codes)
    np.testing.assert_array_equal(x, ref)
    np.testing.assert_allclose(out[:, :40], naive.rms_norm(ref[:, :40], weight, float(eps)), rtol=3e-6)
    assert_q80_of(out, codes)
    layers.add_and_normalise(alone, source, b, EMPTY, eps, out, *NO_CODES)
    np.testing.assert_array_equal(alone, ref)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("half_cache", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_and_store(tokens: int, half_cache: bool, bias: bool, norm: bool) -> None:
    q_heads, kv_heads, dim, slots, length = 3, 2, 24, 2, 40
    k_start, v_start, width = 80, 128, 176  # q takes 72 columns, k and v 48 each; the rest is padding
    rng = np.random.default_rng(tokens)
    qkv, angles = random(1, tokens, width), rng.uniform(0, 30, (tokens, dim // 2))
    biases = random(2, width) if bias else EMPTY
    norms = [random(seed, dim) if norm else EMPTY for seed in (3, 4)]
    slot_of, positions = rng.integers(0, slots, tokens), rng.permutation(length)[:tokens]
    kind = np.uint16 if half_cache else np.float32
    empty = np.full((slots, kv_heads, length, dim), 7, kind)
    cache = laid_out(empty, empty)
    arrays = (cache[0], no_scales(cache[0], 5), cache[1], no_scales(cache[0], 4))

    sums = qkv + biases if bias else qkv.copy()
    q, k, v = (
        sums[:, start : start + n * dim].reshape(tokens, n, dim)
        for start, n in ((0, q_heads), (k_start, kv_heads), (v_start, kv_heads))
    )
    if norm:
        q, k = naive.rms_norm(q, norms[0], 1e-6), naive.rms_norm(k, norms[1], 1e-6)
    q, k = naive.rotate(q, angles), naive.rotate(k, angles)

    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    indices = (slot_of.astype(np.int32), positions.astype(np.int32))
    elementwise.rope_and_store(
        qkv, biases, *norms, np.float32(1e-6), cos, sin, dim, q_heads, k_start, v_start, *arrays, *indices
    )
    np.testing.assert_allclose(qkv[:, : q_heads * dim].reshape(q.shape), q, rtol=1e-5, atol=2e-6)
    where = np.arange(length)[:, None], np.arange(dim)
    all_keys = cache[0][:, :, where[0] // ROWS, where[1], where[0] % ROWS]
    all_values = cache[1][:, :, where[1] // ROWS, where[0], where[1] % ROWS]
    keys, values = (stored[slot_of, :, positions] for stored in (all_keys, all_values))
    if half_cache:
        np.testing.assert_array_equal(values, naive.half(v).view(np.uint16))
        np.testing.assert_allclose(keys.view(np.float16).astype(np.float32), k, rtol=1e-3, atol=1e-4)
    else:
        np.testing.assert_array_equal(values, v)
        np.testing.assert_allclose(keys, k, rtol=1e-5, atol=2e-6)
    for stored in (all_keys, all_values):  # nothing else was written
        stored[slot_of, :, positions] = 7
        assert (stored == 7).all()
    for stored in cache:  # padding stays zero
        assert np.count_nonzero(stored) == empty.size


def laid_out(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and values (slots, heads, positions, dim) as the cache keeps them, zeros where nothing is."""
    slots, heads, length, dim = k.shape
    rows = -(-length // BLOCK) * BLOCK
    keys = np.zeros((slots, heads, rows // ROWS, -(-dim // BLOCK) * BLOCK, ROWS), k.dtype)
    values = np.zeros((slots, heads, -(-dim // ROWS), rows, ROWS), v.dtype)
    for p in range(length):
        for i in range(dim):
            keys[:, :, p // ROWS, i, p % ROWS] = k[:, :, p, i]
            values[:, :, i // ROWS, p, i % ROWS] = v[:, :, p, i]
    return keys, values


def no_scales(keys: np.ndarray, axes: int) -> np.ndarray:
    """Return the empty scales of a cache that is not quantised."""
    return np.zeros((*keys.shape[:2], *[0] * (axes - 2)), np.uint16)


def attend(
    q: Floats,
    cache: tuple[np.ndarray, np.ndarray],
    slots: Ints,
    positions: Ints,
    window: int,
    heads: tuple[int, int],
    group: int,
    out_start: int = 0,
    threads: int = 1,
) -> Floats:
    """Return the attention (tokens, heads, head_dim) of a rank's heads by the kernel; q (tokens, heads, head_dim).

    cache: keys and values (slots, kv heads, positions, dim), float32 or the bits of float16.
    """
    tokens, count, dim = q.shape
    out = np.full((tokens, out_start + count * dim + 5), -7, np.float32)
    flat = np.concatenate([q.reshape(tokens, -1), np.full((tokens, 4), np.nan, np.float32)], axis=1)
    indices = (slots.astype(np.int32), positions.astype(np.int32))
    scale = np.float32(dim**-0.5)
    marker = FORMATS["f16" if cache[0].dtype == np.uint16 else "f32"].marker
    keys, values = laid_out(*cache)
    arrays = (keys, no_scales(keys, 5), values, no_scales(keys, 4))
    attention(marker, flat, *arrays, *indices, window, scale, dim, *heads, group, out, out_start, threads)
    assert (out[:, :out_start] == -7).all()
    assert (out[:, out_start + count * dim :] == -7).all()
    return out[:, out_start : out_start + count * dim].reshape(q.shape)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize(("heads", "group"), [(4, 1), (4, 2), (7, 7)], ids=str)
@pytest.mark.parametrize("half_cache", [False, True])
def test_attention(window: int, heads: int, group: int, half_cache: bool) -> None:
    dim, length, tokens = 24, 40, 17
    rng = np.random.default_rng(heads)
    slots, positions = rng.integers(0, 3, tokens), rng.integers(0, length, tokens)
    positions[:2] = 0, length - 1
    q = 3 * random(1, tokens, heads, dim)
    k, v = random(2, 3, heads // group, length, dim), random(3, 3, heads // group, length, dim)
    cache = (naive.half(k).view(np.uint16), naive.half(v).view(np.uint16)) if half_cache else (k, v)
    if half_cache:
        k, v = naive.half(k).astype(np.float32), naive.half(v).astype(np.float32)
    ref = np.concatenate(
        [naive.attention(q[t : t + 1], k[slots[t]], v[slots[t]], positions[t : t + 1], window) for t in range(tokens)]
    )
    got = attend(q, cache, slots, positions, window, (0, heads), group)
    np.testing.assert_allclose(got, ref, rtol=1e-5, atol=2e-6)
    for threads in (2, 3):
        again = attend(q, cache, slots, positions, window, (0, heads), group, threads=threads)
        np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("heads", [(0, 1), (0, 3), (1, 5), (3, 4), (5, 9), (2, 8)], ids=str)
def test_attention_of_a_ranks_heads(heads: tuple[int, int]) -> None:
    """Give a rank some of 9 heads that share 3 KV heads, so that cuts go through KV heads."""
    group, dim, length, tokens = 3, 16, 12, 9
    first, last = heads
    kv = (first // group, -(-last // group))
    q, k, v = random(1, tokens, 9, dim), random(2, 1, 3, length, dim), random(3, 1, 3, length, dim)
    positions = np.arange(tokens) + 2
    ref = naive.attention(q, k[0], v[0], positions, 0)
    cache = (np.ascontiguousarray(k[:, kv[0] : kv[1]]), np.ascontiguousarray(v[:, kv[0] : kv[1]]))
    got = attend(q[:, first:last], cache, np.zeros(tokens, np.int64), positions, 0, heads, group, out_start=8)
    np.testing.assert_allclose(got, ref[:, first:last], rtol=1e-5, atol=2e-6)


def test_attention_looks_at_no_later_position() -> None:
    q, k, v = random(1, 1, 2, 16), random(2, 1, 2, 10, 16), random(3, 1, 2, 10, 16)
    zero, position = np.zeros(1, np.int64), np.array([5])
    before = attend(q, (k, v), zero, position, 3, (0, 2), 1)
    k[:, :, 6:], v[:, :, 6:], k[:, :, :3], v[:, :, :3] = 1e4, -1e4, 1e4, -1e4
    np.testing.assert_array_equal(attend(q, (k, v), zero, position, 3, (0, 2), 1), before)


@pytest.mark.parametrize("half_cache", [False, True])
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("heads", [(0, 8, 4), (3, 7, 4), (0, 2, 2)], ids=str)
def test_attention_over_long_contexts(half_cache: bool, window: int, tokens: int, heads: tuple[int, int, int]) -> None:
    """Several blocks of the online softmax; few heads and many threads cut the positions between threads."""
    first, last, group = heads
    dim, length, kv = 32, 1100, -(-last // group) - first // group
    q, k, v = 2 * random(1, tokens, last, dim), random(2, 1, kv, length, dim), random(3, 1, kv, length, dim)
    if half_cache:
        k, v = (naive.half(a) for a in (k, v))
    positions = np.arange(length - tokens, length)
    whole = [np.repeat(a.astype(np.float32), 1, axis=1) for a in (k, v)]
    cache = (k.view(np.uint16), v.view(np.uint16)) if half_cache else (k, v)
    zero = np.zeros(tokens, np.int64)
    got = attend(q[:, first:], cache, zero, positions, window, (first, last), group)
    for h in range(first, last):
        one = [a[0, h // group - first // group][None] for a in whole]
        ref = naive.attention(q[:, h : h + 1], one[0], one[1], positions, window)
        np.testing.assert_allclose(got[:, h - first : h - first + 1], ref, rtol=1e-5, atol=3e-6)
    for threads in (2, 5):
        again = attend(q[:, first:], cache, zero, positions, window, (first, last), group, threads=threads)
        np.testing.assert_allclose(again, got, rtol=1e-5, atol=3e-6)


def test_attention_to_scores_that_would_overflow() -> None:
    q, k, v = 1e3 * random(1, 1, 1, 32), 1e3 * random(2, 1, 1, 6, 32), random(3, 1, 1, 6, 32)
    got = attend(q, (k, v), np.zeros(1, np.int64), np.array([5]), 0, (0, 1), 1)
    np.testing.assert_allclose(got, naive.attention(q, k[0], v[0], np.array([5]), 0), rtol=1e-5)


@pytest.mark.parametrize("dim", [24, 32, 80])
@pytest.mark.parametrize("tokens", [1, 9])
def test_quantised_cache(dim: int, tokens: int) -> None:
    """Keys and values stored as Q80 are attended to as what they stand for."""
    heads, length, seq = 2, 300, 320
    cache = KVCache(1, 2, heads, seq, dim, "q80")
    qkv = random(1, length, 3 * 96 * heads)
    cos, sin = np.ones((length, dim // 2), np.float32), np.zeros((length, dim // 2), np.float32)  # no rotation
    indices = (np.ones(length, np.int32), np.arange(length, dtype=np.int32))
    starts = (96 * heads, 2 * 96 * heads)
    eps = np.float32(1e-6)
    elementwise.rope_and_store(qkv, EMPTY, EMPTY, EMPTY, eps, cos, sin, dim, heads, *starts, *cache.layer(0), *indices)
    k, v = (qkv[:, at : at + heads * dim].reshape(length, heads, dim).swapaxes(0, 1) for at in starts)
    stored = [np.pad(a, ((0, 0), (0, 0), (0, -dim % BLOCK))).reshape(heads, length, -1, BLOCK) for a in (k, v)]
    for i, a in enumerate(stored):
        scales = naive.half(np.abs(a).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
        codes = np.rint(a / scales).clip(-127, 127)
        stored[i] = (codes * scales).reshape(heads, length, -1)[..., :dim].astype(np.float32)
    last = np.arange(length - tokens, length)
    q = random(2, tokens, heads, dim)
    out = np.zeros((tokens, heads * dim), np.float32)
    attention(
        cache.marker, q.reshape(tokens, -1), *cache.layer(0), np.ones(tokens, np.int32), last.astype(np.int32), 0,
        np.float32(dim**-0.5), dim, 0, heads, 1, out, 0, 1,
    )  # fmt: skip
    ref = naive.attention(q, stored[0], stored[1], last, 0)
    np.testing.assert_allclose(out.reshape(q.shape), ref, rtol=1e-4, atol=2e-5)
    exact = naive.attention(q, k, v, last, 0)
    assert np.abs(exact - ref).max() > 1e-4  # the comparison sees quantisation


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
