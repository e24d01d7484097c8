"""What the families with experts have in common: their numbers, which layers have them, and where their tensors are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..errors import ModelError
from ..model.config import ExpertsConfig, MLPConfig, ModelConfig
from ..weights.mapped import Place, Ref, Stack
from .keys import ACTIVATIONS, FULL, Keys

Feed = MLPConfig | ExpertsConfig

COUNTS = ("num_experts", "num_local_experts")  # what the generations of transformers call the number of experts
PARTS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


def expert_counts(keys: Keys, default: int, names: Sequence[str] = COUNTS) -> tuple[int, int]:
    """Return how many experts there are, by whichever of its names the file has, and how many a token uses.

    Raises:
        ModelError: names that contradict each other, or more to be chosen than there are.
    """
    said = {name: keys.count(name) for name in names if name in keys}
    first = next(iter(said), names[0])
    number = keys.count(first, default)
    for name, value in said.items():
        if value != number:
            raise ModelError(f"{keys.where}: {first} is {number} and {name} {value}; keep the right one of them")
    return number, keys.count("num_experts_per_tok", most=number)


def gated_mlp(keys: Keys, size: str, times: int = 1) -> MLPConfig:
    """Return a feed-forward of `times` the inner size that a key says."""
    return MLPConfig(times * keys.count(size), keys.choice("hidden_act", "silu", ACTIVATIONS))


def sparse_layers(keys: Keys, dense: MLPConfig, experts: ExpertsConfig) -> list[Feed]:
    """Return each layer's feed-forward: experts in every decoder_sparse_step-th layer, but for mlp_only_layers."""
    layers, step = keys.count("num_hidden_layers"), keys.count("decoder_sparse_step", 1)
    without = keys.numbers("mlp_only_layers", layers)
    return [dense if i in without or (i + 1) % step else experts for i in range(layers)]


def with_feeds(config: ModelConfig, feeds: Sequence[Feed]) -> ModelConfig:
    """Return a config whose layers have these feed-forwards."""
    layers = zip(config.layers, feeds, strict=True)
    return replace(config, layers=tuple(replace(layer, feed=feed) for layer, feed in layers))


def no_windows(keys: Keys) -> None:
    """Raise if the file names layers that see but a window, where there are none."""
    keys.texts("layer_types", keys.count("num_hidden_layers"), (FULL,))


def experts_of(config: ModelConfig, name: str) -> ExpertsConfig:
    """Return the experts of the layer to which a tensor of the table belongs."""
    feed = config.layers[int(name.split(".")[2])].feed
    assert isinstance(feed, ExpertsConfig)
    return feed


def each_expert(names: Mapping[str, str], parts: Mapping[str, str] = PARTS) -> Callable[[ModelConfig, str], Place]:
    """Return a `place` for checkpoints that have tensors of their own for each expert.

    names: {a part of this program's names: the checkpoint's}. parts: what it calls an expert's matrices.
    """

    def place(config: ModelConfig, name: str) -> Place:
        theirs = name
        for ours, their in names.items():
            theirs = theirs.replace(ours, their)
        if ".mlp.experts." not in name:
            return Ref(theirs)
        folder, part, _ = theirs.rsplit(".", 2)
        count = experts_of(config, name).num_experts
        return Stack(tuple(Ref(f"{folder}.{e}.{parts[part]}.weight") for e in range(count)))

    return place
