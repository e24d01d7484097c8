"""Mixture of experts: a router, the chosen experts of each token, and an expert that all share.

Every rank holds a slice of every expert, cut as a dense layer is, so that no rank is idle whatever is chosen. The
router is whole on every rank: all compute the same bits from the same residual, and so choose alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba.extending import overload

from ..kernels.activation import sigmoids
from ..kernels.compiled import call, inner
from ..kernels.layout import BLOCK, ROWS
from ..kernels.matrix import FIELDS, TILE_ROWS, Activations, expert_of, multiply_rows
from ..kernels.parallel import run_parallel
from ..kernels.simd import address
from .linear import NoMatrix, multiply
from .mlp import MLPScratch, add_biases, finish_inner, gated_mlp

FEW_PAIRS = 16  # copying these costs less than a parallel region
SOFTMAX, SIGMOID = 0, 1  # how scores come from the router's logits


class Routing(NamedTuple):
    """How a token's experts are chosen and weighed.

    Attributes:
        experts, chosen: how many there are, and how many a token uses. scoring: SOFTMAX or SIGMOID.
        normalised: whether the weights of the chosen sum to 1, before they are multiplied with `scale`.
        groups, best_groups: only experts of the best groups may be chosen (arXiv:2412.19437); 1 and 1 for all.
    """

    experts: int
    chosen: int
    scoring: int
    normalised: int
    scale: float
    groups: int
    best_groups: int


class NoMLP(NamedTuple):
    """Stands where no expert is shared by all tokens."""

    count: int = 0


class Experts(NamedTuple):
    """gate, up column-parallel and down row-parallel, of each expert. One all-reduce.

    Attributes:
        router: matrix (experts, hidden), whole. router_bias, correction: (layers, experts) float32, added to logits,
            and to scores where experts are compared; (layers, 0) for none.
        gate, up, down: matrices of all experts, fields (layers, FIELDS). biases: (layers, experts, 2, n) float32 of
            gate and up; down_bias: (layers, experts, hidden), zero on all ranks but the first; empty for none.
        shared: a `GatedMLP` or `NoMLP`. shared_gate: matrix (1, hidden), whole, or `NoMatrix`.
    """

    router: tuple
    router_bias: np.ndarray
    correction: np.ndarray
    gate: tuple
    up: tuple
    down: tuple
    biases: np.ndarray
    down_bias: np.ndarray
    activation: tuple
    routing: Routing
    shared: tuple
    shared_gate: tuple


class ExpertsScratch(NamedTuple):
    """Buffers of a layer with experts, for steps of t tokens with k experts each.

    Attributes:
        logits, scores: (t, experts to 16s) float32. chosen: (t, k) int32. weights: (t, k) float32.
        starts: (experts + 1,) int64, where each expert's pairs begin. tokens, places: (t * k,) int32, of each pair, by
            expert: its token, and which of the token's choices it is.
        gathered: the input of each pair. mlp: buffers for pairs. product: (t, hidden) float32 of one expert.
        shared: buffers for the shared expert, of tokens. shared_gates: (t, 16) float32.
    """

    logits: np.ndarray
    scores: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    places: np.ndarray
    gathered: Activations
    mlp: MLPScratch
    product: np.ndarray
    shared: MLPScratch
    shared_gates: np.ndarray


# ---- choosing


@inner
def _group_is_open(scores, routing, group):
    """Return whether a group is among the best, by the sum of its two best scores; lower groups first on ties."""
    size, better, own = routing.experts // routing.groups, 0, np.float32(0)
    for pass_ in range(2):
        for g in range(routing.groups):
            if (pass_ == 0) != (g == group):
                continue
            first, second = np.float32(-np.inf), np.float32(-np.inf)
            for e in range(g * size, (g + 1) * size):
                if scores[e] > first:
                    first, second = scores[e], first
                elif scores[e] > second:
                    second = scores[e]
            total = first + second
            if g == group:
                own = total
            elif total > own or (total == own and g < group):
                better += 1
    return better < routing.best_groups


@inner
def _choose(scores, routing, chosen):
    """Write the experts of the best scores (experts,), best first, lower numbers first on ties."""
    count, size = 0, routing.experts // routing.groups
    is_open = True
    for e in range(routing.experts):
        if routing.best_groups < routing.groups and e % size == 0:
            is_open = _group_is_open(scores, routing, e // size)
        if not is_open or (count == routing.chosen and not scores[e] > scores[chosen[count - 1]]):
            continue
        j = count if count < routing.chosen else count - 1
        while j > 0 and scores[e] > scores[chosen[j - 1]]:
            chosen[j] = chosen[j - 1]
            j -= 1
        chosen[j] = e
        count = min(count + 1, routing.chosen)


@inner
def _weigh(values, routing, chosen, weights):
    """Write the weights of the chosen experts from logits (SOFTMAX) or from sigmoid scores."""
    total = np.float32(0)
    if routing.scoring == SOFTMAX:
        top = values[chosen[0]]
        for e in range(routing.experts):
            top = max(top, values[e])
        if routing.normalised == 0:
            for e in range(routing.experts):
                total += np.float32(math.exp(values[e] - top))
        for j in range(routing.chosen):
            weights[j] = np.float32(math.exp(values[chosen[j]] - top))
    else:
        for j in range(routing.chosen):
            weights[j] = values[chosen[j]]
        total = np.float32(1)
    if routing.normalised != 0:
        total = np.float32(1e-20)
        for j in range(routing.chosen):
            total += weights[j]
    for j in range(routing.chosen):
        weights[j] = weights[j] / total * np.float32(routing.scale)


@inner
def route(router_bias, correction, routing, scratch, tokens):
    """Choose and weigh the experts of each token from scratch.logits, and list the pairs of each expert in turn.

    router_bias, correction: one layer's.
    """
    logits, scores, chosen, weights = scratch.logits, scratch.scores, scratch.chosen, scratch.weights
    for t in range(tokens):
        for e in range(router_bias.size):
            logits[t, e] += router_bias[e]
        if routing.scoring == SIGMOID:
            sigmoids(address(logits[t]), np.int64(logits.shape[1]))
        for e in range(routing.experts):
            scores[t, e] = logits[t, e]
        for e in range(correction.size):
            scores[t, e] += correction[e]
        _choose(scores[t], routing, chosen[t])
        _weigh(logits[t], routing, chosen[t], weights[t])
    starts = scratch.starts
    for e in range(starts.size):
        starts[e] = 0
    for t in range(tokens):
        for j in range(routing.chosen):
            starts[chosen[t, j] + 1] += 1
    for e in range(routing.experts):
        starts[e + 1] += starts[e]
    for t in range(tokens):
        for j in range(routing.chosen):
            pair = starts[chosen[t, j]]
            scratch.tokens[pair], scratch.places[pair] = t, j
            starts[chosen[t, j]] += 1
    for e in range(routing.experts, 0, -1):  # filling moved each start to its end
        starts[e] = starts[e - 1]
    starts[0] = 0


# ---- the chosen experts


@inner
def _gather_share(x, scratch, pairs, thread, threads):
    """Copy the inputs of a thread's share of the pairs, in whichever form is used."""
    to = scratch.gathered
    for pair in range(pairs * thread // threads, pairs * (thread + 1) // threads):
        t = scratch.tokens[pair]
        if to.values.shape[0] > 0:
            for i in range(to.values.shape[1]):
                to.values[pair, i] = x.values[t, i]
        if to.codes.size > 0:
            for i in range(to.codes.shape[1]):
                to.codes[pair, i] = x.codes[t, i]
            for i in range(to.scales.shape[1]):
                to.scales[pair, i], to.offsets[pair, i] = x.scales[t, i], x.offsets[t, i]


@inner
def _gate_up_share(w, layer, x, scratch, thread, threads):
    """Do a thread's share of the blocks of 32 inner columns of all pairs: expert by expert, its pairs together."""
    mlp, starts, experts = scratch.mlp, scratch.starts, w.routing.experts
    inner, m = mlp.inner.values, np.empty(FIELDS, np.int64)
    blocks, stride = inner.shape[1] // BLOCK, 4 * inner.shape[1]
    total = blocks * starts[experts]
    begin, end, done = total * thread // threads, total * (thread + 1) // threads, np.int64(0)
    for e in range(experts):
        first, n = starts[e], starts[e + 1] - starts[e]
        if n == 0:
            continue
        # The blocks of this expert whose first pair's work falls into the thread's share.
        low, high = (max(begin - done, 0) + n - 1) // n, min((max(end - done, 0) + n - 1) // n, blocks)
        done += blocks * n
        for block in range(low, high):
            one, two = 2 * block, min(2 * block + 2, w.gate.fields[layer, TILE_ROWS])
            y = first * stride
            expert_of(w.gate.fields[layer], e, m)
            multiply_rows(m, one, two, x, first, n, address(inner) + y, stride)
            expert_of(w.up.fields[layer], e, m)
            multiply_rows(m, one, two, x, first, n, address(mlp.up) + y, stride)
            for row in range(first, first + n):
                if w.biases.size > 0:
                    add_biases(w.biases[layer, e], mlp, row, block)
                finish_inner(mlp, w.activation, row, block)


@inner
def _down_share(w, layer, scratch, out, is_first, thread, threads):
    """Add, for a thread's share of the hidden rows, every expert's weighed output to out, in the experts' order."""
    starts, product, m = scratch.starts, scratch.product, np.empty(FIELDS, np.int64)
    rows = w.down.fields[layer, TILE_ROWS]
    one, two = rows * thread // threads, rows * (thread + 1) // threads
    if one == two:
        return
    low, high, stride = ROWS * one, ROWS * two, 4 * product.shape[1]
    if is_first:
        for t in range(out.shape[0]):
            for i in range(low, high):
                out[t, i] = 0
    for e in range(w.routing.experts):
        first, n = starts[e], starts[e + 1] - starts[e]
        if n == 0:
            continue
        expert_of(w.down.fields[layer], e, m)
        multiply_rows(m, one, two, scratch.mlp.inner, first, n, address(product), stride)
        for k in range(n):
            t = scratch.tokens[first + k]
            weight = scratch.weights[t, scratch.places[first + k]]
            for i in range(low, min(high, w.down_bias.shape[2])):
                product[k, i] += w.down_bias[layer, e, i]
            for i in range(low, high):
                out[t, i] += weight * product[k, i]


# ---- the shared expert


def _shared(w, layer, x, scratch, tokens, out, threads):
    """Write the shared expert's term into out; return whether there is one."""
    raise NotImplementedError  # compiled code only


@overload(_shared)
def _choose_shared(w, layer, x, scratch, tokens, out, threads):
    fields = dict(zip(w.fields, w.types, strict=True))
    if fields["shared"].instance_class is NoMLP:
        return lambda w, layer, x, scratch, tokens, out, threads: False
    if fields["shared_gate"].instance_class is NoMatrix:

        def plain(w, layer, x, scratch, tokens, out, threads):
            call(gated_mlp, (w.shared, layer, x, scratch.shared, tokens, out, threads))
            return True

        return plain

    def gated(w, layer, x, scratch, tokens, out, threads):
        gates = scratch.shared_gates
        call(multiply, (w.shared_gate, layer, x, gates, tokens, np.int64(1)))
        sigmoids(address(gates), np.int64(ROWS * tokens))
        call(gated_mlp, (w.shared, layer, x, scratch.shared, tokens, out, threads))
        for t in range(tokens):
            for i in range(out.shape[1]):
                out[t, i] *= gates[t, 0]
        return True

    return gated


@inner
def mixture_of_experts(w, layer, x, scratch, tokens, out, threads):
    """Write this rank's term of a layer of experts, of the first `tokens` rows of x, into out (tokens, hidden)."""
    call(multiply, (w.router, layer, x, scratch.logits, tokens, threads))
    call(route, (w.router_bias[layer], w.correction[layer], w.routing, scratch, tokens))
    is_first, pairs = not _shared(w, layer, x, scratch, tokens, out, threads), tokens * w.routing.chosen
    run_parallel(_gather_share, (x, scratch, pairs), np.int64(1) if pairs <= FEW_PAIRS else threads)
    run_parallel(_gate_up_share, (w, layer, scratch.gathered, scratch), threads)
    run_parallel(_down_share, (w, layer, scratch, out, is_first), threads)
