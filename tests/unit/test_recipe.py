"""Recipes: which matrix is kept in which format."""

from __future__ import annotations

import pytest

from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.errors import UsageError
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.config import AttentionConfig, DeltaNetConfig, ExpertsConfig, LayerConfig, MLPConfig, ModelConfig
from dllama_mpi.model.recipe import DEFAULT, GROUPS, ROLES, WeightRecipe, bits_per_weight, default_kv_type, described
from dllama_mpi.model.rope import RopeConfig
from dllama_mpi.model.tensors import Kind, tensors
from tests.tiny_models.cases import CASES

EXPERTS = ExpertsConfig(MLPConfig(64), 4, 2, shared=MLPConfig(64), shared_gate=True)
ATTENTION = AttentionConfig(4, 2, 16, RopeConfig("default", 16, 1e4), 1.0, gate=True)
MIXED = ModelConfig(
    "any", 64, 64, 64, 1e-6, False,
    (LayerConfig(DeltaNetConfig(2, 4, 16, 16, 4), EXPERTS), LayerConfig(ATTENTION, MLPConfig(64))),
)  # fmt: skip


def by_role(text: str) -> dict[str, str]:
    """Return the format of each role of a model that has attention, a delta net, experts and a dense layer."""
    formats = WeightRecipe.parse(text).formats(MIXED)
    assert set(formats) == {spec.name for spec in tensors(MIXED) if spec.kind is Kind.MATRIX}
    found: dict[str, set[str]] = {}
    for spec in tensors(MIXED):
        if spec.kind is Kind.MATRIX:
            found.setdefault(spec.role, set()).add(formats[spec.name].name)
    assert all(len(names) == 1 for names in found.values())
    return {role: min(names) for role, names in found.items()}


SENSITIVE = {"router", "shared_gate", "delta_a", "delta_b"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_alone(name: str) -> None:
    """All matrices have it, but for small ones that decide about much, which codes would spoil."""
    quantised = FORMATS[name].quantised_activations
    for role, fmt in by_role(name).items():
        assert fmt == ("f16" if quantised and role in SENSITIVE else name), role


@pytest.mark.parametrize("rule", ["lm_head", "q", "o", "down", "router", "delta_a", "expert_up", "shared_gate"])
def test_a_rule_is_for_one_role(rule: str) -> None:
    plain, changed = by_role("q40"), by_role(f"q40,{rule}=q80")
    assert {role for role in plain if plain[role] != changed[role]} == {rule}
    assert changed[rule] == "q80"


@pytest.mark.parametrize("group", GROUPS)
def test_a_rule_for_a_group(group: str) -> None:
    plain, changed = by_role("q40"), by_role(f"q40,{group}=q80")
    assert {role for role in plain if plain[role] != changed[role]} == set(GROUPS[group]) & set(plain)
    assert group == "conv" or set(GROUPS[group]) & set(plain)


def test_later_rules_win() -> None:
    assert by_role("q40,attention=q80,v=f16")["v"] == "f16"
    assert by_role("q40,v=f16,attention=q80")["v"] == "q80"
    assert by_role("q40,v=f16,v=f32")["v"] == "f32"
    assert by_role("q40,attention=q80,v=f16")["q"] == "q80"


def test_roles_and_groups_are_known_to_the_table() -> None:
    """Every role that a rule may name is one that some matrix has, and every matrix has such a role."""
    every = {role for group in GROUPS.values() for role in group}
    assert every <= set(ROLES)
    assert len(set(ROLES)) == len(ROLES)
    assert not set(GROUPS) & set(ROLES)
    assert set(by_role("q40")) | {"conv_b", "conv_c", "conv_x"} == set(ROLES)


@pytest.mark.parametrize(
    "text", ["q40", "f32", "q4m,lm_head=q80", "q40,attention=q80,v=f16", "mxfp4,v=f16,attention=q80"]
)
def test_text_of_a_recipe(text: str) -> None:
    recipe = WeightRecipe.parse(text)
    assert str(recipe) == text
    assert WeightRecipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q50", "'q50' is no format; known are q40, q4m, iq4nl, mxfp4, q80, f16, f32"),
        ("", "'' is no format; known are q40,"),
        ("Q40", "'Q40' is no format"),
        ("q40,", "no matrix is called ''; known are attention, mlp, experts,"),
        ("q40,lm_head", "'' is no format"),
        ("q40,lm_head=", "'' is no format"),
        ("q40,lm_head=q8", "'q8' is no format"),
        ("q40,head=q80", "no matrix is called 'head'; known are attention, mlp, experts, delta, conv, q, k,"),
        ("q40,q80", "no matrix is called 'q80'"),
        ("q40, v=q80", "no matrix is called ' v'"),
        ("q40,norm=f32", "no matrix is called 'norm'"),
        ("lm_head=q80", "'lm_head=q80' is no format"),
        ("q40,v=q80=f16", "'q80=f16' is no format"),
    ],
)
def test_recipes_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        WeightRecipe.parse(text)
    assert str(caught.value).startswith(f"--weights {text}: {message}")
    assert "\n" not in str(caught.value)


