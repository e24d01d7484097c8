"""Whether a model fits: positions of the KV cache from what each host has free."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama_mpi.architectures.registry import read_model_config
from dllama_mpi.errors import ClusterError
from dllama_mpi.kernels.layout import FORMATS, PAGE, TileFormat, ceil_div
from dllama_mpi.model.buffers import memory_bytes
from dllama_mpi.model.recipe import WeightRecipe, weight_bytes
from dllama_mpi.startup import memory
from dllama_mpi.startup.memory import Need, Room, Wish, available_bytes, fitting, usable_bytes
from dllama_mpi.startup.options import Kept
from dllama_mpi.startup.shares import MemoryPlan, shards_of
from tests.tiny_models.cases import CASES

GB = 10**9
GQA = read_model_config(CASES["llama3_gqa"].config)


def need(host: str, fixed: float, each: int, free: float) -> Need:
    """Return a rank's need with weights and free memory in GB, and bytes a position, its host's free memory in GB."""
    return Need(host, int(fixed * GB), each, int(free * GB))


def positions(needs: list[Need], wanted: int, is_explicit: bool) -> int:
    """Return the positions of one sequence that fit."""
    return fitting(needs, Wish(wanted, is_explicit)).positions


def refused(needs: list[Need], wanted: int, is_explicit: bool, kv_bytes: int | None = None) -> str:
    """Return the one line that says what does not fit."""
    with pytest.raises(ClusterError) as caught:
        fitting(needs, Wish(wanted, is_explicit, 1, kv_bytes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("is_explicit", [False, True])
def test_all_that_is_wanted_fits(is_explicit: bool) -> None:
    assert positions([need("a", 1, 1000, 8)], 4096, is_explicit) == 4096
    assert positions([need("a", 1, 1000, 8)], 4000, is_explicit) == 4000


def test_fewer_positions_where_nobody_insists() -> None:
    # 95 % of 2 GB less 1 GB of weights are 0.9 GB: 9000 positions, 35 whole pages.
    assert positions([need("a", 1, 100_000, 2)], 131072, False) == 8960


def test_the_tightest_host_decides() -> None:
    needs = [need("a", 1, 100_000, 2), need("b", 1, 100_000, 1.6), need("c", 1, 100_000, 100)]
    assert positions(needs, 131072, False) == 5120


def test_ranks_on_one_host_share_its_memory() -> None:
    needs = [need("a", 0.25, 40_000, 2), need("b", 1, 1, 50), need("a", 0.75, 60_000, 2)]
    assert positions(needs, 131072, False) == 8960


def test_the_least_of_what_ranks_saw_free_on_one_host_counts() -> None:
    needs = [need("a", 0.5, 50_000, 9), need("a", 0.5, 50_000, 2)]
    assert positions(needs, 131072, False) == 8960


def test_exactly_what_fits() -> None:
    tight = [Need("a", 500, 1, 1053)]  # 1000 may be used: 500 positions, one whole page
    assert positions(tight, 256, True) == 256
    assert "--max-seq-len 256 fits" in refused(tight, 257, True)


def test_what_was_asked_for_does_not_fit() -> None:
    assert refused([need("node7", 1, 100_000, 2)], 20_000, True) == (
        "rank 0 needs 3.00 GB (weights and buffers 1.00 GB, KV cache for 20000 positions 2.00 GB),"
        " node7 has 1.90 GB free: --max-seq-len 8960 fits"
    )


def test_a_useful_context_does_not_fit() -> None:
    assert refused([need("node7", 1, 10_000_000, 2)], 20_000, False) == (
        "rank 0 needs 3.56 GB (weights and buffers 1.00 GB, KV cache for 256 positions 2.56 GB),"
        " node7 has 1.90 GB free: use more hosts, smaller --weights or another --split"
    )


def test_a_short_context_takes_a_page() -> None:
    assert positions([need("a", 1, 1_000_000, 2)], 90, False) == 90
    assert "KV cache for 90 positions" in refused([need("a", 1, 10_000_000, 2)], 90, False)


def test_not_even_the_weights_fit() -> None:
    needs = [need("a", 1, 1000, 100), need("b", 3, 1000, 2), need("b", 3, 1000, 2)]
    assert refused(needs, 20_000, False) == (
        "ranks 1 to 2 need 6.00 GB (weights and buffers 6.00 GB, KV cache for 256 positions 0.00 GB),"
        " b has 1.90 GB free: use more hosts, smaller --weights or another --split"
    )


def test_memory_of_this_host_is_told() -> None:
    assert 10**6 < available_bytes() < 10**15


def control_group(folder: Path, files: dict[str, str]) -> None:
    """Write the files by which a control group tells of its memory."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text + "\n", encoding="ascii")


