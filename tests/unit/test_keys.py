"""Keys of a config.json: each is honoured, known to change nothing, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dllama_mpi.architectures.keys import Keys
from dllama_mpi.architectures.registry import ARCHITECTURES, read_model_config
from dllama_mpi.errors import ModelError
from dllama_mpi.model.config import AttentionConfig, ModelConfig
from dllama_mpi.model.rope import RopeConfig
from tests.unit.test_config import LEAST, config, failure


@pytest.mark.parametrize("value", [16, True, "a", [1], {"a": 1}, 0.5])
def test_a_key_that_nobody_knows_is_refused(value: Any) -> None:
    """It may change what is computed."""
    text = failure(config(mystery=value))
    assert text == (
        f"mystery ({value!r}) is not known for llama, and may change what is computed; if it does not, remove it from"
        " the file"
    )


@pytest.mark.parametrize("value", [None, False, [], {}, "", 0])
def test_a_key_that_nobody_knows_and_that_says_nothing(value: Any) -> None:
    assert read_model_config(LEAST | {"mystery": value}) == read_model_config(LEAST)


@pytest.mark.parametrize(
    "key",
    ["architectures", "torch_dtype", "bos_token_id", "attention_dropout", "initializer_range", "_name_or_path",
     "transformers_version", "unsloth_fixed", "use_cache", "pretraining_tp", "mtp_layers", "quantization"],
)  # fmt: skip
def test_keys_that_change_nothing(key: str) -> None:
    assert read_model_config(config(**{key: "anything"})) == read_model_config(LEAST)


def test_a_window_of_llama_is_no_known_key() -> None:
    assert failure(config(sliding_window=16)).startswith("sliding_window (16) is not known for llama")


def test_layers_that_rotate_different_numbers_of_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(keys: Keys) -> ModelConfig:
        made, keys._read = read_model_config(LEAST), set(LEAST)
        ropes = (RopeConfig("default", 16, 1e4), RopeConfig("default", 8, 1e4))
        return replace(
            made, layers=tuple(replace(made.layers[0], mixer=AttentionConfig(4, 4, 16, rope, 0.25)) for rope in ropes)
        )

    monkeypatch.setitem(ARCHITECTURES, "two", replace(ARCHITECTURES["llama"], read=read))
    message = "layers rotate different numbers of dimensions, which is not supported"
    assert failure(config(model_type="two")) == message


def keys(**values: Any) -> Keys:
    """Return the keys of an object."""
    return Keys({"model_type": "some", **values}, "here.json")


def test_what_is_asked_of_keys() -> None:
    k = keys(a=3, b=None, c="x", d={"e": 4}, f=[1, 0], g=True, h=2.5, i=["x", "y"])
    assert (k.kind, k.get("a"), k.get("b", 7), k.get("z")) == ("some", 3, 7, None)
    assert ("a" in k, "b" in k, "z" in k) == (True, False, False)
    assert (k.mentions("a"), k.mentions("b"), k.mentions("z")) == (True, True, False)
    assert (k.count("a"), k.count("b", 5), k.number("h"), k.number("a"), k.flag("g"), k.flag("z")) == (
        3,
        5,
        2.5,
        3,
        True,
        False,
    )
    assert k.choice("c", "y", {"x": 1, "y": 2}) == 1
    assert k.choice("z", "y", {"x": 1, "y": 2}) == 2
    assert k.numbers("f", 2) == [1, 0]
    assert k.numbers("z", 2) == k.texts("z", 2, ("x",)) == []
    assert k.texts("i", 2, ("x", "y")) == ["x", "y"]
    assert k.section("d").count("e") == 4
    k.refuse(a=3, z="none of it")
    k.finish()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda k: k.count("z"), "z is missing"),
        (lambda k: k.number("z"), "z is missing"),
        (lambda k: k.count("half"), "half is 0.5; it must be a whole number from 1 to 16777216"),
        (lambda k: k.count("many", most=3), "many is 4; it must be a whole number from 1 to 3"),
        (lambda k: k.count("many", least=5), "many is 4; it must be a whole number from 5 to 16777216"),
        (lambda k: k.count("text"), "text is 'x'; it must be a number"),
        (lambda k: k.number("half", above=0.5), "half is 0.5; it must be above 0.5"),
        (lambda k: k.flag("many"), "many is 4; it must be true or false"),
        (lambda k: k.choice("text", "a", {"a": 1}), "text 'x' is not supported; supported is a"),
        (lambda k: k.choice("list", "a", {"a": 1, "b": 2}), "list ['x'] is not supported; supported are a, b"),
        (lambda k: k.texts("list", 2, ("x",)), "list has 1 entries for 2 layers"),
        (lambda k: k.texts("text", 2, ("x",)), "text has 0 entries for 2 layers"),
        (lambda k: k.texts("list", 1, ("y", "z")), "list has 'x'; supported are y, z"),
        (lambda k: k.numbers("list", 3), "list is ['x']; it must be a list of numbers from 0 to 2"),
        (lambda k: k.numbers("numbers", 3), "numbers is [0, 3]; it must be a list of numbers from 0 to 2"),
        (lambda k: k.section("text"), "text is 'x'; it must be an object"),
        (lambda k: k.section("z"), "z is None; it must be an object"),
        (lambda k: k.refuse(many=3), "many is 4; some is supported with 3 only"),
        (lambda k: k.refuse(many=None), "many is 4; some is supported without it only"),
        (lambda k: k.count("null"), "null is null"),
        (lambda k: k.section("object").count("many"), "object: many is missing"),
        (lambda k: k.require(False, "long", "short"), f"long is {str([0] * 50)[:57]}...; it must be short"),
    ],
)  # fmt: skip
def test_keys_that_are_not_what_is_asked(ask: Callable[[Keys], Any], message: str) -> None:
    given = keys(half=0.5, many=4, text="x", list=["x"], numbers=[0, 3], object={}, null=None, long=[0] * 50)
    with pytest.raises(ModelError) as caught:
        ask(given)
    assert str(caught.value) == f"here.json: {message}"
