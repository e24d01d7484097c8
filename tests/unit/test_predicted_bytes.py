"""What a rank is predicted to need is what it allocates: dense models, with experts, with states, with windows."""

from __future__ import annotations

import pytest

from dllama_mpi.kernels.layout import BLOCK, PAGE, ceil_to
from dllama_mpi.model.buffers import Sizes
from dllama_mpi.model.build import load
from dllama_mpi.model.config import ModelConfig
from dllama_mpi.model.recipe import WeightRecipe
from dllama_mpi.model.transformer import Rank, Transformer
from dllama_mpi.parallel.collective.memory import all_reduce_bytes
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.startup.opening import random_source
from dllama_mpi.startup.options import Kept
from dllama_mpi.startup.shares import MemoryPlan, shards_of
from tests.allocated import transformer_bytes
from tests.small_models import DENSE, SPARSE, STATE, WINDOWS
from tests.tiers import all_but

POSITIONS, TOKENS, SEQUENCES = 1024, 65, 2
CONFIGS = {"dense": DENSE, "sparse": SPARSE, "state": STATE, "windows": WINDOWS}


def allocated(config: ModelConfig, plan: MemoryPlan, ranks: int, rank: int) -> int:
    """Return what a rank of so many allocates, but for its all-reduces'."""
    kept = plan.kept
    group, shard = TensorParallelGroup(None), shards_of(config, [1.0] * ranks)[rank]
    weights = load(random_source("small", config), config, shard, kept.formats)
    model = Transformer(weights, config, Rank(group, shard, kept.formats, 1))
    terms = group.prepare_all_reduce(TOKENS, ceil_to(config.hidden_size, BLOCK), kept.payload, "auto")
    near = plan.window_pages or None
    model.allocate(terms, Sizes(TOKENS, plan.slots, POSITIONS // PAGE, kept.kv_type, near))
    return transformer_bytes(model) - terms.nbytes


@pytest.mark.parametrize("ranks", all_but((1, 3, 8), range(1, 9)))
@pytest.mark.parametrize(("recipe", "kv_type"), [("q40", "q80"), ("q4m,lm_head=f16", "f16"), ("f32", "f32")])
@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_is_allocated(name: str, recipe: str, kv_type: str, ranks: int) -> None:
    config = CONFIGS[name]
    kept = Kept.of(WeightRecipe.parse(recipe).formats(config), kv_type)
    plan, hosts = MemoryPlan(config, kept, TOKENS, SEQUENCES), [f"host{rank}" for rank in range(ranks)]
    shards = shards_of(config, [1.0] * ranks)
    needs = plan.needs(shards, [(host, 10**12) for host in hosts])
    width = ceil_to(config.hidden_size, BLOCK)
    exchanged = all_reduce_bytes(ranks, 1, ranks, TOKENS, width, kept.payload)
    for rank in {0, ranks // 2, ranks - 1}:
        predicted = needs[rank].fixed + needs[rank].cache(POSITIONS)
        found = allocated(config, plan, ranks, rank) + exchanged
        assert predicted == pytest.approx(found, rel=0.02)
        assert sum(plan.parts(shards[rank], hosts, POSITIONS).values()) == predicted