def test_the_default() -> None:
    assert str(WeightRecipe.parse(DEFAULT)) == DEFAULT == "q4m"


@pytest.mark.parametrize(
    ("text", "kind"),
    [("f32", "f32"), ("f16", "f16"), ("q40", "f16"), ("f32,lm_head=q80", "f16"), ("f16,attention=f32,mlp=f32", "f16")],
)
def test_default_type_of_the_kv_cache(text: str, kind: str) -> None:
    config = read_model_config(CASES["llama2"].config)
    assert default_kv_type(WeightRecipe.parse(text).formats(config)) == kind


@pytest.mark.parametrize(("text", "bits"), [("q40", 4.5), ("q80", 8.5), ("f16", 16), ("f32", 32)])
def test_bits_of_a_weight(text: str, bits: float) -> None:
    config = ModelConfig("any", 64, 64, 64, 1e-6, False, (LayerConfig(ATTENTION, MLPConfig(64)),))
    assert bits_per_weight(config, WeightRecipe.parse(text).formats(config)) == bits
    mixed = bits_per_weight(config, WeightRecipe.parse(f"{text},lm_head=f32").formats(config))
    share = 64 * 64 / sum(spec.size for spec in tensors(config) if spec.kind is Kind.MATRIX)
    assert mixed == pytest.approx(bits + (32 - bits) * share)


RECIPES = ["q40", "q4m", "f32", "q4m,lm_head=q80", "q40,experts=mxfp4,attention=q80", "q40,router=f32,q=f16,k=q80",
           "f16,delta=q40,mlp=q80,down=f32"]  # fmt: skip


@pytest.mark.parametrize("text", RECIPES)
def test_formats_tell_their_recipe(text: str) -> None:
    formats = WeightRecipe.parse(text).formats(MIXED)
    found = WeightRecipe.of(MIXED, formats)
    assert found is not None
    assert found.formats(MIXED) == formats
    assert WeightRecipe.parse(str(found)) == found
    assert described(MIXED, formats) == str(found)


def test_short_recipes_are_found_as_they_were_written() -> None:
    config = read_model_config(CASES["qwen2"].config)
    for text in ("q40", "q4m,lm_head=q80", "q40,mlp=q80", "q80,q=f16"):
        assert described(config, WeightRecipe.parse(text).formats(config)) == text


def test_formats_that_differ_within_a_role_have_no_recipe() -> None:
    config = read_model_config(CASES["qwen2"].config)
    formats = WeightRecipe.parse("q40").formats(config)
    formats["model.layers.1.mlp.up_proj.weight"] = FORMATS["q80"]
    assert WeightRecipe.of(config, formats) is None
    assert described(config, formats).startswith("q40+")
