"""Routers and mixtures of experts against their twins."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.kernels.matmul import described
from dllama_mpi.kernels.matrix import Matrix
from dllama_mpi.model.experts import (
    SIGMOID,
    SOFTMAX,
    Experts,
    ExpertsScratch,
    NoMLP,
    Routing,
    mixture_of_experts,
    route,
)
from dllama_mpi.model.linear import NoMatrix
from dllama_mpi.model.mlp import GatedMLP, MLPScratch, gated_mlp
from tests import naive_experts
from tests.naive_numbers import Floats, Ints
from tests.tiers import all_but
from tests.unit.kernel_inputs import Tiles, aligned, fields, inputs, matmul, packed, random
from tests.unit.layer_inputs import ACTIVATIONS, experts_scratch, mlp_scratch, routing_scratch

every_format = pytest.mark.parametrize("fmt", FORMATS)
every_threads = pytest.mark.parametrize("threads", [1, 2, 3])


# --------------------------------------------------------------------------------------------------------------------
# Routing
# --------------------------------------------------------------------------------------------------------------------


def check_route(
    routing: Routing, logits: Floats, expected: naive_experts.Routing, bias: Floats, correction: Floats
) -> None:
    """Check who is chosen, with which weights, and the list of pairs."""
    tokens = len(logits)
    scratch = routing_scratch(routing, tokens + 1)
    scratch.logits[:tokens, : routing.experts] = logits
    scratch.logits[:tokens, routing.experts :] = 0
    route(bias, correction, routing, scratch, tokens)
    np.testing.assert_array_equal(scratch.chosen[:tokens], expected.experts)
    np.testing.assert_allclose(
        scratch.weights[:tokens], expected.weights, rtol=2e-5, atol=1e-37
    )  # exponents are rounded
    assert (scratch.chosen[tokens] == -1).all()
    check_pairs(routing, scratch, expected.experts)


def check_pairs(routing: Routing, scratch: ExpertsScratch, experts: Ints) -> None:
    """Check that every pair of a token and its expert stands among the expert's, in the order of tokens."""
    count = experts.size
    ref = [
        [(t, j) for t, row in enumerate(experts) for j, e in enumerate(row) if e == expert]
        for expert in range(routing.experts)
    ]
    assert scratch.starts.tolist() == np.cumsum([0, *map(len, ref)]).tolist()
    pairs = list(zip(scratch.tokens[:count].tolist(), scratch.places[:count].tolist(), strict=True))
    assert pairs == [pair for each in ref for pair in each]
    assert (scratch.tokens[count:] == -1).all()


NONE = np.zeros(0, np.float32)
SIZES = ((1, 1), (4, 1), (4, 4), (8, 2), (20, 5), (33, 8), (128, 8))


@pytest.mark.parametrize(("experts", "chosen"), SIZES)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_softmax_routing(experts: int, chosen: int, renormalise: bool, tokens: int) -> None:
    routing = Routing(experts, chosen, SOFTMAX, int(renormalise), 1.0, 1, 1)
    for logits in (3 * random(experts, tokens, experts), np.float32(50) * random(1, tokens, experts)):
        expected = naive_experts.softmax_then_best(logits, chosen, renormalise)
        check_route(routing, logits, expected, NONE, NONE)
        bias = random(2, experts)
        biased = naive_experts.softmax_then_best(logits + bias, chosen, renormalise)
        check_route(routing, logits, biased, bias, NONE)


@pytest.mark.parametrize(("experts", "chosen"), SIZES)
def test_softmax_of_the_chosen_alone_is_the_renormalised_one(experts: int, chosen: int) -> None:
    logits = 3 * random(experts, 5, experts)
    expected = naive_experts.best_then_softmax(logits, chosen)
    check_route(Routing(experts, chosen, SOFTMAX, 1, 1.0, 1, 1), logits, expected, NONE, NONE)


