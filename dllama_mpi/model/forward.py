"""The forward pass: all decoder layers of a step, their all-reduces included, in one compiled call a segment.

A segment is a run of layers of the same kinds. Each layer is two halves, a mixer and a feed-forward, chosen by the
types of their weights; each half reads the normalised residual, writes this rank's term, and is summed over ranks by
one all-reduce, which overlaps with the other part's computing where the step is cut into two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import overload

from ..kernels.attention import KVLayer
from ..kernels.compiled import call, entry, inner
from ..kernels.elementwise import normalise_row, quantise_row
from ..kernels.layout import BLOCK
from ..kernels.matrix import ADDRESS, STRIDE, TILE_ROWS
from ..kernels.parallel import run_parallel
from ..kernels.simd import address
from ..parallel.collective.exchange import Ahead, finish_exchange, start_exchange
from ..parallel.collective.link import LAST, PARTS, TERMS
from ..parallel.collective.payload import add_blocks
from .attention import Attention, Exchange, attend
from .experts import Experts, mixture_of_experts
from .mlp import GatedMLP, gated_mlp
from .state import DeltaNets, ShortConvs, convolve, recur


class Step(NamedTuple):
    """The tokens of a step, or of a part of it.

    Attributes:
        slots, positions: (tokens,) int32; the tokens of one sequence stand in order.
        tables: (1 or 2, slots, n) int32, the pages of the KV cache that hold each slot's positions, 256 a page. The
            second is that of layers with a window, where they have pages of their own. A mixer gets its own.
        query_scales: (tokens,) float32, what queries are multiplied with besides the layer's scale.
        cos, sin: (ropes, all tokens, rotated dimensions / 2) float32, of each kind of rotation in the model.
        first: the index of the first of these tokens there.
    """

    slots: np.ndarray
    positions: np.ndarray
    tables: np.ndarray
    query_scales: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    first: int


class Norms(NamedTuple):
    """The norms around the halves of one kind, RMSNorms (arXiv:1910.07467), and what is added after the all-reduce.

    Attributes:
        before: (layers, hidden to 32s) float32 weights of the norm of the half's input; (layers, 0): no norm.
        after: the same of the norm of its output. bias: (layers, hidden to 32s), added to the output; (layers, 0): none
        scale: what the output is multiplied with before it is added to the residual.
    """

    before: np.ndarray
    after: np.ndarray
    bias: np.ndarray
    scale: float


class Segment(NamedTuple):
    """A run of layers of the same kinds; every array has a first axis of layers.

    Attributes:
        mixer, feed: weights, see `mix` and `feed`. memory: what the mixers keep of past positions, see `mix`.
        mixer_norms, feed_norms: see `Norms`. layers: their number. hidden: size of the residual without padding.
        eps: of the norms. ends: whether they are the model's last. mixer_sums: whether the mixer has an all-reduce of
        its own.
    """

    mixer: tuple
    feed: tuple
    memory: tuple
    mixer_norms: Norms
    feed_norms: Norms
    layers: int
    hidden: int
    eps: float
    ends: bool
    mixer_sums: bool


class Scratch(NamedTuple):
    """Buffers of a step: the normalised input of a half, and those of its mixer and its feed-forward."""

    hidden: tuple
    mixer: tuple
    feed: tuple


class KVMemory(NamedTuple):
    """The KV cache of a segment's layers: like `kernels.attention.KVLayer`, the pages of all layers in one row.

    Attributes:
        pages, window_pages: of a layer that sees all positions, and of one with a window.
    """

    marker: np.ndarray
    keys: np.ndarray
    key_scales: np.ndarray
    values: np.ndarray
    value_scales: np.ndarray
    pages: int
    window_pages: int


@inner
def layer_pages(memory, windows, layer):
    """Return where a layer's pages begin and end in a segment's memory; windows: see `Attention`."""
    first = 0
    for each in range(layer):
        first += memory.window_pages if windows[each] > 0 else memory.pages
    return first, first + (memory.window_pages if windows[layer] > 0 else memory.pages)


# ---- the halves, chosen by type


def mix(w, layer, x, step, memory, scratch, exchange, out, threads):
    """Write this rank's term of a layer's mixer into out (tokens, hidden), and remember the step's tokens."""
    raise NotImplementedError  # compiled code only


