"""Results of the benchmarks: tables are what scripts make of their figures, predictions what `plan` predicts."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dllama_mpi.errors import ClusterError
from dllama_mpi.kernels.simd import EMITTERS
from dllama_mpi.planning.cluster_file import read_cluster
from dllama_mpi.planning.plan import plan
from tests.mpi.launch import ROOT
from tests.unit import vector_code
from tests.unit.test_isa import ARM

FOLDER = ROOT / "benchmarks"
OWN = ("lan", "lan_scaling", "marked", "predict_pis", "report")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[dict[str, Any]]:
    """Import what is tested from its folder, and forget it in the end: its modules' names are short."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in OWN}
    finally:
        sys.path.remove(str(FOLDER))
        for name in OWN:
            sys.modules.pop(name, None)


@pytest.fixture
def figures() -> dict[str, Any]:
    """Return the figures of the last measurement."""
    found: dict[str, Any] = json.loads((FOLDER / "results" / "lan_scaling.json").read_text(encoding="utf-8"))
    return found


def results() -> str:
    return (FOLDER / "RESULTS.md").read_text(encoding="utf-8")


# ---- predictions


def test_tables_of_predictions_are_what_the_script_gives(scripts: dict[str, Any]) -> None:
    script = scripts["predict_pis"]
    found = {shape: script.predictions(shape) for shape in script.MODELS}
    again = "python benchmarks/predict_pis.py --write makes it anew"
    assert scripts["marked"].part(results(), "predictions") == script.report(found), again
    kept = json.loads((FOLDER / "results" / "predictions.json").read_text(encoding="utf-8"))
    assert kept["predictions"] == found, again
    assert kept["published"] == script.published(), again


def test_predictions_are_what_plan_predicts(scripts: dict[str, Any]) -> None:
    script, shape = scripts["predict_pis"], "llama3.2-1b:2"
    question = script.question_of(shape)
    ends = {}
    for board in script.SIZES:
        for end in ("low", "high"):
            cluster = read_cluster(str(FOLDER / "clusters" / f"{board}-{end}.toml"))
            assert len(cluster.hosts) == max(script.COUNTS)
            ends[board, end] = plan(question, cluster)["counts"]
    for found in script.predictions(shape):
        for i, end in enumerate(("low", "high")):
            told = ends[found["board"], end][found["hosts"] - 1]
            for phase in ("decode", "prefill"):
                assert found[f"{phase}_tokens_per_second"][i] == pytest.approx(told[phase]["tokens_per_second"])
            assert 1e9 * found["needed_gb"] == pytest.approx(max(rank["total_bytes"] for rank in told["memory"]))


def test_what_fits_no_board_has_no_speed(scripts: dict[str, Any]) -> None:
    script = scripts["predict_pis"]
    some = [
        {"board": board, "hosts": hosts, "needed_gb": 9.9, "least_board_gb": None if board.endswith("4") else 16}
        | {"decode_tokens_per_second": [1.0, 2.0], "prefill_tokens_per_second": [3.0, 4.0]}
        for hosts in script.COUNTS
        for board in script.SIZES
    ]
    assert script.table(some).splitlines()[2] == "| 1 | 9.9 | fits none | - | - | 16 GB | 1.0 to 2.0 | 3.0 to 4.0 |"


def test_published_figures_name_where_they_are_from(scripts: dict[str, Any]) -> None:
    script = scripts["predict_pis"]
    for figure in script.published():
        assert figure["model"] in script.MODELS
        assert figure["source"].startswith("https://")
        assert figure["date"] == "quoted" or re.search(r"20\d\d$", figure["date"])
        assert figure["board"].startswith("Raspberry Pi")


# Of the kernel for many tokens, as the comments in clusters/*-high.toml say: GHz, SIMD instructions a cycle.
PROCESSORS = {
    "raspberry-pi-4": ("neon", "cortex-a72", r"sml?ull2?|smlal2?", 8, 1.8, 1.5),
    "raspberry-pi-5": ("neondot", "cortex-a76", r"sdot", 16, 2.4, 2.0),
}


@pytest.mark.parametrize("board", PROCESSORS)
def test_rates_of_prefill_follow_from_compiled_kernels(board: str) -> None:
    isa, cpu, product, width, clock, issued = PROCESSORS[board]
    code = vector_code.assembly(vector_code.kernel(EMITTERS[isa], "q4m"), cpu, ARM)
    best = 0.0
    for block in re.split(r"\n(?=\.L\w+:)", code):
        instructions = re.findall(r"^\t(?!\.)(\S+)", block, re.MULTILINE)
        products = sum(re.fullmatch(product, name) is not None for name in instructions)
        if products >= 32:  # an inner loop, of whole tiles
            best = max(best, width * products / len(instructions))
    speeds = read_cluster(str(FOLDER / "clusters" / f"{board}-high.toml")).speeds[0][0]
    assert speeds.prefill == pytest.approx(4e9 * clock * issued * best, rel=0.05)