@pytest.mark.parametrize(
    ("experts", "chosen", "groups"),
    [
        (8, 2, (1, 1)),
        (20, 5, (4, 2)),
        (24, 3, (8, 1)),
        (24, 6, (8, 3)),
        (16, 4, (4, 4)),
        (12, 2, (12, 6)),
        (256, 8, (8, 4)),
    ],
)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_sigmoid_routing(
    experts: int, chosen: int, groups: tuple[int, int], renormalise: bool, corrected: bool
) -> None:
    if groups[0] == experts:
        groups = (6, 3)  # groups of two
    routing = Routing(experts, chosen, SIGMOID, int(renormalise), 2.5, *groups)
    logits, correction = 2 * random(experts, 9, experts), random(4, experts) / 2
    expected = naive_experts.grouped_sigmoid(
        logits, correction if corrected else np.zeros(experts), chosen, naive_experts.Groups(*groups), renormalise, 2.5
    )
    check_route(routing, logits, expected, NONE, correction if corrected else NONE)


@pytest.mark.parametrize("scoring", [SOFTMAX, SIGMOID])
def test_ties_go_to_lower_numbers(scoring: int) -> None:
    rng = np.random.default_rng(1)
    for chosen in (1, 3, 6):
        logits = rng.integers(-1, 2, (20, 12)).astype(np.float32)
        routing = Routing(12, chosen, scoring, 1, 1.0, 1, 1)
        if scoring == SOFTMAX:
            expected = naive_experts.softmax_then_best(logits, chosen, True)
        else:
            expected = naive_experts.grouped_sigmoid(
                logits, np.zeros(12), chosen, naive_experts.Groups(1, 1), True, 1.0
            )
        check_route(routing, logits, expected, NONE, NONE)
    equal = naive_experts.Routing(np.array([[0, 1, 2]] * 2), np.full((2, 3), 1 / 3))
    check_route(Routing(12, 3, scoring, 1, 1.0, 1, 1), np.zeros((2, 12), np.float32), equal, NONE, NONE)


def test_tied_groups_go_to_lower_numbers() -> None:
    """Corrections in eighths and sigmoids of zero: every sum is exact, and many are equal."""
    rng = np.random.default_rng(2)
    for number, kept in ((4, 1), (4, 2), (6, 3)):
        for _ in range(20):
            correction = (rng.integers(0, 3, 12) / 8).astype(np.float32)
            groups = naive_experts.Groups(number, kept)
            expected = naive_experts.grouped_sigmoid(np.zeros((1, 12)), correction, 2, groups, True, 1.0)
            routing = Routing(12, 2, SIGMOID, 1, 1.0, number, kept)
            check_route(routing, np.zeros((1, 12), np.float32), expected, NONE, correction)


# --------------------------------------------------------------------------------------------------------------------
# Experts
# --------------------------------------------------------------------------------------------------------------------


def stacked(matrices: list[Tiles]) -> tuple[Matrix, list[np.ndarray]]:
    """Return the matrices of all experts, of the second of two layers, and what must outlive them."""
    fmt = FORMATS[matrices[0].fmt]
    tiles = aligned(np.stack([m.tiles for m in matrices]))
    scales = np.stack([m.row_scales for m in matrices]) if fmt.has_row_scales else None
    one = described(fmt, tiles, scales)
    return Matrix(np.stack([np.zeros_like(one), one])), [tiles, *([] if scales is None else [scales])]


