"""Shapes of well-known models, and their first layers."""

from __future__ import annotations

import pytest

from dllama_mpi.errors import UsageError
from dllama_mpi.model.recipe import active_parameters, parameters
from dllama_mpi.model.shapes import SHAPES, _first_layers, shape_config
from dllama_mpi.startup.opening import model_config


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_layers(name: str) -> None:
    whole, two = model_config(f"random:{name}"), model_config(f"random:{name}:2")
    assert two.layers == whole.layers[:2]
    assert two.hidden_size == whole.hidden_size
    assert model_config(f"random:{name}:{whole.num_layers}") == whole
    assert active_parameters(two) <= parameters(two) < parameters(whole)


@pytest.mark.parametrize("layers", ["0", "5", "-1", "1.5", "", "x", "2:2"])
def test_layers_that_it_has_not(layers: str) -> None:
    with pytest.raises(UsageError, match="tiny has 4 layers; give a number from 1 to 4"):
        shape_config(f"tiny:{layers}")


def test_what_is_listed_by_layers_is_cut_too() -> None:
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "mlp_only_layers": [0, 2],
        "architectures": ["x"],
        "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
    }
    assert _first_layers(config, 2, 3) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "b"],
        "mlp_only_layers": [0],
        "architectures": ["x"],
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
    }
    assert config["num_hidden_layers"] == 3


def test_what_a_token_uses_of_a_sparse_shape() -> None:
    config = model_config("random:qwen3-30b-a3b")
    assert (parameters(config), active_parameters(config)) == (30_532_122_624, 3_041_867_776)
