"""The table of tensors: over any config and any shares, the ranks' parts make up every tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.errors import UsageError
from dllama_mpi.kernels.layout import BLOCK, FORMATS
from dllama_mpi.model.config import (
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    Mixer,
    MLPConfig,
    ModelConfig,
    ShortConvConfig,
)
from dllama_mpi.model.recipe import (
    ROLES,
    WeightRecipe,
    bits_per_weight,
    bytes_per_token,
    macs_per_token,
    parameters,
    share_of,
    slice_parts,
    tensor_bytes,
    weight_bytes,
    whole_parts,
)
from dllama_mpi.model.rope import RopeConfig
from dllama_mpi.model.tensors import HEAD, TABLE, Cut, Kind, Part, TensorSpec, axes, part, tensors
from dllama_mpi.parallel.partition import Range, Shard, shards
from tests.tiny_models.case import Case
from tests.tiny_models.cases import CASES
from tests.tiny_models.tensors import tensor_specs

# --------------------------------------------------------------------------------------------------------------------
# Any config
# --------------------------------------------------------------------------------------------------------------------

flags = st.booleans()
sizes = st.integers(1, 200)


@st.composite
def attentions(draw: st.DrawFn, ranks: int) -> AttentionConfig:
    """Draw an attention that so many ranks can share."""
    group = draw(st.integers(1, 7))
    kv_heads = draw(st.integers(-(-ranks // group), 8 + ranks))
    dim = 2 * draw(st.integers(1, 40))
    return AttentionConfig(
        kv_heads * group, kv_heads, dim, RopeConfig("default", dim, 1e4), 1.0, qkv_bias=draw(flags), o_bias=draw(flags),
        qk_norm=draw(st.sampled_from(["", "head", "whole"])), sinks=draw(flags), gate=draw(flags),
    )  # fmt: skip


@st.composite
def delta_nets(draw: st.DrawFn, ranks: int) -> DeltaNetConfig:
    """Draw a delta net that so many ranks can share."""
    group = draw(st.integers(1, 4))
    keys = draw(st.integers(-(-ranks // group), 4 + ranks))
    return DeltaNetConfig(
        keys, keys * group, draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.integers(2, 4))
    )


@st.composite
def experts(draw: st.DrawFn) -> ExpertsConfig:
    """Draw a mixture of experts."""
    count = draw(st.integers(1, 20))
    return ExpertsConfig(
        MLPConfig(draw(sizes), bias=draw(flags)), count, draw(st.integers(1, count)), router_bias=draw(flags),
        correction=draw(flags), shared=draw(st.none() | st.builds(MLPConfig, sizes)), shared_gate=draw(flags),
    )  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelConfig, list[float]]:
    """Draw a model of any layers, and the shares of some ranks."""
    shares = draw(st.lists(st.floats(0.05, 20), min_size=1, max_size=6))
    mixers: st.SearchStrategy[Mixer] = st.one_of(
        attentions(len(shares)), delta_nets(len(shares)), st.builds(ShortConvConfig, st.integers(2, 4), flags)
    )
    feeds = st.one_of(st.builds(MLPConfig, sizes, bias=flags), experts())
    layers = st.lists(
        st.builds(LayerConfig, mixers, feeds, norm_before=flags, norm_after=flags), min_size=1, max_size=4
    )
    config = ModelConfig("any", draw(sizes), draw(sizes), 64, 1e-6, draw(flags), tuple(draw(layers)))
    return config, shares


def along(spec: TensorSpec) -> int:
    """Return the axis of an array along which a tensor is cut."""
    return len(spec.shape) - (2 if spec.cut is Cut.ROWS and spec.kind is Kind.MATRIX else 1)


def check_cover(spec: TensorSpec, parts: Sequence[Part], cuts: Sequence[Shard]) -> None:
    """Check that the ranks' parts make up a tensor, and that none holds more of it than it must."""
    assert all(own.shape == spec.shape for own in parts)
    if spec.cut in (Cut.WHOLE, Cut.FIRST):
        assert all(own == Part.whole(*spec.shape) for own in parts)
        return
    assert spec.axis is not None
    assert spec.axis.total == spec.shape[along(spec)]
    ranges = [own.ranges[along(spec)] for own in parts]
    for own in parts:
        others = [r for i, r in enumerate(own.ranges) if i != along(spec)]
        assert others == [(0, n) for i, n in enumerate(spec.shape) if i != along(spec)]
        assert own.sizes == tuple(stop - start for start, stop in own.ranges)
    elements = [cut.elements(spec.axis) for cut in cuts]
    if not spec.axis.group:
        check_once(elements, spec.axis.total)
    held = np.zeros(spec.axis.total, int)
    for start, stop in elements:
        held[start:stop] += 1
    assert held.all()
    if spec.cut is Cut.ROWS:
        assert ranges == elements
        return
    for (start, stop), (first, last) in zip(ranges, elements, strict=True):
        assert start % BLOCK == 0
        if first == last:
            assert start == stop
            continue
        assert stop % BLOCK == 0 or stop == spec.axis.total
        assert start <= first <= last <= stop
        assert first - start < BLOCK
        assert stop - last < BLOCK
    if spec.axis.size % BLOCK == 0:  # nothing is cut inside a block, and nothing held twice
        check_once(ranges, spec.axis.total)


