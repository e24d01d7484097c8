"""The gated feed-forward layer: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..kernels.activation import activate
from ..kernels.compiled import call, inner
from ..kernels.elementwise import quantise_row
from ..kernels.layout import BLOCK
from ..kernels.matrix import TILE_ROWS, Activations, multiply_rows
from ..kernels.parallel import run_parallel
from ..kernels.simd import address
from .linear import multiply


class GatedMLP(NamedTuple):
    """gate and up column-parallel, down row-parallel. One all-reduce.

    Attributes:
        gate, up, down: matrices, fields (layers, FIELDS). biases: (layers, 2, n) float32 of gate and up, n 0 for none.
        activation: see `kernels.activation`.
    """

    gate: tuple
    up: tuple
    down: tuple
    biases: np.ndarray
    activation: tuple


class MLPScratch(NamedTuple):
    """Buffers of a feed-forward layer.

    Attributes:
        inner: the input of down. up: (rows, n) float32, like inner.
    """

    inner: Activations
    up: np.ndarray


@inner
def finish_inner(scratch, activation, row, block):
    """Activate 32 values of a row of gate, held in `inner`, and of up; quantise them if `inner` has a Q80 form."""
    inner = scratch.inner
    offset = 4 * BLOCK * (row * (inner.values.shape[1] // BLOCK) + block)
    activate(activation, address(inner.values) + offset, address(scratch.up) + offset)
    if inner.codes.size > 0:
        part, one = slice(BLOCK * block, BLOCK * block + BLOCK), slice(block, block + 1)
        quantise_row(inner.values[row, part], inner.codes[row, part], inner.scales[row, one], inner.offsets[row, one])


@inner
def add_biases(biases, scratch, row, block):
    """Add the biases (2, n) of gate and up to 32 values of a row of each."""
    inner, up = scratch.inner.values, scratch.up
    for i in range(BLOCK * block, min(BLOCK * block + BLOCK, biases.shape[1])):
        inner[row, i] += biases[0, i]
        up[row, i] += biases[1, i]


@inner
def _gate_up_share(w, layer, x, scratch, tokens, thread, threads):
    gate, up, inner = w.gate.fields[layer], w.up.fields[layer], scratch.inner.values
    blocks, stride, start = inner.shape[1] // BLOCK, 4 * inner.shape[1], np.int64(0)
    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        first, last = 2 * block, min(2 * block + 2, gate[TILE_ROWS])
        multiply_rows(gate, first, last, x, start, tokens, address(inner), stride)
        multiply_rows(up, first, last, x, start, tokens, address(scratch.up), stride)
        for t in range(tokens):
            if w.biases.size > 0:
                add_biases(w.biases[layer], scratch, t, block)
            finish_inner(scratch, w.activation, t, block)


@inner
def gated_mlp(w, layer, x, scratch, tokens, out, threads):
    """Write this rank's term of a feed-forward layer of the first `tokens` rows of x into out (>= tokens, hidden)."""
    run_parallel(_gate_up_share, (w, layer, x, scratch, tokens), threads)
    call(multiply, (w.down, layer, scratch.inner, out, tokens, threads))
