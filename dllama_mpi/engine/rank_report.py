"""What held a rank back: its times, its processor and its link, and which rank the others waited for."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from ..parallel.star import StarLink
from .energy import Meter

_CPUS = Path("/sys/devices/system/cpu")
_PI_FLAGS = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
# The low bits of what a Raspberry Pi's firmware tells: what holds now (higher ones: what has ever occurred).
_PI_BITS = ("undervoltage", "frequency capped", "throttled", "temperature limit")
_NOTABLE = 0.1  # part of the time from which a delay is worth a word
_SLOW_CLOCK = 0.8  # of the highest frequency, below which a processor counts as slowed down


@dataclass(frozen=True)
class RankTimes:
    """What a rank did between two reports.

    Attributes:
        share: the part of the model it holds. seconds: since its first step; compute_seconds, wait_seconds: of steps,
            the rest is waiting for the root's orders.
        cpu_seconds: processor time this process took. host_busy_seconds, host_stolen_seconds: of all the host's
            processors together, taken by any process and by other virtual machines.
        processors: of the host. frequency_ghz, most_ghz: of the processors this rank may use, now and at most.
        slowed: what the firmware says slows the processor down. prefill_joules, decode_joules: energy of the host in
            steps with and without prompt tokens, told by the first of its ranks, if it can be told.
    """

    share: float
    seconds: float
    compute_seconds: float
    wait_seconds: float
    cpu_seconds: float
    host_busy_seconds: float
    host_stolen_seconds: float
    processors: int
    frequency_ghz: float | None = None
    most_ghz: float | None = None
    slowed: tuple[str, ...] = ()
    prefill_joules: float | None = None
    decode_joules: float | None = None


class Stopwatch:
    """Counts one rank's times, and the energy of its host, from the first step after a report to the next report."""

    def __init__(self, share: float, meter: Meter | None = None) -> None:
        """Begin. meter: None if another rank tells the host's energy, or nothing does."""
        self._share, self._meter = share, meter
        self._begin()

    def _begin(self) -> None:
        self._started, self._cpu, self._host = time.perf_counter(), time.process_time(), psutil.cpu_times()
        self._compute = self._wait = self._gathering = 0.0
        self._joules = 0.0 if self._meter is None else self._meter.joules()
        self._prefill = self._decode = 0.0  # joules
        self._is_fresh = True

    def start(self) -> None:
        """Begin a step."""
        if self._is_fresh:
            self._begin()
            self._is_fresh = False
        self._gathering, self._step = 0.0, time.perf_counter()

    def stop(self, sync_seconds: float, is_decode: bool) -> None:
        """End a step that spent so long in all-reduces. is_decode: whether it fed no prompt tokens."""
        wait = sync_seconds + self._gathering
        self._wait += wait
        self._compute += time.perf_counter() - self._step - wait
        if self._meter is not None:
            now = self._meter.joules()
            if is_decode:
                self._decode += now - self._joules
            else:
                self._prefill += now - self._joules
            self._joules = now

    def gathered(self, seconds: float) -> None:
        """Count some time within a step as waiting, beside its all-reduces."""
        self._gathering += seconds

    def report(self) -> RankTimes:
        """Return the times since the last report, and begin anew."""
        host, before = psutil.cpu_times(), self._host
        now, most = _frequency()
        times = RankTimes(
            share=self._share,
            seconds=time.perf_counter() - self._started,
            compute_seconds=self._compute,
            wait_seconds=self._wait,
            cpu_seconds=time.process_time() - self._cpu,
            host_busy_seconds=sum(getattr(host, n) - getattr(before, n) for n in ("user", "nice", "system")),
            host_stolen_seconds=getattr(host, "steal", 0.0) - getattr(before, "steal", 0.0),
            processors=psutil.cpu_count() or 1,
            frequency_ghz=now,
            most_ghz=most,
            slowed=_slowed(),
            prefill_joules=None if self._meter is None else self._prefill,
            decode_joules=None if self._meter is None else self._decode,
        )
        self._begin()
        return times


def _frequency() -> tuple[float | None, float | None]:
    """Return the mean frequency of the usable processors in GHz, now and at most, where Linux tells."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    found = []
    for name in ("scaling_cur_freq", "cpuinfo_max_freq"):
        values = []
        for cpu in usable:
            with contextlib.suppress(OSError, ValueError):
                values.append(int((_CPUS / f"cpu{cpu}/cpufreq/{name}").read_text()) / 1e6)
        found.append(statistics.fmean(values) if values else None)
    return found[0], found[1]


def _slowed() -> tuple[str, ...]:
    """Return what a Raspberry Pi's firmware says slows it down now; nothing elsewhere."""
    text = ""
    with contextlib.suppress(OSError):
        text = _PI_FLAGS.read_text()
    if not text and shutil.which("vcgencmd"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=1, check=False)
            text = done.stdout
    return pi_flags(text)


def pi_flags(text: str) -> tuple[str, ...]:
    """Return the names of the flags set in what get_throttled says, such as "throttled=0x50005" or "50005"."""
    try:
        bits = int(text.strip().rpartition("=")[2], 16)
    except ValueError:
        return ()
    return tuple(name for i, name in enumerate(_PI_BITS) if bits >> i & 1)


