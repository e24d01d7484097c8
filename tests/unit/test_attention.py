"""Rotation, the KV cache and attention against their twins, over odd shapes, and a cache that is quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dllama_mpi.kernels.attention import Heads, KVLayer, attention
from dllama_mpi.kernels.elementwise import Preparation, rope_and_store
from dllama_mpi.kernels.layout import BLOCK, PAGE, ROWS
from dllama_mpi.model.forward import Step
from tests import naive_layers, naive_numbers
from tests.naive_layers import PLAIN_SCORES, Scores
from tests.naive_numbers import Doubles, Floats, Ints
from tests.tiers import all_but
from tests.unit.kernel_inputs import aligned, random

EMPTY = np.zeros(0, np.float32)

every_cache = pytest.mark.parametrize("half_cache", [False, True])
every_threads = pytest.mark.parametrize("threads", [1, 2, 3])


def tables_of(slots: int, length: int) -> np.ndarray:
    """Return the pages (slots, n) that hold sequences of some length, in no order."""
    pages = -(-length // PAGE)
    return np.random.default_rng(length).permutation(slots * pages).astype(np.int32).reshape(slots, pages)


def in_pages(values: np.ndarray, axis: int) -> np.ndarray:
    """Return what slots (slots, heads, ...) hold, positions along an axis, cut into pages as `tables_of` says."""
    tables = tables_of(values.shape[0], values.shape[axis])
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, tables.shape[1] * PAGE - values.shape[axis])
    parts = np.split(np.pad(values, padding), tables.shape[1], axis)
    pages = np.zeros((tables.size, *parts[0].shape[1:]), values.dtype)
    for i, part in enumerate(parts):
        pages[tables[:, i]] = part
    return pages


def kv_layer(k: np.ndarray, v: np.ndarray) -> KVLayer:
    """Return keys and values (slots, heads, positions, dim) as the cache keeps them, zeros where nothing is.

    float32, or the bits of float16.
    """
    k, v = in_pages(k, 2), in_pages(v, 2)
    pages, heads, _, dim = k.shape
    keys = np.zeros((pages, heads, PAGE // ROWS, -(-dim // BLOCK) * BLOCK, ROWS), k.dtype)
    values = np.zeros((pages, heads, -(-dim // ROWS), PAGE, ROWS), v.dtype)
    for p in range(PAGE):
        for i in range(dim):
            keys[:, :, p // ROWS, i, p % ROWS] = k[:, :, p, i]
            values[:, :, i // ROWS, p, i % ROWS] = v[:, :, p, i]
    return KVLayer(
        np.empty(0, k.dtype), aligned(keys), no_scales(pages, heads, 3), aligned(values), no_scales(pages, heads, 2)
    )


def no_scales(pages: int, heads: int, axes: int) -> np.ndarray:
    """Return the empty scales of a cache that is not quantised."""
    return np.zeros((pages, heads, *[0] * axes), np.uint16)


def quantised_layer(pages: int, heads: int, dim: int) -> KVLayer:
    """Return an empty cache of codes."""
    width = -(-dim // BLOCK) * BLOCK
    return KVLayer(
        EMPTY,
        np.zeros((pages, heads, PAGE // ROWS, width, ROWS), np.int8),
        np.zeros((pages, heads, PAGE // ROWS, width // BLOCK, ROWS), np.uint16),
        np.zeros((pages, heads, -(-dim // ROWS), PAGE, ROWS), np.int8),
        np.zeros((pages, heads, width // BLOCK, PAGE), np.uint16),
    )


def step_of(
    slots: Ints, positions: Ints, tables: np.ndarray, angles: Doubles | None = None, first: int = 0, **more: Any
) -> Step:
    """Return a step's tokens; tables: of all slots. angles: (ropes, all tokens, dims / 2). more: query_scales."""
    angles = np.zeros((1, first + len(slots), 1)) if angles is None else angles
    scales = more.get("query_scales", np.ones(len(slots))).astype(np.float32)
    cos, sin = (np.ascontiguousarray(turn(angles), np.float32) for turn in (np.cos, np.sin))
    return Step(slots.astype(np.int32), positions.astype(np.int32), tables, scales, cos, sin, first)


