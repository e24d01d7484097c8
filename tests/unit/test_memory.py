"""Whether a model fits: positions of the KV cache from what each host has free."""

from __future__ import annotations

import pytest

from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.errors import ClusterError
from dllama_mpi.kernels.layout import FORMATS, TileFormat
from dllama_mpi.model.buffers import memory_bytes
from dllama_mpi.model.recipe import WeightRecipe, weight_bytes
from dllama_mpi.startup.memory import Need, available_bytes, fitting_positions
from dllama_mpi.startup.options import Kept
from dllama_mpi.startup.shares import MemoryPlan, shards_of
from tests.tiny_models.cases import CASES

GB = 10**9
GQA = read_model_config(CASES["llama3_gqa"].config)


def need(host: str, fixed: float, each: int, free: float) -> Need:
    """Return a rank's need with weights and free memory in GB, and bytes a position, its host's free memory in GB."""
    return Need(host, int(fixed * GB), each, int(free * GB))


def refused(needs: list[Need], wanted: int, is_explicit: bool) -> str:
    """Return the one line that says what does not fit."""
    with pytest.raises(ClusterError) as caught:
        fitting_positions(needs, wanted, is_explicit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("is_explicit", [False, True])
def test_all_that_is_wanted_fits(is_explicit: bool) -> None:
    assert fitting_positions([need("a", 1, 1000, 8)], 4096, is_explicit) == 4096


def test_fewer_positions_where_nobody_insists() -> None:
    # 95 % of 2 GB less 1 GB of weights are 0.9 GB.
    assert fitting_positions([need("a", 1, 100_000, 2)], 131072, False) == 9000


def test_the_tightest_host_decides() -> None:
    needs = [need("a", 1, 100_000, 2), need("b", 1, 100_000, 1.6), need("c", 1, 100_000, 100)]
    assert fitting_positions(needs, 131072, False) == 5200


def test_ranks_on_one_host_share_its_memory() -> None:
    needs = [need("a", 0.25, 40_000, 2), need("b", 1, 1, 50), need("a", 0.75, 60_000, 2)]
    assert fitting_positions(needs, 131072, False) == 9000


def test_the_least_of_what_ranks_saw_free_on_one_host_counts() -> None:
    needs = [need("a", 0.5, 50_000, 9), need("a", 0.5, 50_000, 2)]
    assert fitting_positions(needs, 131072, False) == 9000


def test_exactly_what_fits() -> None:
    tight = [Need("a", 500, 10, 1000)]  # 950 may be used: 45 positions
    assert fitting_positions(tight, 45, True) == 45
    assert "--max-seq-len 45 fits" in refused(tight, 46, True)


def test_what_was_asked_for_does_not_fit() -> None:
    assert refused([need("node7", 1, 100_000, 2)], 20_000, True) == (
        "rank 0 needs 3.00 GB (weights and buffers 1.00 GB, KV cache for 20000 positions 2.00 GB),"
        " node7 has 1.90 GB free: --max-seq-len 9000 fits"
    )


def test_a_useful_context_does_not_fit() -> None:
    assert refused([need("node7", 1, 10_000_000, 2)], 20_000, False) == (
        "rank 0 needs 3.56 GB (weights and buffers 1.00 GB, KV cache for 256 positions 2.56 GB),"
        " node7 has 1.90 GB free: --max-seq-len 90 fits"
    )


def test_a_short_context_is_no_reason_to_refuse() -> None:
    assert fitting_positions([need("a", 1, 10_000_000, 2)], 90, False) == 90


def test_not_even_the_weights_fit() -> None:
    needs = [need("a", 1, 1000, 100), need("b", 3, 1000, 2), need("b", 3, 1000, 2)]
    assert refused(needs, 20_000, False) == (
        "ranks 1 to 2 need 6.00 GB (weights and buffers 6.00 GB, KV cache for 256 positions 0.00 GB),"
        " b has 1.90 GB free: use more hosts, smaller --weights or another --split"
    )


def test_memory_of_this_host_is_told() -> None:
    assert 10**6 < available_bytes() < 10**15


def test_states_alone_take_no_room_for_positions() -> None:
    assert fitting_positions([need("a", 1, 0, 2)], 4096, False) == 4096
    assert "use more hosts" in refused([need("a", 3, 0, 2)], 4096, False)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_weights_of_one_rank_and_of_all(fmt: TileFormat) -> None:
    formats = WeightRecipe.parse(fmt.name).formats(GQA)
    (whole,) = shards_of(GQA, [1.0])
    # By hand: hidden 128, 8 heads and 2 KV heads of 16, inner 96, vocabulary 172 (11 tiles), 2 layers.
    tiles = 2 * ((8 + 2 + 2 + 8) * 4 + 3 * 6 * 4) + 11 * 4
    rows = 2 * (128 + 32 + 32 + 128 + 96 + 96 + 128) + 176
    scales = 4 * rows if fmt.has_row_scales else 0
    assert weight_bytes(GQA, whole, formats) == tiles * fmt.tile_bytes + scales + 4 * 128 * 5
    cut = sum(weight_bytes(GQA, part, formats) for part in shards_of(GQA, [1.0] * 3))
    assert weight_bytes(GQA, whole, formats) <= cut < 2 * weight_bytes(GQA, whole, formats)


def test_cache_and_buffers() -> None:
    kept = Kept.of(WeightRecipe.parse("q40").formats(GQA))
    for part in shards_of(GQA, [1.0] * 2):
        # Layers, KV heads, head_dim of keys (to 32s) and values (to 16s), bytes.
        assert memory_bytes(GQA, part, "f16") == (0, 2 * 1 * (32 + 16) * 2)
        assert memory_bytes(GQA, part, "f32") == (0, 2 * 1 * (32 + 16) * 4)
        few, many = (MemoryPlan(GQA, kept, tokens).buffers(part, ["a", "b"]) for tokens in (1, 100))
        assert 0 < few < many
        plan = MemoryPlan(GQA, kept, 1, slots=3)
        assert plan.per_position(part) == 3 * 2 * 1 * (32 + 16) * 2
        assert sum(plan.parts(part, ["a", "b"], 10).values()) == plan.fixed(part, ["a", "b"]) + 10 * plan.per_position(
            part
        )
