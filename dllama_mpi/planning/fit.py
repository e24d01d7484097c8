"""On which hosts the models of the table fit, from their shapes alone; nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.registry import read_model_config
from ..errors import ClusterError
from ..hub.names import Model
from ..kernels.layout import FORMATS, PAGE, TileFormat, ceil_to
from ..model.config import ModelConfig
from ..model.recipe import DEFAULT, WeightRecipe
from ..model.shapes import SHAPES
from ..model.tensors import Kind, tensors
from ..parallel.partition import Shard
from ..startup.memory import Need, fitting
from ..startup.opening import model_config
from ..startup.options import Kept
from ..startup.shares import MemoryPlan, most_ranks, shards_of

CONTEXT = 4096  # positions that memory is told for
_TOKENS = 257  # in a step: a chunk of a prompt, and a token of another sequence
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # hosts that are tried


def config_of(model: Model) -> ModelConfig:
    """Return the shape of a model of the table."""
    values: dict[str, Any] = copy.deepcopy(SHAPES[model.shape])
    values.update(model.changes)
    return read_model_config(values, model.name)


def formats_of(model: Model, config: ModelConfig) -> Mapping[str, TileFormat]:
    """Return the formats in which a model's matrices are kept: of a Q4_K_M file its own, else the default's."""
    found = WeightRecipe.parse(DEFAULT).formats(config)
    return {**found, **_more_bits(config)} if model.gguf else found


def _more_bits(config: ModelConfig) -> dict[str, TileFormat]:
    """Return the matrices for which a Q4_K_M file has 6 bits, kept in q80: the lm_head, v and down in half the layers.

    As llama.cpp chooses them: the first and last eighth of the layers, and of those between each third.
    """
    layers, found = config.num_layers, {}
    eighth = layers // 8
    for spec in tensors(config):
        if spec.kind is not Kind.MATRIX:
            continue
        numbers = [int(part) for part in spec.name.split(".") if part.isdecimal()]
        layer = numbers[0] if numbers else 0
        is_chosen = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        if spec.role == "lm_head" or (spec.role in ("v", "down", "expert_down") and is_chosen):
            found[spec.name] = FORMATS["q80"]
    return found


def fitting_of_folder(folder: Path) -> Fitting:
    """Return what is known of a model directory, as its config.json tells it, kept in the default's formats.

    Raises:
        ModelError: its config.json cannot be used.
    """
    config = model_config(str(folder))
    return Fitting(config, WeightRecipe.parse(DEFAULT).formats(config))


@dataclass(frozen=True)
class Fit:
    """Whether a model fits on some hosts, one rank each.

    Attributes:
        ranks: how many. needed: bytes of the largest rank with `CONTEXT` positions. positions: what the context can
            be; None if it does not fit.
    """

    ranks: int
    needed: int
    positions: int | None


class Fitting:
    """A model, to be shared out over equal hosts, one rank each."""

    def __init__(self, config: ModelConfig, formats: Mapping[str, TileFormat]) -> None:
        self.config, self._kept = config, Kept.of(formats)
        self._positions = min(CONTEXT, self.config.max_position_embeddings)
        self._known: dict[tuple[object, ...], tuple[int, int]] = {}
        self._whole = self._needs(1, 0)[0].fixed
        self.most = most_ranks(self.config)

    @classmethod
    def of(cls, model: Model) -> Fitting:
        """Return what is known of a model of the table."""
        config = config_of(model)
        return cls(config, formats_of(model, config))

    def _plan(self, positions: int | None) -> MemoryPlan:
        return MemoryPlan(self.config, self._kept, _TOKENS, max_seq_len=positions)

    def _needs(self, ranks: int, free: int) -> list[Need]:
        """Return what the ranks need; of those that are alike but the first, one."""
        plan, hosts = self._plan(None), [f"host {rank}" for rank in range(ranks)]
        unlike: dict[tuple[object, ...], Shard] = {}
        for shard in shards_of(self.config, [1.0] * ranks):
            sizes = tuple(last - first for first, last in shard.ranges.values())
            unlike.setdefault((shard.rank == 0, *sizes), shard)
        return [
            Need(hosts[shard.rank], *self._sizes(plan, shard, hosts, (ranks, *sizes)), free)
            for sizes, shard in unlike.items()
        ]

    def _sizes(self, plan: MemoryPlan, shard: Shard, hosts: list[str], key: tuple[object, ...]) -> tuple[int, int]:
        """Return the bytes that a rank needs, without a KV cache, and for one position of it."""
        if key not in self._known:
            held = plan.parts(shard, hosts, PAGE)
            self._known[key] = sum(held.values()) - held["kv_cache"], held["kv_cache"] // PAGE
        return self._known[key]

    def on(self, ranks: int, free: int) -> Fit | None:
        """Return how it fits on hosts that have `free` bytes each; None if it cannot be cut for so many."""
        if ranks > self.most:
            return None
        needs = self._needs(ranks, free)
        needed = max(need.fixed + ceil_to(self._positions, PAGE) * need.per_position for need in needs)
        try:
            fitting(needs, self._plan(self._positions).wish)
        except ClusterError:
            return Fit(ranks, needed, None)
        return Fit(ranks, needed, fitting(needs, self._plan(None).wish).positions)

    def least(self, free: int) -> Fit | None:
        """Return the fewest hosts with `free` bytes each on which it fits; None if none of the counts tried will do."""
        for ranks in (*(count for count in _COUNTS if count < self.most), self.most):
            if self._whole <= ranks * free:  # cut for more ranks it does not become smaller
                found = self.on(ranks, free)
                if found is not None and found.positions is not None:
                    return found
        return None