# --------------------------------------------------------------------------------------------------------------------
# Before attention
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """3 query heads and 2 KV heads of 24 dimensions for some tokens, and what is to become of them.

    Attributes:
        turned: dimensions of a head that are rotated. norm: "", "first" or "last", before or after the rotation.
        clip: what values are limited to in size; 0 for no limit.
    """

    tokens: int
    bias: bool = False
    norm: str = ""
    turned: int = 24
    clip: float = 0.0
    heads: int = 3
    kv_heads: int = 2
    dim: int = 24
    k_start: int = 80  # q takes 72 columns, k and v 48 each; the rest is padding
    v_start: int = 128
    width: int = 176

    def qkv(self) -> Floats:
        """Return the projections side by side."""
        return random(1, self.tokens, self.width)

    def angles(self) -> Doubles:
        """Return the angles (ropes, all tokens, dims / 2) of two rotations, of two tokens more than there are."""
        return np.random.default_rng(self.tokens).uniform(0, 30, (2, self.tokens + 2, self.turned // 2))

    def preparation(self) -> Preparation:
        """Return what the kernel is told."""
        bias = random(2, self.width) if self.bias else EMPTY
        q_norm, k_norm = (random(seed, self.dim) if self.norm else EMPTY for seed in (3, 4))
        return Preparation(bias, q_norm, k_norm, 1e-6, int(self.norm == "last"), self.clip, self.k_start, self.v_start)

    def expected(self, angles: Doubles) -> tuple[Floats, Floats, Floats]:
        """Return queries, keys and values (tokens, heads, dim) as attention takes them."""
        p, n, dim = self.preparation(), self.tokens, self.dim
        sums = self.qkv() + p.bias if self.bias else self.qkv()
        q, k, v = (
            sums[:, start : start + count * dim].reshape(n, count, dim)
            for start, count in ((0, self.heads), (self.k_start, self.kv_heads), (self.v_start, self.kv_heads))
        )

        def finished(part: Floats, norm: Floats) -> Floats:
            if self.norm == "first":
                part = naive_layers.rms_norm(part, norm, 1e-6)
            part = naive_layers.rotate(self.clipped(part), angles)
            return naive_layers.rms_norm(part, norm, 1e-6) if self.norm == "last" else part

        return finished(q, p.q_norm), finished(k, p.k_norm), self.clipped(v)

    def clipped(self, values: Floats) -> Floats:
        """Return values within the limits, if there are any."""
        return np.clip(values, -self.clip, self.clip) if self.clip else values


@every_threads
@every_cache
@pytest.mark.parametrize(
    "given",
    [Prepared(n, bias, norm) for n in (1, 3, 17) for bias in (False, True) for norm in ("", "first", "last")]
    + [Prepared(5, True, norm, turned) for norm in ("", "first", "last") for turned in (2, 10, 16)]
    + [Prepared(5, True, norm, clip=0.75) for norm in ("", "first", "last")],
    ids=str,
)
def test_rope_and_store(given: Prepared, half_cache: bool, threads: int) -> None:
    slots, length, dim, tokens = 2, 300, given.dim, given.tokens
    tables = tables_of(slots, length)
    rng = np.random.default_rng(given.tokens)
    slot_of, positions = rng.integers(0, slots, tokens), rng.permutation(length)[:tokens]
    empty = np.full((slots, given.kv_heads, length, dim), 7, np.uint16 if half_cache else np.float32)
    cache, angles, qkv = kv_layer(empty, empty), given.angles(), given.qkv()
    q, k, v = given.expected(angles[1, 2:])
    heads = Heads(dim, 5, 5 + given.heads, 2, 0, 1.0, 0.0)
    rope_and_store(qkv, heads, given.preparation(), step_of(slot_of, positions, tables, angles, 2), 1, cache, threads)
    np.testing.assert_allclose(qkv[:, : given.heads * dim].reshape(q.shape), q, rtol=1e-5, atol=2e-6)
    at, i = np.arange(PAGE)[:, None], np.arange(dim)
    pages, inside = tables[slot_of, positions // PAGE], positions % PAGE
    all_keys = cache.keys[:, :, at // ROWS, i, at % ROWS]
    all_values = cache.values[:, :, i // ROWS, at, i % ROWS]
    keys, values = (stored[pages, :, inside] for stored in (all_keys, all_values))
    if half_cache:
        np.testing.assert_array_equal(values, naive_numbers.half(v).view(np.uint16))
        np.testing.assert_allclose(keys.view(np.float16).astype(np.float32), k, rtol=1e-3, atol=1e-4)
    else:
        np.testing.assert_array_equal(values, v)
        np.testing.assert_allclose(keys, k, rtol=1e-5, atol=2e-6)
    for stored, ref in ((all_keys, in_pages(empty, 2)), (all_values, in_pages(empty, 2))):  # nothing else was written
        stored[pages, :, inside] = 7
        np.testing.assert_array_equal(stored, ref)
    for stored in (cache.keys, cache.values):  # padding stays zero
        assert np.count_nonzero(stored) == empty.size


def test_positions_that_turn_nothing() -> None:
    given = Prepared(4)
    angles, qkv = np.zeros((1, 4, 12)), given.qkv()
    cache = kv_layer(*[np.zeros((1, 2, 8, 24), np.float32)] * 2)
    step = step_of(np.zeros(4, np.int64), np.arange(4), tables_of(1, 8), angles)
    rope_and_store(qkv, Heads(24, 0, 3, 2, 0, 1.0, 0.0), given.preparation(), step, 0, cache, 1)
    np.testing.assert_array_equal(qkv, given.qkv())


# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """The heads of a rank, [first, last) of the model's, and how they attend."""

    first: int
    last: int
    group: int
    window: int = 0
    out_start: int = 0
    how: Scores = PLAIN_SCORES

    @property
    def kv(self) -> tuple[int, int]:
        """The KV heads that they read."""
        return self.first // self.group, -(-self.last // self.group)

    def attend(self, q: Floats, cache: KVLayer, step: Step, threads: int = 1) -> Floats:
        """Return the attention (tokens, heads, head_dim) by the kernel; q (tokens, the rank's heads, head_dim)."""
        tokens, count, dim = q.shape
        assert count == self.last - self.first
        scale = dim**-0.5 if self.how.scale is None else self.how.scale
        heads = Heads(dim, self.first, self.last, self.group, self.out_start, scale, self.how.softcap)
        sinks = EMPTY if self.how.sinks is None else self.how.sinks[self.first : self.last]
        out = np.full((tokens, self.out_start + count * dim + 5), -7, np.float32)
        flat = np.concatenate([q.reshape(tokens, -1), np.full((tokens, 4), np.nan, np.float32)], axis=1)
        attention(heads, self.window, sinks, flat, cache, step, out, threads)
        assert (out[:, : self.out_start] == -7).all()
        assert (out[:, self.out_start + count * dim :] == -7).all()
        return out[:, self.out_start : self.out_start + count * dim].reshape(q.shape)


def held(values: Floats, half_cache: bool) -> tuple[np.ndarray, Floats]:
    """Return what a cache holds of values, and what that stands for."""
    if not half_cache:
        return values, values
    halves = naive_numbers.half(values)
    return halves.view(np.uint16), halves.astype(np.float32)


def check(rank: Rank, heads: int, half_cache: bool, query_scales: bool = False) -> None:
    """Check the attention of 17 tokens of three sequences of a model, and that threads change no bit."""
    dim, length, tokens = 24, 40, 17
    rng = np.random.default_rng(heads)
    slots, positions = rng.integers(0, 3, tokens), rng.integers(0, length, tokens)
    positions[:2] = 0, length - 1
    scales = np.linspace(0.5, 2, tokens) if query_scales else np.ones(tokens)
    q, kv = 3 * random(1, tokens, heads, dim), heads // rank.group
    (k, k_seen), (v, v_seen) = (held(random(seed, 3, kv, length, dim), half_cache) for seed in (2, 3))
    ref = np.concatenate([
        naive_layers.attention(q[t : t + 1] * np.float32(scales[t]), k_seen[slots[t]], v_seen[slots[t]],
                               positions[t : t + 1], rank.window, rank.how) for t in range(tokens)
    ])  # fmt: skip
    own = slice(*rank.kv)
    cache, step = kv_layer(k[:, own], v[:, own]), step_of(slots, positions, tables_of(3, length), query_scales=scales)
    got = rank.attend(q[:, rank.first : rank.last], cache, step)
    tolerance = 3e-6 + 2e-7 * rank.how.softcap  # a cap's scores are exact to its last place, not to their own
    np.testing.assert_allclose(got, ref[:, rank.first : rank.last], rtol=1e-5, atol=tolerance)
    for threads in (2, 3):
        again = rank.attend(q[:, rank.first : rank.last], cache, step, threads)
        np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize(("heads", "group"), [(4, 1), (4, 2), (7, 7)], ids=str)
@every_cache
def test_attention(window: int, heads: int, group: int, half_cache: bool) -> None:
    check(Rank(0, heads, group, window), heads, half_cache)


HOW = {
    "scale": Scores(scale=0.7),
    "softcap": Scores(softcap=3.0),
    "a softcap that hardly caps": Scores(softcap=50.0),
    "sinks": Scores(sinks=np.array([-3, 0.5, 2, 9, 0, -np.inf, 4, 30, 1], np.float32)),
    "all": Scores(0.3, 2.0, np.array([0.5, 1, -2, 0, 1.5, -8, 2, 0.1, 1], np.float32)),
}


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("first", "last"), [(0, 9), (2, 8), (4, 5)], ids=str)
def test_how_scores_become_weights(name: str, window: int, first: int, last: int) -> None:
    check(Rank(first, last, 3, window, how=HOW[name]), 9, False)
    check(Rank(first, last, 3, window, how=HOW[name]), 9, True, query_scales=True)


def test_a_softcap_and_a_sink_change_something() -> None:
    """So that the tests above would see them left out."""
    q, k, v = 3 * random(1, 1, 2, 16), random(2, 1, 2, 10, 16), random(3, 1, 2, 10, 16)
    step = step_of(np.zeros(1, np.int64), np.array([9]), tables_of(1, 10))
    plain = Rank(0, 2, 1).attend(q, kv_layer(k, v), step)
    for how in (Scores(softcap=3.0), Scores(sinks=np.zeros(2, np.float32)), Scores(scale=0.7)):
        assert np.abs(Rank(0, 2, 1, how=how).attend(q, kv_layer(k, v), step) - plain).max() > 1e-3
    scaled = Rank(0, 2, 1).attend(
        q, kv_layer(k, v), step_of(np.zeros(1, np.int64), np.array([9]), tables_of(1, 10), query_scales=np.full(1, 2))
    )
    assert np.abs(scaled - plain).max() > 1e-3


@pytest.mark.parametrize("heads", [(0, 1), (0, 3), (1, 5), (3, 4), (5, 9), (2, 8)], ids=str)
def test_attention_of_a_ranks_heads(heads: tuple[int, int]) -> None:
    """Give a rank some of 9 heads that share 3 KV heads, so that cuts go through KV heads."""
    check(Rank(*heads, group=3, out_start=8), 9, False)


def test_attention_looks_at_no_later_position() -> None:
    q, k, v = random(1, 1, 2, 16), random(2, 1, 2, 10, 16), random(3, 1, 2, 10, 16)
    step, rank = step_of(np.zeros(1, np.int64), np.array([5]), tables_of(1, 10)), Rank(0, 2, 1, window=3)
    before = rank.attend(q, kv_layer(k, v), step)
    k[:, :, 6:], v[:, :, 6:], k[:, :, :3], v[:, :, :3] = 1e4, -1e4, 1e4, -1e4
    np.testing.assert_array_equal(rank.attend(q, kv_layer(k, v), step), before)


@every_cache
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("heads", [(0, 8, 4), (3, 7, 4), (0, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["plain", "sinks"])
def test_attention_over_long_contexts(
    name: str, half_cache: bool, window: int, tokens: int, heads: tuple[int, int, int]
) -> None:
    """Several blocks of the online softmax; few heads and many threads cut the positions between threads."""
    first, last, group = heads
    dim, length, kv = 32, 1100, -(-last // group)
    how = Scores(sinks=np.linspace(-2, 9, kv * group).astype(np.float32)) if name == "sinks" else PLAIN_SCORES
    q, rank = 2 * random(1, tokens, kv * group, dim), Rank(first, last, group, window, how=how)
    (k, k_seen), (v, v_seen) = (held(random(seed, kv, length, dim), half_cache) for seed in (2, 3))
    positions, zeros, own = np.arange(length - tokens, length), np.zeros(tokens, np.int64), slice(*rank.kv)
    cache, mine = kv_layer(k[None, own], v[None, own]), q[:, first:last]
    ref = naive_layers.attention(q, k_seen, v_seen, positions, window, how)[:, first:last]
    for threads in (1, 2, 5):
        got = rank.attend(mine, cache, step_of(zeros, positions, tables_of(1, length)), threads)
        np.testing.assert_allclose(got, ref, rtol=1e-5, atol=3e-6)


@every_cache
@pytest.mark.parametrize("window", [0, 100, 300])
def test_tokens_of_one_sequence_get_the_same_bits_alone(half_cache: bool, window: int) -> None:
    """Neighbouring tokens share an item, and so the reading of keys: no bit depends on that."""
    tokens, length, dim = 30, 600, 16
    q = random(1, tokens, 4, dim)
    (k, _), (v, _) = (held(random(seed, 1, 2, length, dim), half_cache) for seed in (2, 3))
    cache, rank, tables = kv_layer(k, v), Rank(0, 4, 2, window), tables_of(1, length)
    positions, zeros = np.arange(length - tokens, length), np.zeros(tokens, np.int64)
    together = rank.attend(q, cache, step_of(zeros, positions, tables))
    for t in range(tokens):
        alone = rank.attend(q[t : t + 1], cache, step_of(zeros[:1], positions[t : t + 1], tables))
        np.testing.assert_array_equal(alone[0], together[t])


def test_attention_to_scores_that_would_overflow() -> None:
    q, k, v = 1e3 * random(1, 1, 1, 32), 1e3 * random(2, 1, 1, 6, 32), random(3, 1, 1, 6, 32)
    got = Rank(0, 1, 1).attend(q, kv_layer(k, v), step_of(np.zeros(1, np.int64), np.array([5]), tables_of(1, 6)))
    np.testing.assert_allclose(got, naive_layers.attention(q, k[0], v[0], np.array([5]), 0), rtol=1e-5)


def as_codes(values: Floats) -> Floats:
    """Return what values (..., dim) become as int8 codes with a float16 scale for 32 dimensions."""
    dim = values.shape[-1]
    blocks = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -dim % BLOCK)]).reshape(*values.shape[:-1], -1, BLOCK)
    scales = naive_numbers.half(np.abs(blocks).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    codes = np.rint(blocks / scales).clip(-127, 127)
    return (codes * scales).reshape(*values.shape[:-1], -1)[..., :dim].astype(np.float32)


@pytest.mark.parametrize("dim", all_but([32], [24, 32, 80]))
@pytest.mark.parametrize("tokens", [1, 9])
@every_threads
def test_quantised_cache(dim: int, tokens: int, threads: int) -> None:
    """Keys and values stored as Q80 are attended to as what they stand for."""
    heads, length = 2, 300
    cache, tables = quantised_layer(4, heads, dim), tables_of(2, length)
    qkv = random(1, length, 3 * 96 * heads)
    prepared = Preparation(EMPTY, EMPTY, EMPTY, 1e-6, 0, 0.0, k_start=96 * heads, v_start=2 * 96 * heads)
    model = Heads(dim, 0, heads, 1, 0, 1.0, 0.0)
    ones, positions = np.ones(length, np.int64), np.arange(length)
    rope_and_store(qkv, model, prepared, step_of(ones, positions, tables), 0, cache, threads)
    k, v = (
        qkv[:, at : at + heads * dim].reshape(length, heads, dim).swapaxes(0, 1)
        for at in (prepared.k_start, prepared.v_start)
    )
    q, last = random(2, tokens, heads, dim), positions[length - tokens :]
    got = Rank(0, heads, 1).attend(q, cache, step_of(ones[:tokens], last, tables), threads)
    ref = naive_layers.attention(q, as_codes(k), as_codes(v), last, 0)
    np.testing.assert_allclose(got, ref, rtol=1e-4, atol=2e-5)
    exact = naive_layers.attention(q, k, v, last, 0)
    assert np.abs(exact - ref).max() > 1e-4  # the comparison sees quantisation
