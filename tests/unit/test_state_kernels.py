"""The kernels with recurrent state against their twins in ``tests.naive_state``, over odd shapes.

A sequence is fed in steps of several tokens, with other sequences around it; the twin computes it whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from dllama_mpi.kernels.delta_net import DeltaNet, DeltaNetShape, DeltaNetState, delta_net_mix
from dllama_mpi.kernels.short_conv import Runs, ShortConv, find_runs, short_conv_mix
from tests import naive_state
from tests.naive_numbers import Doubles, Floats
from tests.unit.other_process import run_with

Steps = list[list[tuple[int, int]]]

SEQUENCES = (13, 1, 40, 5)  # lengths; each has a slot of its own, the last one first
WHOLE: Steps = [[(s, n) for s, n in enumerate(SEQUENCES)]]
ALONE: Steps = [[(s, n)] for s, n in enumerate(SEQUENCES)]
MIXED: Steps = [
    [(2, 17), (0, 1)],
    [(0, 2), (3, 1), (2, 1)],
    [(1, 1), (2, 21), (0, 9)],
    [(3, 2)],
    [(0, 1), (2, 1), (3, 2)],
]
"""Steps of pieces: which sequence, and how many of its tokens."""

every_cut = pytest.mark.parametrize("steps", [WHOLE, ALONE, MIXED], ids=["whole", "alone", "mixed"])
every_threads = pytest.mark.parametrize("threads", [1, 2, 3, 7])


def random(seed: int, *shape: int) -> Floats:
    """Return normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ceil16(n: int) -> int:
    """Return n rounded up to a multiple of 16."""
    return -(-n // 16) * 16


def slot_of(sequence: int) -> int:
    """Return a sequence's slot, not its number, and slot 1 for none."""
    return (0, 2, 3, 4)[len(SEQUENCES) - 1 - sequence]


SLOTS = 5


def pieces_of(steps: Steps) -> list[list[tuple[int, int, int]]]:
    """Return steps of (sequence, first token, tokens)."""
    done = [0] * len(SEQUENCES)
    result = []
    for step in steps:
        row = []
        for sequence, count in step:
            row.append((sequence, done[sequence], count))
            done[sequence] += count
        result.append(row)
    assert done == list(SEQUENCES)
    return result


def runs_of(pieces: list[tuple[int, int, int]]) -> Runs:
    """Return the runs of a step."""
    slots = np.concatenate([np.full(n, slot_of(s), np.int32) for s, _, n in pieces])
    positions = np.concatenate([np.arange(first, first + n, dtype=np.int32) for _, first, n in pieces])
    return find_runs(slots, positions)


def parts_side_by_side(parts: list[Floats]) -> Floats:
    """Return parts (tokens, n) side by side, each padded with zeros to a multiple of 16 columns."""
    return np.ascontiguousarray(np.concatenate([np.pad(p, ((0, 0), (0, -p.shape[1] % 16))) for p in parts], axis=1))


def test_find_runs() -> None:
    runs = find_runs(np.array([2, 2, 2, 0, 5, 5, 1], np.int32), np.array([0, 1, 2, 9, 4, 5, 0], np.int32))
    assert runs.begins.tolist() == [0, 3, 4, 6, 7]
    assert runs.slots.tolist() == [2, 0, 5, 1]
    assert runs.starts.tolist() == [0, 9, 4, 0]
    assert find_runs(np.zeros(0, np.int32), np.zeros(0, np.int32)).begins.tolist() == [0]
    assert find_runs(np.array([3, 3], np.int32), np.array([7, 0], np.int32)).starts.tolist() == [7, 0]


# --------------------------------------------------------------------------------------------------------------------
# Gated short convolutions
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvCase:
    """A gated short convolution with inputs for all sequences."""

    channels: int
    taps: int
    bias: bool

    def inputs(self, sequence: int) -> list[Floats]:
        return [random(10 * sequence + i, SEQUENCES[sequence], self.channels) for i in range(3)]

    def weights(self) -> tuple[Floats, Floats, Floats]:
        """Return the taps (channels, taps), their bias, and the projection's bias (3, channels)."""
        taps, bias, in_bias = random(1, self.channels, self.taps), random(2, self.channels), random(3, 3, self.channels)
        return taps, bias * self.bias, in_bias * self.bias

    def expected(self, sequence: int) -> Doubles:
        taps, bias, in_bias = (w.astype(np.float64) for w in self.weights())
        b, c, x = (part + shift for part, shift in zip(self.inputs(sequence), in_bias, strict=True))
        return naive_state.gated_short_conv(b, c, x, taps, bias)

    def run(self, steps: Steps, threads: int) -> list[Floats]:
        """Return the kernel's results for each sequence, fed in steps."""
        taps, bias, in_bias = self.weights()
        width = ceil16(self.channels)
        padded = parts_side_by_side([*in_bias[:, None]])[0] if self.bias else np.zeros(0, np.float32)
        weights = ShortConv(padded, parts_side_by_side([taps.T]), parts_side_by_side([bias[None]])[0])
        states = np.full((SLOTS, self.taps - 1, width), np.nan, np.float32)
        results = [np.empty((0, self.channels), np.float32) for _ in SEQUENCES]
        for pieces in pieces_of(steps):
            rows = [[part[first : first + n] for part in self.inputs(s)] for s, first, n in pieces]
            projected = np.concatenate([parts_side_by_side(parts) for parts in rows])
            out = np.full((len(projected), width + 32), np.nan, np.float32)
            short_conv_mix(weights, projected, states, runs_of(pieces), out, 16, threads)
            assert np.isnan(out[:, :16]).all()
            assert np.isnan(out[:, 16 + width :]).all()
            assert (out[:, 16 + self.channels : 16 + width] == 0).all()
            at = 0
            for sequence, _, n in pieces:
                results[sequence] = np.concatenate([results[sequence], out[at : at + n, 16 : 16 + self.channels]])
                at += n
        assert np.isnan(states[1]).all()
        return results


CONVS = [ConvCase(48, 3, False), ConvCase(16, 2, True), ConvCase(100, 4, True), ConvCase(7, 8, False)]


@every_cut
@every_threads
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_short_conv(case: ConvCase, steps: Steps, threads: int) -> None:
    for sequence, got in enumerate(case.run(steps, threads)):
        np.testing.assert_allclose(got, case.expected(sequence), rtol=2e-5, atol=2e-5)


# --------------------------------------------------------------------------------------------------------------------
# The gated delta net
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetCase:
    """A gated delta net, or a rank's value heads of one, with inputs for all sequences."""

    key_heads: int
    group: int
    key_dim: int
    value_dim: int
    taps: int = 4
    bias: bool = False
    first: int = 0
    last: int = 0

    @property
    def heads(self) -> slice:
        """The rank's value heads."""
        return slice(self.first, self.last or self.key_heads * self.group)

    @property
    def keys(self) -> slice:
        """The rank's key heads, cut ones included."""
        return slice(self.heads.start // self.group, (self.heads.stop - 1) // self.group + 1)

    def inputs(self, sequence: int) -> dict[str, Floats]:
        tokens, value_heads = SEQUENCES[sequence], self.key_heads * self.group
        keys, values = (tokens, self.key_heads, self.key_dim), (tokens, value_heads, self.value_dim)
        shapes: dict[str, tuple[int, ...]] = {"q": keys, "k": keys, "v": values, "z": values}
        shapes |= {"b": (tokens, value_heads), "a": (tokens, value_heads)}
        return {name: random(10 * sequence + i, *shape) for i, (name, shape) in enumerate(shapes.items())}

    def weights(self) -> tuple[Floats, ...]:
        """Return taps (channels, taps), their bias, A_log, dt_bias and norm."""
        value_heads = self.key_heads * self.group
        channels = 2 * self.key_heads * self.key_dim + value_heads * self.value_dim
        bias = random(2, channels) * self.bias
        a_log = np.random.default_rng(3).uniform(-3, 1, value_heads).astype(np.float32)
        norm = np.float32(1) + random(5, self.value_dim) / np.float32(4)
        return random(1, channels, self.taps), bias, a_log, random(4, value_heads), norm

    def expected(self, sequence: int) -> tuple[Doubles, Doubles]:
        taps, bias, a_log, dt_bias, norm = (w.astype(np.float64) for w in self.weights())
        parts = {name: part.astype(np.float64) for name, part in self.inputs(sequence).items()}
        out, state = naive_state.delta_net(parts, taps, bias, a_log, dt_bias, norm, 1e-6)
        columns = slice(self.heads.start * self.value_dim, self.heads.stop * self.value_dim)
        return out[:, columns], state[self.heads]

    def own_channels(self, values: Floats) -> Floats:
        """Return the rank's channels of values (n, channels of q, k and v), side by side and padded."""
        widths = [self.key_heads * self.key_dim] * 2
        q, k, v = np.split(values, np.cumsum(widths), axis=1)
        keys = slice(self.keys.start * self.key_dim, self.keys.stop * self.key_dim)
        columns = slice(self.heads.start * self.value_dim, self.heads.stop * self.value_dim)
        return parts_side_by_side([q[:, keys], k[:, keys], v[:, columns]])

    def shape(self) -> DeltaNetShape:
        keys = ceil16((self.keys.stop - self.keys.start) * self.key_dim)
        heads = self.heads.stop - self.heads.start
        values = ceil16(heads * self.value_dim)
        z = 2 * keys + values
        b = z + values
        return DeltaNetShape(
            self.key_dim, self.value_dim, self.group, self.first, keys, 2 * keys, z, b, b + ceil16(heads)
        )

    def projected(self, sequence: int) -> Floats:
        """Return what the rank's projections would write for a sequence."""
        parts, tokens = self.inputs(sequence), SEQUENCES[sequence]
        qkv = np.concatenate([parts[name].reshape(tokens, -1) for name in "qkv"], axis=1)
        others = [parts[name][:, self.heads].reshape(tokens, -1) for name in "zba"]
        return np.concatenate([self.own_channels(qkv), parts_side_by_side(others)], axis=1)

    def run(self, steps: Steps, threads: int) -> tuple[list[Floats], Floats]:
        """Return the kernel's results for each sequence, fed in steps, and the memory."""
        taps, bias, a_log, dt_bias, norm = self.weights()
        own_taps, own_bias = self.own_channels(taps.T), self.own_channels(bias[None])[0]
        weights = DeltaNet(own_taps, own_bias, -np.exp(a_log[self.heads]), dt_bias[self.heads], norm, np.float32(1e-6))
        heads = self.heads.stop - self.heads.start
        state = DeltaNetState(
            np.full((SLOTS, self.taps - 1, own_taps.shape[1]), np.nan, np.float32),
            np.full((SLOTS, heads, ceil16(self.value_dim) // 16, self.key_dim, 16), np.nan, np.float32),
        )
        columns = slice(5, 5 + heads * self.value_dim)
        results = [np.empty((0, heads * self.value_dim), np.float32) for _ in SEQUENCES]
        for pieces in pieces_of(steps):
            projected = np.concatenate([self.projected(s)[first : first + n] for s, first, n in pieces])
            out = np.full((len(projected), columns.stop + 3), np.nan, np.float32)
            delta_net_mix(weights, self.shape(), projected, state, runs_of(pieces), out, columns.start, threads)
            assert np.isnan(out[:, : columns.start]).all()
            assert np.isnan(out[:, columns.stop :]).all()
            at = 0
            for sequence, _, n in pieces:
                results[sequence] = np.concatenate([results[sequence], out[at : at + n, columns]])
                at += n
        assert np.isnan(state.memory[1]).all()
        return results, state.memory


NETS = [
    NetCase(2, 2, 32, 32),
    NetCase(3, 1, 16, 16, taps=2, bias=True),
    NetCase(2, 2, 24, 24),  # heads end inside blocks of 16 columns
    NetCase(1, 3, 7, 40, taps=8),
    NetCase(2, 1, 128, 128, taps=3),
    NetCase(4, 2, 20, 12, first=1, last=4),  # a rank whose first key head is cut
    NetCase(3, 3, 10, 33, first=5, last=7),
]


@every_cut
@every_threads
@pytest.mark.parametrize("case", NETS, ids=str)
def test_delta_net(case: NetCase, steps: Steps, threads: int) -> None:
    results, memory = case.run(steps, threads)
    for sequence, got in enumerate(results):
        expected, states = case.expected(sequence)
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
        blocks = memory[slot_of(sequence)].transpose(0, 2, 1, 3).reshape(len(states), case.key_dim, -1)
        np.testing.assert_allclose(blocks[:, :, : case.value_dim], states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", NETS, ids=str)
def test_delta_net_does_not_depend_on_how_a_sequence_is_cut(case: NetCase) -> None:
    whole, memory = case.run(WHOLE, 1)
    for steps, threads in ((ALONE, 1), (MIXED, 1), (MIXED, 3)):
        results, other = case.run(steps, threads)
        np.testing.assert_array_equal(other, memory)
        for got, expected in zip(results, whole, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_short_conv_does_not_depend_on_how_a_sequence_is_cut(case: ConvCase) -> None:
    whole = case.run(WHOLE, 1)
    for steps, threads in ((ALONE, 1), (MIXED, 1), (MIXED, 3)):
        for got, expected in zip(case.run(steps, threads), whole, strict=True):
            np.testing.assert_array_equal(got, expected)


def check_few() -> None:
    """Check one case of each kernel; what another process runs for another instruction set."""
    test_short_conv(CONVS[2], MIXED, 1)
    test_delta_net(NETS[2], MIXED, 1)


@pytest.mark.slow  # kernels are compiled anew
def test_generic_instruction_set() -> None:
    run_with("generic", "test_state_kernels", "check_few")