# ---- measurements


def test_table_of_measurements_is_of_its_figures(scripts: dict[str, Any], figures: dict[str, Any]) -> None:
    assert scripts["marked"].part(results(), "measured") == scripts["lan_scaling"].report(figures)
    assert (FOLDER / "results" / "lan_scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_prediction_stands_beside_each_measurement(scripts: dict[str, Any], figures: dict[str, Any]) -> None:
    lines = scripts["lan_scaling"].report(figures).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \d", line)]
    assert len(rows) == len(figures["records"])
    for row, record in zip(rows, figures["records"], strict=True):
        assert row[0] == str(record["hosts"])
        for phase, cells in (("decode", row[2:5]), ("prefill", row[5:8])):
            if record["hosts"] > figures["cores"]:
                assert cells == ["-"] * 3
                assert phase not in record
                continue
            got, predicted = record[phase]["tokens_per_second"], record[phase]["predicted"]
            assert record[phase]["least"] <= got <= record[phase]["most"]
            assert cells[0].startswith(f"{got:.1f} (")
            assert cells[1:] == [f"{predicted:.1f}", f"{got / predicted:.2f}"]


def test_one_host_has_no_link_and_more_than_cores_have_one(scripts: dict[str, Any]) -> None:
    jobs = scripts["lan_scaling"].jobs
    assert jobs([1, 2, 4], [100, 1000, None], 2) == [(1, None), (2, 100), (2, 1000), (2, None), (4, 1000)]
    assert jobs([2, 3], [100], 1) == [(2, 100), (3, 100)]


def test_figures_are_medians_with_their_spread(scripts: dict[str, Any]) -> None:
    one = {
        "median_step_ns": 1e8, "avg_ts": 50.0, "sync_share": 0.5, "sent_bytes_per_token": 10_000, "n_layers": 3,
        "sync": [{"algorithm": "direct", "bytes": 1000}],
    }  # fmt: skip
    rounds = []
    for seconds, speed in ((0.1, 50.0), (0.4, 70.0), (0.2, 40.0)):
        each = copy.deepcopy({"decode": one, "prefill": one})
        each["decode"]["median_step_ns"], each["prefill"]["avg_ts"] = 1e9 * seconds, speed
        rounds.append(each)
    predicted = {phase: {"tokens_per_second": 7.0} for phase in ("decode", "prefill")}
    record = scripts["lan_scaling"].record((2, 100), rounds, {"predicted": {"100": predicted}}, 2)
    assert [record["decode"][key] for key in ("least", "tokens_per_second", "most")] == [2.5, 5.0, 10.0]
    assert [record["prefill"][key] for key in ("least", "tokens_per_second", "most")] == [40.0, 50.0, 70.0]
    assert record["decode"]["predicted"] == 7.0
    assert record["least_kb_per_token"] == 6.0  # 2 all-reduces of 3 layers, 1 kB to the other rank
    assert record["decode_wire_ms_per_token"] == pytest.approx(0.8 * 1514 / 1448)  # 80 kbit at 100 Mbit/s, and headers


def test_a_busy_machine_is_told(scripts: dict[str, Any], figures: dict[str, Any]) -> None:
    told = {share: scripts["lan_scaling"].report(figures | {"others_cpu_share": share}) for share in (0.02, 0.5)}
    assert "Measure again" not in told[0.02]
    assert "up to 50% of the processors. **That is too much: these figures say nothing. Measure again" in told[0.5]


def test_without_root_one_line(scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    with pytest.raises(ClusterError, match=r"^test hosts are network namespaces, which need Linux, root and [^\n]*$"):
        scripts["lan"].lan(2).__enter__()


# ---- parts of a file


def test_parts_of_a_file(scripts: dict[str, Any], tmp_path: Path) -> None:
    marked, path = scripts["marked"], tmp_path / "a.md"
    path.write_text("by hand\n<!-- x: written by a script -->\nold\n<!-- end of x -->\nmore\n", encoding="utf-8")
    marked.write(path, "x", "new\n")
    text = path.read_text(encoding="utf-8")
    assert text == "by hand\n<!-- x: written by a script -->\nnew\n<!-- end of x -->\nmore\n"
    assert marked.part(text, "x") == "new\n"
    for damaged in (text * 2, "by hand"):
        with pytest.raises(SystemExit, match="must be there once each"):
            marked.replaced(damaged, "x", "")