class Mixture:
    """A layer of experts over inputs of 64 columns: the kernel's weights, and each expert as a layer of its own."""

    def __init__(
        self, formats: tuple[str, str, str], routing: Routing, kind: str = "silu", bias: bool = False, shared: str = ""
    ) -> None:
        """Take the formats of gate, up and down; shared: "", "plain" or "gated", an expert that all tokens use."""
        self.routing, self.kind, self.inner, self.hidden = routing, ACTIVATIONS[kind][0], 40, 64
        self.values = [self._expert(100 * e) for e in range(routing.experts + 1)]  # the last is shared
        self.tiles = [[packed(m, fmt) for m, fmt in zip(expert[:3], formats, strict=True)] for expert in self.values]
        self.bias, self.shared = bias, shared
        self.router = packed(random(8, routing.experts, self.hidden), "f32")
        self.gate_of_shared = packed(random(9, 1, self.hidden) / 8, "f16")
        self.quantised = tuple(FORMATS[fmt].quantised_activations for fmt in formats)
        count = routing.experts
        (gate, *keep), (up, *more), (down, *most) = (stacked([e[i] for e in self.tiles[:count]]) for i in range(3))
        self._keep = keep, more, most
        self.biases = np.stack([np.stack([e.gate_bias, e.up_bias]) for e in self.values])
        self.down_biases = np.stack([e.down_bias for e in self.values])
        none = np.zeros((1, 1, 2, 0), np.float32)
        self.weights = Experts(
            router=fields(self.router, self.router),
            router_bias=np.zeros((2, 0), np.float32),
            correction=np.zeros((2, 0), np.float32),
            gate=gate,
            up=up,
            down=down,
            biases=np.stack([self.biases[:count]] * 2) if bias else none,
            down_bias=np.stack([self.down_biases[:count]] * 2) if bias else none[:, :, 0],
            activation=self.kind,
            routing=routing,
            shared=self.alone(count)[0] if shared else NoMLP(),
            shared_gate=fields(self.gate_of_shared, self.gate_of_shared) if shared == "gated" else NoMatrix(),
        )

    def _expert(self, seed: int) -> naive_experts.Expert:
        shapes = ((self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))
        matrices = [random(seed + i, *shape) / math.sqrt(shape[1]) for i, shape in enumerate(shapes)]
        return naive_experts.Expert(*matrices, *(random(seed + 5 + i, shape[0]) / 4 for i, shape in enumerate(shapes)))

    def alone(self, e: int) -> tuple[GatedMLP, MLPScratch]:
        """Return one expert as a feed-forward layer, the second of two, and buffers for it."""
        gate, up, down = (fields(m, m) for m in self.tiles[e])
        biases = (
            np.stack([self.biases[e]] * 2)
            if self.bias and e < self.routing.experts
            else np.zeros((2, 2, 0), np.float32)
        )
        return GatedMLP(gate, up, down, biases, self.kind), mlp_scratch(40, self.inner, self.quantised[2])

    def run(self, x: Floats, threads: int = 1) -> tuple[Floats, ExpertsScratch]:
        """Return the layer's output (tokens, hidden) by the kernel, and its buffers."""
        scratch = experts_scratch(self.routing, len(x) + 1, self.hidden, self.inner, self.quantised)
        out = np.full((len(x), self.hidden), np.nan, np.float32)
        mixture_of_experts(self.weights, 1, inputs(x), scratch, len(x), out, threads)
        return out, scratch

    def expert(self, e: int, x: Floats) -> Floats:
        """Return what one expert makes of inputs, without its last bias, by the kernel of feed-forward layers."""
        weights, scratch = self.alone(e)
        out = np.full((len(x), self.hidden), np.nan, np.float32)
        gated_mlp(weights, 1, inputs(x), scratch, len(x), out, 1)
        return out

    def expected(self, x: Floats, scratch: ExpertsScratch) -> Floats:
        """Return the output for the choice that stands in the buffers, added in the same order."""
        out = np.zeros((len(x), self.hidden), np.float32)
        if self.shared:
            out = self.expert(self.routing.experts, x)
        if self.shared == "gated":
            out *= scratch.shared_gates[: len(x), :1]
        for e in range(self.routing.experts):
            made = self.expert(e, x)
            if self.bias:
                made = made + self.down_biases[e]
            for t, j in np.argwhere(scratch.chosen[: len(x)] == e):
                out[t] = out[t] + scratch.weights[t, j] * made[t]
        return out


ROUTING = Routing(6, 2, SOFTMAX, 1, 1.0, 1, 1)