@dataclass(frozen=True)
class RankReport:
    """One rank in the table of `--stats`.

    Attributes:
        other_load: part of its host's processors that was taken by programs outside this job;
            stolen: by other virtual machines. latency_us, mbit_per_second: of its link with the root, if measured.
        remark: why this rank is the slowest; empty for the others.
    """

    rank: int
    host: str
    times: RankTimes
    other_load: float
    stolen: float
    latency_us: float | None = None
    mbit_per_second: float | None = None
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, units in the keys."""
        t = self.times
        rest = {k: v for k, v in asdict(self).items() if k not in ("rank", "host", "times")}
        return {
            "rank": self.rank,
            "host": self.host,
            "share": t.share,
            "compute_ms": 1e3 * t.compute_seconds,
            "wait_ms": 1e3 * t.wait_seconds,
            "frequency_ghz": t.frequency_ghz,
            "most_ghz": t.most_ghz,
            "slowed": list(t.slowed),
            **rest,
        }


def reports(hosts: list[str], times: list[RankTimes], links: list[StarLink | None] | None) -> list[RankReport]:
    """Return the ranks' reports, one of them with a remark: the one that the others waited for most.

    links: each rank's with the root, if measured.
    """
    slowest = max(range(len(times)), key=lambda r: times[r].compute_seconds) if len(times) > 1 else None
    table = []
    for rank, (host, t, link) in enumerate(zip(hosts, times, links or [None] * len(hosts), strict=True)):
        ours = sum(other.cpu_seconds for h, other in zip(hosts, times, strict=True) if h == host)
        capacity = max(t.seconds * t.processors, 1e-9)
        report = RankReport(
            rank=rank,
            host=host,
            times=t,
            other_load=min(1.0, max(0.0, t.host_busy_seconds - ours) / capacity),
            stolen=min(1.0, t.host_stolen_seconds / capacity),
            latency_us=1e6 * link.latency if link else None,
            mbit_per_second=8e-6 * link.bytes_per_second if link else None,
        )
        table.append(report)
    if slowest is not None:
        at, remark = _verdict(table, slowest)
        table[at] = replace(table[at], remark=remark)
    return table


def _verdict(table: list[RankReport], slowest: int) -> tuple[int, str]:
    """Return whom the others waited for, and why: the rank that computed longest, or the one with the slowest link.

    Ranks step together, so that compute and wait add up to about the same everywhere: what the rank that computed
    longest computed more than the others, they waited; what even that rank waited, the network took.
    """
    late = table[slowest].times
    whole = max(late.compute_seconds + late.wait_seconds, 1e-9)
    others = [r.times.compute_seconds for r in table if r.rank != slowest]
    behind = (late.compute_seconds - statistics.fmean(others)) / whole
    network = late.wait_seconds / whole
    linked = [r for r in table if r.mbit_per_second is not None]
    if linked and network > max(behind, _NOTABLE):
        worst = min(linked, key=lambda r: r.mbit_per_second or 0.0)
        return worst.rank, f"slowest link: {worst.mbit_per_second:.0f} Mbit/s, {worst.latency_us:.0f} us"
    if behind <= _NOTABLE:
        return slowest, "slowest by a little"
    return slowest, "; ".join(["computes slowly", *_causes(table[slowest])])


def _causes(report: RankReport) -> list[str]:
    t, causes = report.times, list(report.times.slowed)
    if t.frequency_ghz and t.most_ghz and t.frequency_ghz < _SLOW_CLOCK * t.most_ghz:
        causes.append(f"at {t.frequency_ghz:.1f} of {t.most_ghz:.1f} GHz")
    if report.other_load > _NOTABLE:
        causes.append(f"other programs take {report.other_load:.0%} of its processors")
    if report.stolen > _NOTABLE:
        causes.append(f"other virtual machines take {report.stolen:.0%}")
    return causes


def table_lines(table: list[RankReport]) -> list[str]:
    """Return the table as `--stats` shows it."""
    head = ("rank", "host", "share", "compute s", "wait s", "wait", "GHz", "other load", "stolen", "link", "")
    rows = [head]
    for r in table:
        t = r.times
        clock = "-" if t.frequency_ghz is None else f"{t.frequency_ghz:.1f}"
        clock += "" if t.most_ghz is None else f" of {t.most_ghz:.1f}"
        link = "-" if r.mbit_per_second is None else f"{r.mbit_per_second:.0f} Mbit/s {r.latency_us:.0f} us"
        wait = t.wait_seconds / max(t.compute_seconds + t.wait_seconds, 1e-9)
        times = (f"{t.compute_seconds:.3f}", f"{t.wait_seconds:.3f}", f"{wait:.0%}")
        load = (clock, f"{r.other_load:.0%}", f"{r.stolen:.0%}")
        rows.append((str(r.rank), r.host, f"{t.share:.0%}", *times, *load, link, r.remark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i in (1, len(head) - 1) else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in rows
    ]