@overload(mix)
def _choose_mixer(w, layer, x, step, memory, scratch, exchange, out, threads):
    if w.instance_class is Attention:

        def attention(w, layer, x, step, memory, scratch, exchange, out, threads):
            a, b = layer_pages(memory, w.windows, layer)
            cache = KVLayer(
                memory.marker,
                memory.keys[a:b],
                memory.key_scales[a:b],
                memory.values[a:b],
                memory.value_scales[a:b],
            )
            table = min(step.tables.shape[0] - 1, 1 if w.windows[layer] > 0 else 0)
            own = Step(
                step.slots, step.positions, step.tables[table], step.query_scales, step.cos, step.sin, step.first
            )
            call(attend, (w, layer, x, own, cache, scratch, exchange, out, threads))

        return attention
    if w.instance_class is DeltaNets:
        return lambda w, layer, x, step, memory, scratch, exchange, out, threads: call(
            recur, (w, layer, x, step, memory, scratch, out, threads)
        )
    if w.instance_class is ShortConvs:
        return lambda w, layer, x, step, memory, scratch, exchange, out, threads: call(
            convolve, (w, layer, x, step, memory, scratch, out, threads)
        )
    return None


def feed(w, layer, x, scratch, tokens, out, threads):
    """Write this rank's term of a layer's feed-forward into out (tokens, hidden)."""
    raise NotImplementedError  # compiled code only


@overload(feed)
def _choose_feed(w, layer, x, scratch, tokens, out, threads):
    if w.instance_class is GatedMLP:
        return lambda w, layer, x, scratch, tokens, out, threads: call(
            gated_mlp, (w, layer, x, scratch, tokens, out, threads)
        )
    if w.instance_class is Experts:
        return lambda w, layer, x, scratch, tokens, out, threads: call(
            mixture_of_experts, (w, layer, x, scratch, tokens, out, threads)
        )
    return None


# ---- between the halves


class Residual(NamedTuple):
    """The residual stream of some tokens.

    Attributes:
        rows: (tokens, hidden to 32s) float32, padding zero; the same bits on every rank. size: hidden. eps: of norms.
    """

    rows: np.ndarray
    size: int
    eps: float


class Sum(NamedTuple):
    """The outcome of a half: where its terms lie (see `parallel.collective`), and what becomes of them.

    Attributes:
        source: (4,) int64. bias, after: (hidden to 32s,) float32 or empty. scale: see `Norms`.
    """

    source: np.ndarray
    bias: np.ndarray
    after: np.ndarray
    scale: float


@inner
def _add_row(residual, t, addend, scratch):
    """Add a half's outcome to one token's residual; scratch: a row like it."""
    row, source = residual.rows[t], addend.source
    blocks, is_plain, total = row.size // BLOCK, addend.after.size == 0 and addend.scale == 1, row
    if not is_plain:
        total = scratch
        for i in range(total.size):
            total[i] = 0
    for k in range(source[1]):
        add_blocks(address(total), source[0] + k * source[2] + t * blocks * source[3], blocks, source[3])
    for i in range(addend.bias.size):
        total[i] += addend.bias[i]
    if is_plain:
        return
    if addend.after.size > 0:
        normalise_row(total, addend.after, residual.size, np.float32(residual.eps), total)
    for i in range(row.size):
        row[i] += np.float32(addend.scale) * total[i]


@inner
def _add_share(residual, addend, norm, x, is_last, thread, threads):
    tokens = residual.rows.shape[0]
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        _add_row(residual, t, addend, x.values[t])
        if is_last != 0:
            continue
        if norm.size > 0:
            normalise_row(residual.rows[t], norm, residual.size, np.float32(residual.eps), x.values[t])
        else:
            for i in range(residual.rows.shape[1]):
                x.values[t, i] = residual.rows[t, i]
        if x.codes.size > 0:
            quantise_row(x.values[t], x.codes[t], x.scales[t], x.offsets[t])