def check_once(ranges: Sequence[Range], total: int) -> None:
    """Check that those ranges that are not empty follow each other, from 0 to the total."""
    ranges = [(start, stop) for start, stop in ranges if start < stop]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(first[1] == second[0] for first, second in pairwise(ranges))


@settings(deadline=None, max_examples=60)
@given(models())
def test_the_ranks_parts_make_up_every_tensor(drawn: tuple[ModelConfig, list[float]]) -> None:
    config, shares = drawn
    cuts = shards(axes(config), shares)
    for spec in tensors(config):
        check_cover(spec, [part(spec, cut) for cut in cuts], cuts)


@settings(deadline=None, max_examples=60)
@given(models())
def test_what_is_followed_is_held_by_whoever_reads_it(drawn: tuple[ModelConfig, list[float]]) -> None:
    config, shares = drawn
    cuts, followers = shards(axes(config), shares), 0
    for axis, leader in axes(config):
        if leader is None:
            continue
        followers += 1
        for cut in cuts:
            assert set(range(*cut.units(axis))) == {unit // axis.group for unit in range(*cut.units(leader))}
    names = {spec.role for spec in tensors(config)}
    assert bool(followers) is bool(names & {"k", "delta_k"})


@settings(deadline=None, max_examples=60)
@given(models())
def test_every_tensor_has_its_own_name_and_one_role(drawn: tuple[ModelConfig, list[float]]) -> None:
    config, _ = drawn
    table = tensors(config)
    assert len({spec.name for spec in table}) == len(table)
    assert (table[0].name, table[-1].name) == (TABLE, HEAD)
    for spec in table:
        assert (spec.role in ROLES) is (spec.kind is Kind.MATRIX)
        assert spec.size == math.prod(spec.shape)
        assert (spec.axis is None) is (spec.cut is Cut.WHOLE) or spec.cut is Cut.FIRST
        assert spec.experts == (spec.shape[0] if len(spec.shape) == 3 else 1)
        assert 0 <= spec.reads <= 1


@settings(deadline=None, max_examples=60)
@given(models())
def test_slice_parts_are_the_parts(drawn: tuple[ModelConfig, list[float]]) -> None:
    config, shares = drawn
    cuts = shards(axes(config), shares)
    for cut in cuts:
        found = slice_parts(config, cut)
        assert list(found) == [spec.name for spec in tensors(config)]
        for spec in tensors(config):
            own, kind = part(spec, cut), spec.kind.value
            assert (found[spec.name].shape, found[spec.name].ranges) == (own.shape, own.ranges)
            is_zero = spec.cut is Cut.FIRST and cut.rank > 0
            assert found[spec.name].kind == ("zeros" if is_zero else kind)
            assert str(found[spec.name]) == str(own)
    assert {name: (p.shape, p.kind) for name, p in whole_parts(config).items()} == {
        spec.name: (spec.shape, spec.kind.value) for spec in tensors(config)
    }
    assert all(p.ranges == tuple((0, n) for n in p.shape) for p in whole_parts(config).values())


@settings(deadline=None, max_examples=60)
@given(models(), st.sampled_from(sorted(FORMATS)))
def test_bytes_and_products_of_the_ranks(drawn: tuple[ModelConfig, list[float]], name: str) -> None:
    """What the ranks hold together is the whole, and what of it is held twice or is padding."""
    config, shares = drawn
    (whole,), cuts = shards(axes(config), [1.0]), shards(axes(config), shares)
    formats = WeightRecipe.parse(name).formats(config)
    assert weight_bytes(config, whole, formats) == sum(tensor_bytes(spec, whole, formats) for spec in tensors(config))
    assert sum(weight_bytes(config, cut, formats) for cut in cuts) >= weight_bytes(config, whole, formats)
    assert bytes_per_token(config, whole, formats) <= weight_bytes(config, whole, formats)
    matrices = [spec for spec in tensors(config) if spec.kind is Kind.MATRIX]
    expected = sum(spec.reads * spec.size for spec in matrices if spec.role != "lm_head")
    assert macs_per_token(config, whole) == round(expected)
    assert share_of(config, whole) == pytest.approx(1, abs=0.5 / expected)
    assert sum(share_of(config, cut) for cut in cuts) >= 1 - len(cuts) / expected
    bits = bits_per_weight(config, formats)
    assert bits >= min(fmt.bits for fmt in formats.values())


def test_more_ranks_than_heads() -> None:
    config = read_model_config(CASES["llama_heads6"].config)
    with pytest.raises(UsageError, match="num_attention_heads is 6; 7 ranks asked for; use at most 6"):
        shards(axes(config), [1.0] * 7)


# --------------------------------------------------------------------------------------------------------------------
# Known models
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_and_shapes_are_those_of_the_checkpoint(case: Case) -> None:
    config, expected = read_model_config(case.config), dict(tensor_specs(case.config))
    expected.setdefault(HEAD, expected[TABLE])  # of a tied model it is listed all the same
    assert {spec.name: spec.shape for spec in tensors(config)} == expected
    for spec in tensors(config):
        assert (spec.kind is Kind.VECTOR) is (len(spec.shape) == 1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parameters_are_counted_once(case: Case) -> None:
    expected = sum(math.prod(shape) for shape in tensor_specs(case.config).values())
    assert parameters(read_model_config(case.config)) == expected


def test_cuts_of_a_dense_layer() -> None:
    """Follow the tensors of one small model over two ranks by hand."""
    mixer = AttentionConfig(6, 3, 12, RopeConfig("default", 12, 1e4), 1.0, qkv_bias=True, o_bias=True, sinks=True)
    config = ModelConfig("any", 40, 48, 64, 1e-6, False, (LayerConfig(mixer, MLPConfig(100, bias=True)),))
    second = shards(axes(config), [1, 1])[1]
    found = {spec.name.removeprefix("model.layers.0."): part(spec, second).ranges for spec in tensors(config)}
    assert found == {
        TABLE: ((0, 40), (0, 48)),
        "input_layernorm.weight": ((0, 48),),
        "post_attention_layernorm.weight": ((0, 48),),
        "self_attn.q_proj.weight": ((36, 72), (0, 48)),
        "self_attn.q_proj.bias": ((36, 72),),
        "self_attn.k_proj.weight": ((12, 36), (0, 48)),  # heads 3 to 5 read KV heads 1 and 2
        "self_attn.k_proj.bias": ((12, 36),),
        "self_attn.v_proj.weight": ((12, 36), (0, 48)),
        "self_attn.v_proj.bias": ((12, 36),),
        "self_attn.o_proj.weight": ((0, 48), (32, 72)),  # from column 36, in blocks of 32
        "self_attn.o_proj.bias": ((0, 48),),
        "self_attn.sinks": ((3, 6),),
        "mlp.gate_proj.weight": ((64, 100), (0, 48)),
        "mlp.gate_proj.bias": ((64, 100),),
        "mlp.up_proj.weight": ((64, 100), (0, 48)),
        "mlp.up_proj.bias": ((64, 100),),
        "mlp.down_proj.weight": ((0, 48), (64, 100)),
        "mlp.down_proj.bias": ((0, 48),),
        "model.norm.weight": ((0, 48),),
        HEAD: ((32, 40), (0, 48)),
    }


def test_cuts_of_experts() -> None:
    """Every rank has a part of every expert; only the first has the biases that are added once."""
    mixer = AttentionConfig(2, 1, 16, RopeConfig("default", 16, 1e4), 1.0)
    feed = ExpertsConfig(MLPConfig(96, bias=True), 5, 2, router_bias=True, correction=True, shared=MLPConfig(64))
    config = ModelConfig("any", 40, 48, 64, 1e-6, True, (LayerConfig(mixer, feed),))
    cuts = shards(axes(config), [1, 1])
    found = {
        spec.name.removeprefix("model.layers.0.mlp."): (spec.shape, part(spec, cuts[1]).ranges, spec.reads)
        for spec in tensors(config)
        if ".mlp." in spec.name
    }
    assert found == {
        "router.weight": ((5, 48), ((0, 5), (0, 48)), 1.0),
        "router.bias": ((5,), ((0, 5),), 1.0),
        "router.correction": ((5,), ((0, 5),), 1.0),
        "experts.gate_proj.weight": ((5, 96, 48), ((0, 5), (64, 96), (0, 48)), 0.4),
        "experts.gate_proj.bias": ((5, 96), ((0, 5), (64, 96)), 0.4),
        "experts.up_proj.weight": ((5, 96, 48), ((0, 5), (64, 96), (0, 48)), 0.4),
        "experts.up_proj.bias": ((5, 96), ((0, 5), (64, 96)), 0.4),
        "experts.down_proj.weight": ((5, 48, 96), ((0, 5), (0, 48), (64, 96)), 0.4),
        "experts.down_proj.bias": ((5, 48), ((0, 5), (0, 48)), 0.4),
        "shared.gate_proj.weight": ((64, 48), ((32, 64), (0, 48)), 1.0),
        "shared.up_proj.weight": ((64, 48), ((32, 64), (0, 48)), 1.0),
        "shared.down_proj.weight": ((48, 64), ((0, 48), (32, 64)), 1.0),
    }
    kinds = [slice_parts(config, cut)["model.layers.0.mlp.experts.down_proj.bias"].kind for cut in cuts]
    assert kinds == ["vector", "zeros"]


def test_parts_say_what_they_are() -> None:
    assert str(Part((64, 96), ((16, 32), (0, 96)))) == "16..32 x 0..96"
    assert Part.whole(3, 4) == Part((3, 4), ((0, 3), (0, 4)))
    assert Part((5, 64, 96), ((0, 5), (16, 32), (0, 96))).sizes == (5, 16, 96)