def left_by_groups(folder: Path, cgroup: str) -> list[int]:
    """Return what the control groups in a folder leave to a process with such a line in /proc/self/cgroup."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(cgroup, encoding="ascii")
    return list(memory._left_by_groups(folder / "proc", folder / "groups"))


def test_limits_of_control_groups(tmp_path: Path) -> None:
    job = tmp_path / "groups" / "slurm" / "job_7"
    control_group(job / "step_0", {"max": "max", "current": "5000", "stat": "anon 4000\ninactive_file 1000"})
    control_group(tmp_path / "groups" / "elsewhere", {"max": "1", "current": "1", "stat": "anon 1"})
    for name, text in (("max", "9000"), ("current", "6000"), ("stat", "anon 4000\ninactive_file 1500")):
        (job / f"memory.{name}").write_text(text, encoding="ascii")
    assert left_by_groups(tmp_path, "0::/slurm/job_7/step_0\n") == [4500]


def test_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    files = {"limit_in_bytes": "9000", "usage_in_bytes": "9500", "stat": "total_inactive_file 100\ninactive_file 7"}
    control_group(tmp_path / "groups" / "memory" / "user", files)
    control_group(tmp_path / "groups" / "user", {"max": "1", "current": "0", "stat": "anon 0"})
    assert left_by_groups(tmp_path, "5:cpuset:/user\n4:memory:/user\n") == [0]


def test_a_container_has_its_own_limit_at_the_top(tmp_path: Path) -> None:
    control_group(tmp_path / "groups", {"max": "300", "current": "100", "stat": "anon 100"})
    assert left_by_groups(tmp_path, "0::/kubepods/pod-1/container-2\n") == [200]


def test_without_control_groups(tmp_path: Path) -> None:
    assert list(memory._left_by_groups(tmp_path, tmp_path)) == []


def test_states_alone_take_no_room_for_positions() -> None:
    assert positions([need("a", 1, 0, 2)], 4096, False) == 4096
    assert "use more hosts" in refused([need("a", 3, 0, 2)], 4096, False)


def test_sequences_share_what_there_is() -> None:
    """Many sequences take no more memory than there is, and no more than they can use."""
    rank = [need("a", 1, 100_000, 2)]  # room for 35 pages
    assert fitting(rank, Wish(1024, True, 64)) == Room(1024, 35)
    assert fitting(rank, Wish(1024, True, 3)) == Room(1024, 12)
    assert fitting(rank, Wish(131072, False, 64)) == Room(8960, 35)


def test_memory_for_the_cache_by_order() -> None:
    rank = [need("a", 1, 100_000, 2), need("b", 1, 50_000, 2)]
    assert fitting(rank, Wish(1024, True, 64, GB // 2)) == Room(1024, 19)
    assert fitting(rank, Wish(131072, False, 1, GB // 2)) == Room(4864, 19)
    assert fitting(rank, Wish(256, True, 1, GB // 2)) == Room(256, 19)  # the rest remembers
    assert refused(rank, 1024, True, GB // 20) == (
        "--kv-memory 0.05 holds 256 positions, and --max-seq-len is 1024: give 0.102 or more"
    )
    assert refused(rank, 1024, True, 2 * GB).endswith("a has 1.90 GB free: --kv-memory 0.896 fits")


# --------------------------------------------------------------------------------------------------------------------
# Layers with a window
# --------------------------------------------------------------------------------------------------------------------

MB = 10**6
FAR, NEAR = 20_000, 120_000  # bytes of a position


def windowed(host: str, fixed: float, free: float, far: int = FAR, near: int = NEAR, pages: int = 6) -> Need:
    """Return the need of a rank whose layers with a window keep so many pages of a sequence."""
    return Need(host, int(fixed * GB), far, int(free * GB), near, pages)


def taken(needs: list[Need], room: Room) -> int:
    """Return the bytes that ranks take of KV cache."""
    return PAGE * sum(room.pages * n.per_position + room.window_pages * n.per_window_position for n in needs)


def test_a_window_needs_no_more_memory_for_longer_texts() -> None:
    one = windowed("a", 0, 0)
    assert one.cache(1000) == 1000 * (FAR + NEAR)
    assert one.cache(100_000) - one.cache(10_000) == 90_000 * FAR
    assert fitting([windowed("a", 1, 8)], Wish(131072, False)) == Room(131072, 512, 12)
    assert fitting([need("a", 1, FAR + NEAR, 8)], Wish(131072, False)).positions < 50_000


def test_short_texts_have_as_many_pages_for_windows_as_others() -> None:
    assert fitting([windowed("a", 1, 8)], Wish(1000, True)) == Room(1000, 4, 4)
    assert fitting([windowed("a", 1, 8)], Wish(1000, True, 3)) == Room(1000, 12, 12)
    assert fitting([windowed("a", 1, 8)], Wish(2048, True, 3)) == Room(2048, 24, 24)
    assert fitting([windowed("a", 1, 8)], Wish(8192, True, 3)) == Room(8192, 96, 36)


def test_a_model_of_windows_alone() -> None:
    ids = windowed("a", 1, 8, far=4)
    assert fitting([ids], Wish(131072, True)) == Room(131072, 512, 12)
    assert fitting([ids], Wish(131072, True, 1, GB)).window_pages == (GB - 512 * PAGE * 4) // (PAGE * (NEAR + 4 * 16))


@given(
    hosts=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 4000), st.integers(0, 2)), min_size=1, max_size=4),
    far=st.integers(4, 300_000),
    near=st.integers(1, 300_000),
    window_pages=st.integers(1, 20),
    wanted=st.integers(1, 200_000),
    is_explicit=st.booleans(),
    sequences=st.integers(1, 64),
    kv_bytes=st.none() | st.integers(1, 4 * GB),
)
def test_no_more_is_given_than_there_is(
    hosts: list[tuple[int, int, int]],
    far: int,
    near: int,
    window_pages: int,
    wanted: int,
    is_explicit: bool,
    sequences: int,
    kv_bytes: int | None,
) -> None:
    """What is given fits on every host, does for a sequence, and leaves less than a page unless all is fulfilled."""
    needs = [Need(f"h{host}", fixed * MB, far, free * MB, near, window_pages) for fixed, free, host in hosts]
    wish = Wish(wanted, is_explicit, sequences, kv_bytes)
    try:
        room = fitting(needs, wish)
    except ClusterError:
        return
    least = [math.inf]
    for host in {n.host for n in needs}:
        own = [n for n in needs if n.host == host]
        left = usable_bytes(own) - sum(n.fixed for n in own) - taken(own, room)
        assert left >= 0
        least.append(left / len(own))
    one = ceil_div(room.positions, PAGE)
    assert room.pages >= one
    assert room.pages >= room.window_pages >= min(one, window_pages)
    if kv_bytes is not None:
        assert kv_bytes - taken(needs[:1], room) >= 0
    elif room.positions < wanted:
        assert min(least) < PAGE * (far + near)


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
        plan = MemoryPlan(GQA, kept, 1, sequences=3)
        each = 2 * 1 * (32 + 16) * 2 + 4  # keys, values and the token's id
        assert plan.need(part).per_position == each
        assert sum(plan.parts(part, ["a", "b"], 10).values()) == plan.fixed(part, ["a", "b"]) + 256 * each