@every_format
@every_threads
@pytest.mark.parametrize("tokens", [1, 2, 9, 33])
def test_mixture_is_the_sum_of_its_experts(fmt: str, tokens: int, threads: int) -> None:
    """Every bit is that of the experts one by one, added in their order, however many threads there are."""
    layer, x = Mixture((fmt, fmt, fmt), ROUTING), random(1, tokens, 64)
    out, scratch = layer.run(x, threads)
    np.testing.assert_array_equal(out, layer.expected(x, scratch))


@pytest.mark.parametrize("formats", [("q40", "f16", "q80"), ("f32", "q4m", "f16"), ("mxfp4", "mxfp4", "q40")], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "shared"), all_but([("silu", "gated")], product(["silu", "clamped_swiglu"], ["", "plain", "gated"]))
)
def test_mixtures_of_every_kind(formats: tuple[str, str, str], kind: str, bias: bool, shared: str) -> None:
    layer, x = Mixture(formats, ROUTING, kind, bias, shared), random(1, 12, 64)
    for threads in (1, 2):
        out, scratch = layer.run(x, threads)
        np.testing.assert_array_equal(out, layer.expected(x, scratch))
    if shared == "gated":
        gates = naive_experts.sigmoid(matmul(layer.gate_of_shared, x)[:, 0])
        np.testing.assert_allclose(scratch.shared_gates[:12, 0], gates, rtol=1e-6)


@pytest.mark.parametrize(
    "routing",
    [
        ROUTING,
        Routing(5, 5, SOFTMAX, 0, 1.0, 1, 1),
        Routing(7, 1, SIGMOID, 0, 1.5, 1, 1),
        Routing(8, 3, SIGMOID, 1, 2.5, 4, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_mixture_is_its_twin(routing: Routing, kind: str, bias: bool) -> None:
    """In float32, against float64 from the router to the sum."""
    layer, x = Mixture(("f32", "f32", "f32"), routing, kind, bias), random(2, 20, 64)
    out, _ = layer.run(x)
    experts = [e if bias else naive_experts.Expert(*e[:3]) for e in layer.values[: routing.experts]]
    logits = naive_experts.exact_product(random(8, routing.experts, 64), x)
    if routing.scoring == SOFTMAX:
        chosen = naive_experts.softmax_then_best(logits, routing.chosen, bool(routing.normalised))
    else:
        groups = naive_experts.Groups(routing.groups, routing.best_groups)
        zeros = np.zeros(routing.experts)
        chosen = naive_experts.grouped_sigmoid(
            logits, zeros, routing.chosen, groups, bool(routing.normalised), routing.scale
        )
    ref = naive_experts.mixture(x, chosen, experts, ACTIVATIONS[kind][1])
    np.testing.assert_allclose(out, ref, rtol=0, atol=2e-5 * np.abs(ref).max())


@pytest.mark.parametrize("fmt", ["q40", "f32"])
def test_a_token_gets_the_same_bits_in_any_company(fmt: str) -> None:
    layer, x = Mixture((fmt, fmt, fmt), ROUTING, shared="plain"), random(3, 33, 64)
    alone = np.concatenate([layer.run(x[t : t + 1])[0] for t in range(33)])
    for tokens in (2, 7, 33):
        for threads in (1, 3):
            np.testing.assert_array_equal(layer.run(x[:tokens], threads)[0], alone[:tokens])


def test_an_expert_that_nobody_chose_is_not_read() -> None:
    layer, x = Mixture(("f32", "f32", "f32"), Routing(6, 1, SOFTMAX, 1, 1.0, 1, 1)), random(4, 2, 64)
    out, scratch = layer.run(x)
    for e in set(range(6)) - set(scratch.chosen[:2, 0].tolist()):
        for keep in layer._keep:
            keep[0][0][e] = 0xFF  # NaN
    np.testing.assert_array_equal(layer.run(x)[0], out)
