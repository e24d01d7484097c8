"""The cost model: arithmetic that can be done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dllama_mpi.kernels.layout import FORMATS, Q40
from dllama_mpi.model.config import ModelConfig
from dllama_mpi.model.shapes import shape_config
from dllama_mpi.model.size import weight_bytes
from dllama_mpi.parallel.collective.all_reduce import PAYLOADS
from dllama_mpi.parallel.network import Link, Network
from dllama_mpi.planning.costs import (
    AllReduces,
    Cost,
    Speeds,
    Work,
    chunks,
    decode_cost,
    payload_bytes,
    prefill_cost,
    work_of,
)
from dllama_mpi.startup.shares import shards_of

ONE_B = ModelConfig.from_hf(shape_config("llama3.2-1b"))
WORK = Work(
    windows=(0, 0), weight_bytes=8000, head_bytes=2000, macs=50_000, position_bytes=10, attention_macs=4
)  # fmt: skip


def network(*hosts: str, latency: float = 1e-3, rate: float = 1e6) -> Network:
    """Return a network whose every two hosts have the same link; ranks of one host talk ten times faster."""
    names = sorted(set(hosts))
    links = {(a, b): Link.of(latency, rate) for a in names for b in names if a < b}
    links |= {(a, a): Link.of(latency / 10, rate * 10) for a in names if hosts.count(a) > 1}
    return Network(hosts, links)


def test_work_of_a_whole_model() -> None:
    (whole,) = shards_of(ONE_B, [1.0])
    work = work_of(ONE_B, whole, Q40, "f16")
    # By hand: q and o 2048 x 2048, k and v 512 x 2048, gate, up and down 8192 x 2048; lm_head 128256 x 2048.
    layer = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048
    assert work.macs == 16 * layer
    assert work.weight_bytes == 16 * layer * 288 // 512
    assert work.head_bytes == 128256 * 2048 * 288 // 512
    assert work.position_bytes == 16 * 8 * (64 + 64) * 2
    assert work.attention_macs == 16 * 32 * 64 * 2
    norms = 4 * 2048 * 33
    assert work.weight_bytes + work.head_bytes + norms == weight_bytes(ONE_B, whole, Q40)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_ranks_together_do_the_whole_work(fmt, ranks: int) -> None:  # type: ignore[no-untyped-def]
    (whole,) = (work_of(ONE_B, part, fmt, "f16") for part in shards_of(ONE_B, [1.0]))
    parts = [work_of(ONE_B, part, fmt, "f16") for part in shards_of(ONE_B, [1.0] * ranks)]
    assert sum(p.attention_macs for p in parts) == whole.attention_macs
    assert sum(p.head_bytes for p in parts) == whole.head_bytes
    # KV heads that are cut live on both ranks.
    assert whole.macs <= sum(p.macs for p in parts) < 1.05 * whole.macs


def test_positions_seen() -> None:
    assert WORK.seen(0, 1) == 1
    assert WORK.seen(0, 4) == 2.5
    assert WORK.seen(10, 3) == 12
    half = replace(WORK, windows=(0, 4))
    assert half.seen(9, 1) == (10 + 4) / 2
    assert half.seen(0, 6) == pytest.approx((3.5 + (1 + 2 + 3 + 4 + 4 + 4) / 6) / 2)


def test_decode_of_one_rank() -> None:
    speeds = Speeds(decode=1e6, layer_seconds=1e-3, step_seconds=5e-3)
    cost = decode_cost([WORK], [speeds], (0, 4), 0.0)
    assert cost == Cost(weights=pytest.approx(0.01), attention=pytest.approx(25e-6), overhead=pytest.approx(7e-3))
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
        decode=1e6, prefill=1e8, attention=1e4, step_seconds=1e-3, token_layer_seconds=1e-5, token_seconds=1e-6
    )
    cost = prefill_cost([WORK], [speeds], [(0, 4), (4, 2)], lambda tokens: tokens * 1e-3)
    assert cost is not None
    assert cost.weights == pytest.approx(6 * 50_000 / 1e8 + 2 * 2000 / 1e6)
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
    assert payload_bytes(ONE_B, 1, width) == 64 * width
    assert payload_bytes(ONE_B, 3, width) == 192 * width
    assert payload_bytes(replace(ONE_B, hidden_size=33), 1, width) == 2 * width


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
    links = {("a", "b"): Link.of(1e-3, 1e6), ("a", "c"): Link.of(1.0, 1e6), ("b", "c"): Link.of(1.0, 1e6)}
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
    config = ModelConfig.from_hf(shape_config("llama3.1-8b"))
    payload = payload_bytes(config, 1, PAYLOADS["q80"])
    assert payload == 4352
    assert 2 * config.num_layers * payload == pytest.approx(272e3, rel=0.03)  # published as kB, perhaps of 1024

    def root(boards: int) -> Work:
        work = work_of(config, shards_of(config, [1.0] * boards)[0], Q40, "f32")
        (whole,) = (work_of(config, part, Q40, "f32") for part in shards_of(config, [1.0]))
        return replace(work, head_bytes=whole.head_bytes)

    two = root(2)
    speeds = Speeds(decode=(two.weight_bytes + two.head_bytes) / 0.26904)
    assert 8e9 < speeds.decode < 9e9  # of the 10 to 11.4 GB/s that a board's memory gives other programs

    def wire(boards: int) -> float:
        return 2 * (boards - 1) * payload / 125e6

    beyond = 0.05639 / (2 * config.num_layers) - wire(2)
    assert beyond > 0
    cost = decode_cost([root(4)], [speeds], (0, 1), beyond + wire(4))
    assert cost.compute == pytest.approx(0.16933, rel=0.15)
    assert cost.synchronisation == pytest.approx(0.07534, rel=0.15)
    assert 1 / cost.total == pytest.approx(4.08, rel=0.15)
