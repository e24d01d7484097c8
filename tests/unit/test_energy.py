"""Meters of energy: counters in a folder laid out as Linux has them, and a program that speaks as a Raspberry Pi's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dllama_mpi.engine import runner
from dllama_mpi.engine.energy import Board, Packages, rails_power
from dllama_mpi.engine.llm import LLM
from dllama_mpi.engine.rank_report import RankReport, RankTimes, Stopwatch
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.engine.stats import Stats, StepStats
from dllama_mpi.planning.bench import Bench, Test

MOST = 262_143_328_850
RAILS = """\
 3V7_WL_SW_A current(0)=0.10000000A
  VDD_CORE_A current(7)=2.00000000A
  HDMI_A current(22)=0.01306470A
 3V7_WL_SW_V volt(8)=3.70000000V
  VDD_CORE_V volt(15)=0.75000000V
  EXT5V_V volt(24)=5.10006000V
"""
WATTS = 0.1 * 3.7 + 2 * 0.75


class Zones:
    """A folder of power zones, whose counters the test advances."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, zone: str, name: str, microjoules: int) -> None:
        """Make a zone."""
        path = self.folder / zone
        path.mkdir(parents=True)
        (path / "name").write_text(f"{name}\n")
        (path / "max_energy_range_uj").write_text(f"{MOST}\n")
        self.set(zone, microjoules)

    def set(self, zone: str, microjoules: int) -> None:
        """Set a counter."""
        (self.folder / zone / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def zones(tmp_path: Path) -> Zones:
    """Return one host's zones: two packages, and what belongs to the first or holds both."""
    zones = Zones(tmp_path / "powercap")
    zones.add("intel-rapl:0", "package-0", 1_000_000)
    zones.add("intel-rapl:1", "package-1", MOST - 1_000_000)
    zones.add("intel-rapl:2", "psys", 7)
    zones.add("intel-rapl:0:0", "core", 7)
    zones.add("intel-rapl-mmio:0", "package-0", 7)
    return zones


def test_packages_add_up_and_wrap_around(zones: Zones) -> None:
    meter = Packages(zones.folder)
    assert meter
    assert meter.joules() == 0
    zones.set("intel-rapl:0", 3_500_000)
    for other in ("intel-rapl:2", "intel-rapl:0:0", "intel-rapl-mmio:0"):
        zones.set(other, 10_000_000)
    assert meter.joules() == 2.5
    zones.set("intel-rapl:1", 500_000)  # beyond its largest value, and on from 0
    assert meter.joules() == 4.0
    assert meter.joules() == 4.0


def test_counters_that_cannot_be_read_are_none(zones: Zones, tmp_path: Path) -> None:
    assert not Packages(tmp_path / "nothing")
    (zones.folder / "intel-rapl:0" / "energy_uj").unlink()
    meter = Packages(zones.folder)
    assert meter
    zones.set("intel-rapl:1", MOST)
    assert meter.joules() == 1.0
    (zones.folder / "intel-rapl:1" / "energy_uj").write_text("")
    assert meter.joules() == 1.0
    (zones.folder / "intel-rapl:1" / "energy_uj").unlink()
    assert not Packages(zones.folder)


@pytest.mark.parametrize(("text", "watts"), [(RAILS, WATTS), ("", None), ("error=1 error_msg=no\n", None)])
def test_power_of_rails(text: str, watts: float | None) -> None:
    assert rails_power(text) == pytest.approx(watts)


def write_vcgencmd(folder: Path, text: str) -> None:
    """Write a vcgencmd that answers pmic_read_adc with a text."""
    folder.mkdir(exist_ok=True)
    (folder / "rails").write_text(text)
    path = folder / "vcgencmd"
    path.write_text(f'#!/bin/sh\n[ "$1" = pmic_read_adc ] && cat "{folder}/rails"\n')
    path.chmod(0o755)


def test_a_boards_power_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert not Board()
    write_vcgencmd(tmp_path / "bin", "error=1\n")
    assert not Board()
    write_vcgencmd(tmp_path / "bin", RAILS)
    before = time.monotonic()
    meter = Board(0.01)
    assert meter
    first = meter.joules()
    while (later := meter.joules()) < 0.2:  # at 1.87 W
        assert later >= first >= 0
        first = later
        time.sleep(0.01)
    assert later <= WATTS * (time.monotonic() - before) + 1e-9


def test_a_stopwatch_tells_the_phases_apart(zones: Zones) -> None:
    watch = Stopwatch(1.0, Packages(zones.folder))
    zones.set("intel-rapl:0", 50_000_000)  # before the first step: not counted
    watch.start()
    zones.set("intel-rapl:0", 53_000_000)
    watch.stop(0.0, is_decode=False)
    for total in (54_000_000, 56_000_000):
        watch.start()
        zones.set("intel-rapl:0", total)
        watch.stop(0.0, is_decode=True)
    times = watch.report()
    assert (times.prefill_joules, times.decode_joules) == (3.0, 3.0)
    times = watch.report()
    assert (times.prefill_joules, times.decode_joules) == (0.0, 0.0)


def report(rank: int, host: str, prefill: float | None, decode: float | None) -> RankReport:
    """Return a rank's report."""
    times = RankTimes(0.5, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 4, prefill_joules=prefill, decode_joules=decode)
    return RankReport(rank, host, times, 0.0, 0.0)


def test_figures_of_a_call() -> None:
    stats = Stats([StepStats(4, 1.0, 0.0, 0, 0, prompt=4)], [StepStats(1, 1.0, 0.0, 0, 0)] * 2)
    assert stats.to_dict()["decode"]["joules"] is None
    assert not any("energy" in line for line in stats.summary_lines())
    stats.ranks = [report(0, "a", 2.0, 3.0), report(1, "a", None, None), report(2, "b", 4.0, 5.0)]
    told = stats.to_dict()
    assert (told["prefill"]["joules"], told["prefill"]["joules_per_token"]) == (6.0, 1.5)
    assert (told["decode"]["joules"], told["decode"]["joules_per_token"]) == (8.0, 4.0)
    assert told["metered_hosts"] == 2
    assert "energy: prompt 6.0 J, 1.5 J a token; output 8.0 J, 4 J a token" in stats.summary_lines()
    stats.ranks[2] = report(2, "b", None, None)
    assert any(line.endswith("(1 of 2 hosts can tell)") for line in stats.summary_lines())


def test_a_model_that_runs(zones: Zones, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Packages(zones.folder)
    monkeypatch.setattr(runner, "host_meter", lambda: meter)
    llm = LLM("demo", max_seq_len=64)
    used = 1_000_000
    step = llm.engine.step

    def costly_step() -> object:
        nonlocal used
        used += 2_000_000
        zones.set("intel-rapl:0", used)
        return step()

    llm.engine.step = costly_step  # type: ignore[assignment,method-assign]
    result = llm.generate([1, 2, 3, 4], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert result is not None
    # What is used before the first step of a call is not of the call.
    assert (result.stats.prefill_joules, result.stats.decode_joules) == (0.0, 4.0)
    bench = Bench(llm)
    measured = bench.run(Test(0, 4), 2, warm_up=False, readings=0)
    assert measured is not None
    told = measured.to_dict()
    assert (told["joules"], told["joules_per_token"], told["metered_hosts"]) == (12.0, 1.5, 1)
