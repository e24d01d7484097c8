"""The gated delta net and the gated short convolution as mixers, for one rank's heads or channels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..kernels.compiled import call, inner
from ..kernels.delta_net import DeltaNet, DeltaNetShape, DeltaNetState, delta_net_mix
from ..kernels.elementwise import quantise
from ..kernels.matrix import Activations
from ..kernels.short_conv import ShortConv, find_runs, short_conv_mix
from .linear import SideBySide, multiply, project


class StateScratch(NamedTuple):
    """Buffers: the projections side by side (tokens, n) float32, and the input of the output projection."""

    projected: np.ndarray
    mixed: Activations


class DeltaNets(NamedTuple):
    """q, k, v, z, b, a column-parallel by value heads (q and k by the key heads these read), o row-parallel over the
    same value heads. One all-reduce.

    Attributes:
        projections: q, k, v, z, b, a. o: matrix. Fields (layers, FIELDS) each. shape: see `DeltaNetShape`.
        taps, bias, rate, dt_bias, norm: of `kernels.delta_net.DeltaNet`, with a first axis of layers. eps: of the norm.
        out_start: column of o's input where the first head's output begins.
    """

    projections: SideBySide
    o: tuple
    shape: DeltaNetShape
    taps: np.ndarray
    bias: np.ndarray
    rate: np.ndarray
    dt_bias: np.ndarray
    norm: np.ndarray
    eps: float
    out_start: int


class DeltaNetMemory(NamedTuple):
    """States of a segment's layers: like `kernels.delta_net.DeltaNetState`, with a first axis of layers."""

    conv: np.ndarray
    states: np.ndarray


class ShortConvs(NamedTuple):
    """b, c, x column-parallel by channels, o row-parallel over the same channels. One all-reduce.

    Attributes:
        projections: b, c, x. o: matrix. Fields (layers, FIELDS) each.
        in_bias, taps, bias: of `kernels.short_conv.ShortConv`, with a first axis of layers.
    """

    projections: SideBySide
    o: tuple
    in_bias: np.ndarray
    taps: np.ndarray
    bias: np.ndarray


class ShortConvMemory(NamedTuple):
    """The last inputs of a segment's layers: (layers, slots, taps - 1, channels to 16s) float32."""

    states: np.ndarray


@inner
def recur(w, layer, x, step, memory, scratch, out, threads):
    """Write this rank's term of a layer's delta net into out (tokens, hidden), and bring its states forward."""
    tokens, projected, mixed = out.shape[0], scratch.projected, scratch.mixed
    call(project, (w.projections, layer, x, projected, tokens, threads))
    weights = DeltaNet(w.taps[layer], w.bias[layer], w.rate[layer], w.dt_bias[layer], w.norm[layer], np.float32(w.eps))
    state = DeltaNetState(memory.conv[layer], memory.states[layer])
    runs = find_runs(step.slots, step.positions)
    call(delta_net_mix, (weights, w.shape, projected[:tokens], state, runs, mixed.values, w.out_start, threads))
    quantise(mixed, tokens, threads)
    call(multiply, (w.o, layer, mixed, out, tokens, threads))


@inner
def convolve(w, layer, x, step, memory, scratch, out, threads):
    """Write this rank's term of a layer's short convolution into out (tokens, hidden), and keep its last inputs."""
    tokens, projected, mixed = out.shape[0], scratch.projected, scratch.mixed
    call(project, (w.projections, layer, x, projected, tokens, threads))
    weights = ShortConv(w.in_bias[layer], w.taps[layer], w.bias[layer])
    runs = find_runs(step.slots, step.positions)
    call(short_conv_mix, (weights, projected[:tokens], memory.states[layer], runs, mixed.values, np.int64(0), threads))
    quantise(mixed, tokens, threads)
    call(multiply, (w.o, layer, mixed, out, tokens, threads))
