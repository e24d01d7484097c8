"""The cost model: arithmetic that can be done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dllama_mpi.kernels.layout import FORMATS, TileFormat
from dllama_mpi.model.buffers import memory_bytes
from dllama_mpi.model.config import AttentionConfig
from dllama_mpi.model.recipe import WeightRecipe, bytes_per_token, macs_per_token, weight_bytes
from dllama_mpi.parallel.collective.table import PAYLOADS
from dllama_mpi.parallel.network import LinkCurve, Network
from dllama_mpi.planning.costs import (
    AllReduces,
    AttentionWork,
    ExpertsWork,
    Speeds,
    Work,
    chunks,
    decode_cost,
    expected_experts,
    payload_bytes,
    prefill_cost,
    work_of,
)
from dllama_mpi.startup.opening import model_config
from dllama_mpi.startup.shares import shards_of
from tests.small_models import HYBRID, SPARSE

ONE_B, MOE = model_config("random:llama3.2-1b"), model_config("random:qwen3-30b-a3b")
Q40_1B, Q40_MOE = (WeightRecipe.parse("q40").formats(config) for config in (ONE_B, MOE))
WORK = Work(
    layers=2, all_reduces=4, size=8000, head_size=2000, macs=50_000, attentions=(AttentionWork(0, size=10, macs=4),)
)


def network(*hosts: str, latency: float = 1e-3, rate: float = 1e6) -> Network:
    """Return a network whose every two hosts have the same link; ranks of one host talk ten times faster."""
    names = sorted(set(hosts))
    links = {(a, b): LinkCurve.of(latency, rate) for a in names for b in names if a < b}
    links |= {(a, a): LinkCurve.of(latency / 10, rate * 10) for a in names if hosts.count(a) > 1}
    return Network(hosts, links)


def test_work_of_a_whole_model() -> None:
    (whole,) = shards_of(ONE_B, [1.0])
    work = work_of(ONE_B, whole, Q40_1B, "f16")
    # By hand: q and o 2048 x 2048, k and v 512 x 2048, gate, up and down 8192 x 2048; lm_head 128256 x 2048.
    layer = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048
    assert work.macs == work.token_macs == 16 * layer
    assert work.size == work.read() == work.read(9) == 16 * layer * 288 // 512 + 4 * 2048 * 33
    assert work.head_size == 128256 * 2048 * 288 // 512
    assert work.attentions == (AttentionWork(0, size=16 * 8 * (64 + 64) * 2, macs=16 * 32 * 64 * 2),)
    assert (work.layers, work.all_reduces, work.state_size, work.experts) == (16, 32, 0, ())
    assert work.read() + work.head_size == weight_bytes(ONE_B, whole, Q40_1B) == bytes_per_token(ONE_B, whole, Q40_1B)


def test_work_of_experts() -> None:
    """Qwen3-30B-A3B: 8 of 128 experts of 3 x 768 x 2048; the router, 128 x 2048, is read whole, in f16."""
    (whole,) = shards_of(MOE, [1.0])
    work, one = work_of(MOE, whole, Q40_MOE, "f16"), 3 * 768 * 2048
    attention = 2 * 4096 * 2048 + 2 * 512 * 2048
    assert work.experts == (ExpertsWork(128, 8, size=48 * 128 * one * 288 // 512, macs=48 * 8 * one),)
    assert work.macs == 48 * (attention + 128 * 2048)
    norms = 4 * (48 * (2 * 2048 + 2 * 128) + 2048)
    assert work.size == 48 * (attention * 288 // 512 + 128 * 2048 * 2) + norms
    assert work.read() == pytest.approx(work.size + work.experts[0].size / 16)


@pytest.mark.parametrize("name", ["llama3.2-1b", "qwen3-30b-a3b:3"])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("recipe", ["q40", "q4m,lm_head=q80,k=f16"])
def test_work_agrees_with_the_folds_over_the_table(name: str, ranks: int, recipe: str) -> None:
    config = model_config(f"random:{name}")
    formats = WeightRecipe.parse(recipe).formats(config)
    for shard in shards_of(config, [1.0] * ranks):
        work = work_of(config, shard, formats, "f16")
        assert work.read() + work.head_size == pytest.approx(bytes_per_token(config, shard, formats), abs=1)
        every = work.size + work.head_size + sum(each.size for each in work.experts)
        assert every == weight_bytes(config, shard, formats)
        assert work.token_macs == pytest.approx(macs_per_token(config, shard), abs=1)
        assert sum(each.size for each in work.attentions) == memory_bytes(config, shard, "f16")[1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_ranks_together_do_the_whole_work(fmt: TileFormat, ranks: int) -> None:
    formats = WeightRecipe.parse(fmt.name).formats(ONE_B)
    (whole,) = (work_of(ONE_B, shard, formats, "f16") for shard in shards_of(ONE_B, [1.0]))
    parts = [work_of(ONE_B, shard, formats, "f16") for shard in shards_of(ONE_B, [1.0] * ranks)]
    assert sum(p.attentions[0].macs for p in parts) == whole.attentions[0].macs
    assert sum(p.head_size for p in parts) == whole.head_size
    # KV heads that are cut live on both ranks.
    assert whole.macs <= sum(p.macs for p in parts) < 1.05 * whole.macs


def test_states_do_not_grow() -> None:
    """By hand: 3 delta nets with 2 key and 4 value heads of 32, and a convolution of 4 over q, k and v; 1 attention."""
    (whole,) = shards_of(HYBRID, [1.0])
    formats = WeightRecipe.parse("f32").formats(HYBRID)
    work = work_of(HYBRID, whole, formats, "f32")
    assert work.state_size == 3 * 4 * (4 * 32 * 32 + 3 * (2 * 64 + 128))
    assert work.attentions == (AttentionWork(0, size=2 * 2 * 32 * 4, macs=2 * 4 * 32),)
    matrices = macs_per_token(HYBRID, whole)
    assert work.token_macs == pytest.approx(matrices + 3 * 3 * 4 * 32 * 32)
    read = work.read() + work.head_size + work.cache_read(0, 1)
    cost = decode_cost([work], [Speeds(decode=1.0)], (0, 1), 0.0)
    assert cost.compute == pytest.approx(read + 2 * work.state_size)  # which are written back


def test_experts_that_are_expected() -> None:
    assert expected_experts(8, 2, 0) == 0
    assert expected_experts(8, 2, 1) == pytest.approx(2)
    assert expected_experts(8, 2, 2) == pytest.approx(2 + 2 * 6 / 8)
    assert expected_experts(4, 4, 9) == 4
    assert expected_experts(128, 8, 10_000) == pytest.approx(128)


def test_experts_that_are_drawn() -> None:
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(400):
        drawn = [rng.permutation(16)[:3] for _ in range(6)]
        counts.append(len(set(np.concatenate(drawn).tolist())))
    assert np.mean(counts) == pytest.approx(expected_experts(16, 3, 6), rel=0.02)


def test_a_chunk_reads_no_expert_twice() -> None:
    sparse = replace(WORK, experts=(ExpertsWork(8, 2, size=80_000, macs=1000),))
    assert sparse.read(1) == 8000 + 20_000
    assert sparse.read(1000) == pytest.approx(8000 + 80_000)
    assert sparse.token_macs == 51_000
    slow, fast = Speeds(decode=1e6, prefill=1e4), Speeds(decode=1e6, prefill=1e12)
    for speeds, seconds in ((slow, 512 * 5.1), (fast, 0.008 + 0.08)):  # bound by computing, and by reading
        cost = prefill_cost([sparse], [speeds], [(0, 512)], lambda _: 0.0)
        assert cost is not None
        assert cost.weights == pytest.approx(seconds + 2000 / 1e6)


def test_positions_seen() -> None:
    whole, window = AttentionWork(0, size=10, macs=4), AttentionWork(4, size=1, macs=2)
    assert whole.seen(0, 1) == 1
    assert whole.seen(0, 4) == 2.5
    assert whole.seen(10, 3) == 12
    assert window.seen(9, 1) == 4
    assert window.seen(0, 6) == pytest.approx((1 + 2 + 3 + 4 + 4 + 4) / 6)
    both = replace(WORK, attentions=(whole, window))
    assert both.cache_read(9, 1) == 10 * 10 + 4
    assert both.attention_macs(0, 6) == pytest.approx(4 * 21 + 2 * 18)


def test_norms_over_all_heads_are_summed_too() -> None:
    (whole,) = shards_of(SPARSE, [1.0])
    layer = SPARSE.layers[0]
    assert isinstance(layer.mixer, AttentionConfig)
    normed = replace(SPARSE, layers=(replace(layer, mixer=replace(layer.mixer, qk_norm="whole")), *SPARSE.layers[1:]))
    counts = [work_of(c, whole, WeightRecipe.parse("q40").formats(c), "f16").all_reduces for c in (SPARSE, normed)]
    assert counts == [2 * SPARSE.num_layers, 2 * SPARSE.num_layers + 1]


def test_decode_of_one_rank() -> None:
    speeds = Speeds(decode=1e6, layer_seconds=1e-3, step_seconds=5e-3)
    cost = decode_cost([WORK], [speeds], (0, 4), 0.0)
    assert (cost.weights, cost.attention, cost.overhead) == pytest.approx((0.01, 25e-6, 7e-3))
    assert cost.synchronisation == 0
    assert cost.total == pytest.approx(0.017025)


def test_the_slowest_rank_decides_and_layers_are_summed_twice() -> None:
    fast, slow = Speeds(decode=4e6), Speeds(decode=1e6)
    cost = decode_cost([WORK, WORK, WORK], [fast, slow, fast], (0, 1), 1e-3)
    assert cost.weights == pytest.approx(0.01)
    assert cost.synchronisation == pytest.approx(4e-3)
    assert cost.total == pytest.approx(cost.compute + 4e-3)


def test_prefill_in_chunks() -> None:
    assert chunks(0, 512, 256) == [(0, 256), (256, 256)]
    assert chunks(3, 10, 4) == [(3, 4), (7, 4), (11, 2)]
    speeds = Speeds(
        decode=1e7, prefill=1e8, attention=1e4, step_seconds=1e-3, token_layer_seconds=1e-5, token_seconds=1e-6
    )
    cost = prefill_cost([WORK], [speeds], [(0, 4), (4, 2)], lambda tokens: tokens * 1e-3)
    assert cost is not None
    assert cost.weights == pytest.approx(6 * 50_000 / 1e8 + 2 * 2000 / 1e7)
    assert cost.attention == pytest.approx((4 * 2.5 + 2 * 5.5) * 4 / 1e4)
    assert cost.overhead == pytest.approx(6 * (2e-5 + 1e-6) + 2e-3)
    assert cost.synchronisation == pytest.approx(4 * 6e-3)


def test_hidden_synchronisation_and_unknown_rates() -> None:
    speeds = Speeds(decode=1e6, prefill=1e8)
    open_, half = (prefill_cost([WORK], [speeds], [(0, 4)], lambda _: 1.0, hidden) for hidden in (0.0, 0.5))
    assert open_ is not None
    assert half is not None
    assert half.synchronisation == open_.synchronisation / 2
    assert half.compute == open_.compute
    assert prefill_cost([WORK], [Speeds(decode=1e6)], [(0, 4)], lambda _: 0.0) is None


def test_attention_without_a_rate_of_its_own() -> None:
    speeds = Speeds(decode=1e6, prefill=1e8)
    cost = prefill_cost([WORK], [speeds], [(0, 1)], lambda _: 0.0)
    assert cost is not None
    assert cost.attention == pytest.approx(4 / 1e8)


@pytest.mark.parametrize(("name", "width"), PAYLOADS.items())
def test_payload_bytes(name: str, width: int) -> None:
    few = PAYLOADS["q80"] if name == "q40" else width
    assert payload_bytes(ONE_B, 1, name) == 64 * few
    assert payload_bytes(ONE_B, 31, name) == 31 * 64 * few
    assert payload_bytes(ONE_B, 32, name) == 32 * 64 * width
    assert payload_bytes(replace(ONE_B, hidden_size=33), 1, name) == 2 * few


# ---- all-reduce


def test_two_ranks_swap_in_one_hop() -> None:
    assert network("a", "b").all_reduce_seconds(2, 1000) == pytest.approx(2e-3)
    assert network("a", "b").all_reduce_seconds(1, 1000) == 0


def test_small_payloads_go_directly_and_large_ones_in_parts() -> None:
    four = network("a", "b", "c", "d")
    assert four.all_reduce_seconds(4, 100) == pytest.approx(1e-3 + 300e-6)  # one hop of 3 payloads
    assert four.all_reduce_seconds(4, 8000) == pytest.approx(2 * (1e-3 + 6e-3))  # two hops of 3/4 of one


def test_ranks_of_one_host_share_its_link() -> None:
    assert network("a", "a").all_reduce_seconds(2, 1000) == pytest.approx(1e-4 + 1e-4)
    both = network("a", "a", "b", "b")
    assert both.all_reduce_seconds(4, 10) == pytest.approx(1e-3 + 4 * 10 / 1e6)  # 2 ranks to 2 others


def test_only_links_between_the_ranks_at_work_count() -> None:
    links = {
        ("a", "b"): LinkCurve.of(1e-3, 1e6),
        ("a", "c"): LinkCurve.of(1.0, 1e6),
        ("b", "c"): LinkCurve.of(1.0, 1e6),
    }
    three = Network(("a", "b", "c"), links)
    assert three.all_reduce_seconds(2, 0) == pytest.approx(1e-3)
    assert three.all_reduce_seconds(3, 0) == pytest.approx(1.0)


def test_what_was_measured_holds_at_its_number_of_ranks() -> None:
    reduces = AllReduces(network("a", "b", "c"), 3, ((1000.0, 5e-3), (3000.0, 9e-3)))
    assert reduces.seconds(1, 1000) == 0
    assert reduces.seconds(3, 1000) == 5e-3
    assert reduces.seconds(3, 2000) == pytest.approx(7e-3)


def test_what_messages_took_beyond_the_wire_is_carried_over() -> None:
    wire = network("a", "b", "c")
    reduces = AllReduces(wire, 3, ((1000.0, 5e-3), (3000.0, 1e-4)))
    beyond = 5e-3 - wire.all_reduce_seconds(3, 1000)
    assert reduces.seconds(2, 1000) == pytest.approx(wire.all_reduce_seconds(2, 1000) + beyond)
    assert reduces.seconds(2, 3000) == pytest.approx(wire.all_reduce_seconds(2, 3000))  # never less than the wire


# ---- published figures


def test_four_raspberry_pi_5_from_two() -> None:
    """Distributed Llama, Llama-3-8B in Q40 with Q80 payloads, Raspberry Pi 5s on gigabit Ethernet.

    Published (b4rtaz/distributed-llama pull request 64): on two boards 269.04 ms of computing and 56.39 ms of transfer
    a token; on four 169.33 and 75.34 ms, 4.08 tokens/s. The same page gives 272 kB a token each way between the root
    and its one worker, 816 kB with three: 4352 bytes, 4096 values in Q80, 64 times to and from each worker.

    Taken from the two boards: the rate at which a board goes through its weights, and what an exchange takes beyond the
    wire. From the program: layers are cut evenly, the lm_head stays whole on the root, and the root exchanges a whole
    payload with each worker, first out, then in. Predicted: four boards.
    """
    config = model_config("random:llama3.1-8b")
    formats = WeightRecipe.parse("q40").formats(config)
    payload = payload_bytes(config, 1, "q80")
    assert payload == 4352
    assert 2 * config.num_layers * payload == pytest.approx(272e3, rel=0.03)  # published as kB, perhaps of 1024

    def root(boards: int) -> Work:
        work = work_of(config, shards_of(config, [1.0] * boards)[0], formats, "f32")
        (whole,) = (work_of(config, part, formats, "f32") for part in shards_of(config, [1.0]))
        return replace(work, head_size=whole.head_size)

    two = root(2)
    speeds = Speeds(decode=(two.read() + two.head_size) / 0.26904)
    assert 8e9 < speeds.decode < 9e9  # of the 10 to 11.4 GB/s that a board's memory gives other programs

    def wire(boards: int) -> float:
        return 2 * (boards - 1) * payload / 125e6

    beyond = 0.05639 / (2 * config.num_layers) - wire(2)
    assert beyond > 0
    cost = decode_cost([root(4)], [speeds], (0, 1), beyond + wire(4))
    assert cost.compute == pytest.approx(0.16933, rel=0.15)
    assert cost.synchronisation == pytest.approx(0.07534, rel=0.15)
    assert 1 / cost.total == pytest.approx(4.08, rel=0.15)