@entry
def add_and_normalise(residual, addend, norm, x, is_last, threads):
    """Add the outcome of a half to the residual, in place; write its norm to x unless this is the last.

    norm: (hidden to 32s,) weights, or empty to write the residual as it is. x: `Activations`, quantised as well where
    they have room for it; always used as scratch.
    """
    run_parallel(
        _add_share, (residual, addend, norm, x, is_last), np.int64(1) if residual.rows.shape[0] == 1 else threads
    )


# ---- the layers


def first_matrix(w):
    """Return the matrix that a half reads first."""
    raise NotImplementedError  # compiled code only


_FIRST = {
    Attention: lambda w: w.qkv.first,
    DeltaNets: lambda w: w.projections.first,
    ShortConvs: lambda w: w.projections.first,
    GatedMLP: lambda w: w.gate,
    Experts: lambda w: w.router,
}


@overload(first_matrix)
def _choose_first_matrix(w):
    return _FIRST[w.instance_class]


@inner
def _ahead(w, layer, threads):
    """Return the memory that a thread reads first of a half."""
    fields = first_matrix(w).fields[layer]
    return Ahead(fields[ADDRESS], fields[STRIDE] * fields[TILE_ROWS] // threads)


@entry
def decoder_layers(segment, step, residual, scratch, terms, link, parts, turn, threads):
    """Pass the residual (tokens, hidden to 32s) float32 through a segment's layers, in place.

    terms: (2, >= tokens, hidden to 32s) float32, where this rank's terms of all-reduces are written, in turns; turn:
    which is next. link: see `parallel.collective.link`. parts: bounds of the parts of the tokens, whose all-reduces
    overlap with the other part's computing. Returns the next turn.
    """
    count, x, sources = parts.size - 1, scratch.hidden, np.zeros((PARTS, 4), np.int64)
    mixing, feeding, goes_on, ends = segment.mixer_norms, segment.feed_norms, np.int64(0), np.int64(1)
    for layer in range(segment.layers):
        own = 1 - turn if segment.mixer_sums else turn  # such a mixer has an all-reduce of its own before
        for p in range(count):
            a, b = parts[p], parts[p + 1]
            rows = Residual(residual[a:b], segment.hidden, segment.eps)
            finish_exchange(link, sources[p])
            addend = Sum(sources[p], feeding.bias[layer - 1], feeding.after[layer - 1], feeding.scale)
            if layer == 0:  # nothing was started yet
                addend = Sum(sources[p], feeding.bias[0, :0], feeding.after[0, :0], 1.0)
            call(add_and_normalise, (rows, addend, mixing.before[layer], x, goes_on, threads))
            tokens = Step(
                step.slots[a:b], step.positions[a:b], step.tables, step.query_scales[a:b], step.cos, step.sin, a
            )
            exchange = Exchange(link, p, terms[turn, a:b])
            mix(segment.mixer, layer, x, tokens, segment.memory, scratch.mixer, exchange, terms[own, a:b], threads)
            start_exchange(
                link,
                address(terms[own, a:b]),
                (b - a) * terms.shape[2] // BLOCK,
                p,
                TERMS,
                sources[p],
                _ahead(segment.feed, layer, threads),
            )
        turn = 1 - own
        for p in range(count):
            a, b = parts[p], parts[p + 1]
            rows = Residual(residual[a:b], segment.hidden, segment.eps)
            finish_exchange(link, sources[p])
            addend = Sum(sources[p], mixing.bias[layer], mixing.after[layer], mixing.scale)
            call(add_and_normalise, (rows, addend, feeding.before[layer], x, goes_on, threads))
            feed(segment.feed, layer, x, scratch.feed, b - a, terms[turn, a:b], threads)
            start_exchange(
                link,
                address(terms[turn, a:b]),
                (b - a) * terms.shape[2] // BLOCK,
                p,
                LAST if segment.ends and layer == segment.layers - 1 else TERMS,
                sources[p],
                _ahead(segment.mixer, min(layer + 1, segment.layers - 1), threads),
            )
        turn = 1 - turn
    for p in range(count):
        rows, after = Residual(residual[parts[p] : parts[p + 1]], segment.hidden, segment.eps), segment.layers - 1
        finish_exchange(link, sources[p])
        addend = Sum(sources[p], feeding.bias[after], feeding.after[after], feeding.scale)
        call(add_and_normalise, (rows, addend, mixing.before[0, :0], x, ends, threads))
    return turn
