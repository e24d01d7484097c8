"""From a cluster's figures to the plan that people read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dllama_mpi.cli.plan import _text
from dllama_mpi.errors import UsageError
from dllama_mpi.model.recipe import WeightRecipe
from dllama_mpi.parallel.network import LinkCurve, Network
from dllama_mpi.planning.costs import AllReduces, Cluster, Host, Speeds
from dllama_mpi.planning.plan import Question, plan
from dllama_mpi.startup.opening import model_config
from dllama_mpi.startup.options import Kept
from tests.small_models import STATE

ONE_B = model_config("random:llama3.2-1b")


def kept(weights: str, kv_type: str | None = None) -> Kept:
    """Return how the 1B shape is kept."""
    return Kept.of(WeightRecipe.parse(weights).formats(ONE_B), kv_type, "f32")


QUESTION = Question(ONE_B, kept("q40"), max_seq_len=4096)


def cluster(rates: list[float], free: list[float], latency: float = 5e-5) -> Cluster:
    """Return hosts h0, h1, ... with so many GB/s in decode and GB free, on gigabit Ethernet."""
    names = tuple(f"h{i}" for i in range(len(rates)))
    links = {(a, b): LinkCurve.of(latency, 117e6) for a in names for b in names if a < b}
    network = Network(names, links)
    speeds = [Speeds(1e9 * rate, 4e9 * rate, layer_seconds=1e-5) for rate in rates]
    hosts = tuple(Host(n, 1, 4, None, int(1e9 * f), 1e9 * r) for n, f, r in zip(names, free, rates, strict=True))
    counts = tuple(tuple(speeds[:count]) for count in range(1, len(rates) + 1))
    return Cluster(hosts, (4,) * len(rates), network, counts, AllReduces(network))


def test_speeds_and_memory_at_each_number_of_ranks() -> None:
    report = plan(QUESTION, cluster([10, 10, 10], [8, 8, 8]))
    json.dumps(report)
    assert [c["ranks"] for c in report["counts"]] == [1, 2, 3]
    speeds = [c["decode"]["tokens_per_second"] for c in report["counts"]]
    assert speeds[0] < speeds[1]
    for count in report["counts"]:
        assert sum(count["shares"]) == pytest.approx(1)
        assert len(count["memory"]) == count["ranks"]
        for phase, tokens in (("decode", 1), ("prefill", 512)):
            cost = count[phase]
            parts = sum(cost[f"{name}_ms"] for name in ("weights", "attention", "synchronisation", "overhead"))
            assert parts == pytest.approx(cost["ms"])
            assert cost["tokens_per_second"] == pytest.approx(1e3 * tokens / cost["ms"])
    assert report["counts"][0]["decode"]["synchronisation_ms"] == 0


def test_what_disturbed_the_measuring_is_told() -> None:
    calm = cluster([10, 10], [8, 8])
    report = plan(QUESTION, calm)
    assert report["disturbances"] == []
    assert report["hosts"][0]["other_load"] is report["links"][0]["best_latency_us"] is None
    points = ((64.0, 5e-3), (2e5, 7e-3))
    hosts = (replace(calm.hosts[0], other_load=0.62, stolen=0.05), replace(calm.hosts[1], other_load=0.0, stolen=0.2))
    for best, uneven in ((1e-6, True), (4e-3, False)):
        links = Network(calm.network.hosts, {("h0", "h1"): LinkCurve(points, best)})
        told = plan(QUESTION, replace(calm, hosts=hosts, network=links))["disturbances"]
        assert told[:2] == [
            "other programs took 62% of h0's processors",
            "other virtual machines took 20% of h1's processors",
        ]
        assert told[2:] == ["messages between h0 and h1 took 5,000.0 us, at best 1.0 us"] * uneven


def test_windows_need_less_memory_for_long_texts() -> None:
    """A context that would not fit if every layer kept all of it: 18 GB of KV cache."""
    config = model_config("random:gemma3-4b")
    formats = WeightRecipe.parse("q40").formats(config)
    question = Question(config, Kept.of(formats, "f16", "f32"))
    (count,) = plan(question, cluster([10], [8]))["counts"]
    assert (count["max_seq_len"], count["problem"]) == (131072, None)
    assert 2.7e9 < count["memory"][0]["kv_cache_bytes"] < 3e9


def test_a_slow_network_makes_one_rank_best() -> None:
    assert plan(QUESTION, cluster([10, 10], [8, 8], 5e-5))["best_ranks"] == {"decode": 2, "prefill": 2}
    assert plan(QUESTION, cluster([10, 10], [8, 8], 5e-3))["best_ranks"] == {"decode": 1, "prefill": 2}


def test_a_number_of_ranks_that_does_not_fit_is_not_the_best() -> None:
    report = plan(QUESTION, cluster([40, 10], [0.8, 0.8], 5e-3))
    assert report["counts"][0]["problem"] is not None
    assert report["counts"][0]["max_seq_len"] is None
    assert report["best_ranks"]["decode"] == 2


def test_what_to_change_where_it_does_not_fit() -> None:
    report = plan(replace(QUESTION, max_seq_len=20000), cluster([10], [1.2]))
    assert report["best_ranks"] == {"decode": None, "prefill": None}
    told, kv = report["advice"]
    assert told.startswith("1 rank: rank 0 needs 1.")
    assert "h0 has 1.14 GB free: --max-seq-len " in told
    length = int(told.split("--max-seq-len ")[1].split()[0])
    assert plan(replace(QUESTION, max_seq_len=length), cluster([10], [1.2]))["counts"][0]["problem"] is None
    assert plan(replace(QUESTION, max_seq_len=length + 1), cluster([10], [1.2]))["counts"][0]["problem"] is not None
    assert "does not fit" in _text({**ABOUT, **report})
    assert kv == "1 rank: --kv-type q80 fits"


def test_smaller_weights_are_advised() -> None:
    advice = plan(replace(QUESTION, kept=kept("f16")), cluster([10], [2.0]))["advice"]
    assert "1 rank: --weights q80 fits" in advice
    assert "1 rank: --weights q40 fits" in advice


def test_fewer_positions_where_nobody_insists() -> None:
    report = plan(replace(QUESTION, max_seq_len=None), cluster([10], [1.2]))
    assert 256 < report["counts"][0]["max_seq_len"] < 131072
    assert any("of the model's 131072 fits" in line for line in report["advice"])


def test_another_split_is_advised_for_unlike_machines() -> None:
    report = plan(QUESTION, cluster([20, 10], [8, 8]))
    (line,) = report["advice"]
    assert line.startswith("2 ranks: --split auto should decode ")
    auto = plan(replace(QUESTION, split="auto"), cluster([20, 10], [8, 8]))["counts"][1]
    assert auto["shares"] == pytest.approx([2 / 3, 1 / 3])
    assert auto["decode"]["tokens_per_second"] > 1.3 * report["counts"][1]["decode"]["tokens_per_second"]
    assert plan(QUESTION, cluster([10, 10], [8, 8]))["advice"] == []


def test_shares_by_hand() -> None:
    report = plan(replace(QUESTION, split="3,1"), cluster([20, 10], [8, 8]))
    assert report["counts"][0]["shares"] == [1]
    assert report["counts"][1]["shares"] == [0.75, 0.25]
    with pytest.raises(UsageError, match="the job has 3 ranks"):
        plan(replace(QUESTION, split="3,1"), cluster([1, 1, 1], [8, 8, 8]))


def test_no_more_ranks_than_heads() -> None:
    tiny = replace(QUESTION, config=(config := model_config("random:tiny")), max_seq_len=64)
    tiny = replace(tiny, kept=Kept.of(WeightRecipe.parse("q40").formats(config)))
    assert len(plan(tiny, cluster([1] * 10, [8] * 10))["counts"]) == 8


def test_states_and_cache_are_told_apart() -> None:
    formats = WeightRecipe.parse("q40,lm_head=q80").formats(STATE)
    report = plan(Question(STATE, Kept.of(formats), max_seq_len=512), cluster([10, 10], [8, 8]))
    for count in report["counts"]:
        for memory in count["memory"]:
            held = {name: memory[f"{name}_bytes"] for name in ("weights", "kv_cache", "states", "buffers")}
            assert min(held.values()) > 0
            assert sum(held.values()) == memory["total_bytes"]


def test_unknown_prefill() -> None:
    known = cluster([10, 10], [8, 8])
    speeds = tuple(tuple(replace(s, prefill=None) for s in each) for each in known.speeds)
    report = plan(QUESTION, replace(known, speeds=speeds))
    assert report["counts"][1]["prefill"] is None
    assert report["best_ranks"]["prefill"] is None
    assert "best for decode: 2 ranks" in _text({**ABOUT, **report})


ABOUT = {
    "model": "x", "n_params": 10**9, "weights": "q40", "kv_type": "f16", "buffer_float_type": "f32", "n_prompt": 512,
    "n_gen": 128, "source": "measured",
}  # fmt: skip


def test_the_text_has_a_row_for_each_number_of_ranks() -> None:
    text = _text({**ABOUT, **plan(QUESTION, cluster([10, 10, 10], [8, 8, 8]))})
    decode = text.split("decode, 128 tokens")[1].split("prefill of")[0].splitlines()
    assert [line.split()[0] for line in decode[3:] if line] == ["1", "2", "3"]
    assert "h0 - h1" in text
    assert "best for decode" in text
