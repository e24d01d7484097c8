"""What the benchmarks share: the machine's ceilings, tables, pictures, a last line of JSON with units in its keys."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from dllama_mpi.cli.options import table
from dllama_mpi.kernels import probe, runtime
from dllama_mpi.parallel.collective.table import ALGORITHMS

CALM = 0.08  # share of the processors that others may take before figures are doubtful
COLOURS = ("#1f4e79", "#c55a11", "#548235", "#7f6000", "#7030a0", "#808080")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --json and --plot."""
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw them as a picture (PNG; needs matplotlib)")


def whole_numbers(text: str) -> list[int]:
    """Read numbers separated by commas."""
    return [int(part) for part in text.split(",")]


class Disturbance:
    """What share of this host's processors goes to others than these processes (by default this one alone)."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids or (os.getpid(),)
        self._before, self._started = self._used(), time.perf_counter()

    def _used(self) -> float:
        every, own = psutil.cpu_times(), [psutil.Process(pid).cpu_times() for pid in self._pids]
        return float(every.user + every.system + every.nice - sum(t.user + t.system for t in own))

    def share(self) -> float:
        """Return the share since this object was made, 0 to 1."""
        used, seconds = self._used() - self._before, time.perf_counter() - self._started
        return max(0.0, used) / seconds / (psutil.cpu_count() or 1)

    def say(self) -> None:
        """Warn if the figures since then are not to be trusted."""
        if self.share() > CALM:
            print(f"other programs took {self.share():.0%} of the processors meanwhile: measure again when it is calm")


def ceilings(threads: int) -> dict[str, Any]:
    """Measure what this many threads can do at best."""
    runtime.set_threads(threads)
    noise = Disturbance()
    return {
        "threads": threads,
        "read_gb_per_s": probe.read_bandwidth(threads) / 1e9,
        "int8_dot_gmac_per_s": probe.dot_rate(threads) / 1e9,
        "f32_fma_gmac_per_s": probe.fma_rate(threads) / 1e9,
        "others_cpu_share": noise.share(),
    }


def say_ceilings(found: dict[str, Any]) -> None:
    """Print one `ceilings` as a line."""
    print(
        f"ceilings with {found['threads']} threads ({runtime.ISA}): memory reads {found['read_gb_per_s']:.1f} GB/s,"
        f" int8 dot products {found['int8_dot_gmac_per_s']:.0f} GMAC/s,"
        f" float32 multiply-adds {found['f32_fma_gmac_per_s']:.0f} GMAC/s",
        flush=True,
    )


def say_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a text table."""
    print(table(head, rows), flush=True)


def finish(report: dict[str, Any], path: str | None) -> None:
    """Print the report as the last line, as JSON, and write it to a file if one is given."""
    if path is not None:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report), flush=True)


def least_kb(decode: dict[str, Any], ranks: int) -> float | None:
    """Return the kB that a token's all-reduces must send from the busiest rank; None where that depends on the hosts.

    decode: a record of `bench`.
    """
    if not decode["sync"]:
        return 0.0
    choice = decode["sync"][0]
    if choice["algorithm"] in ("two-level", "mpi"):
        return None
    return 2 * decode["n_layers"] * ALGORITHMS[choice["algorithm"]].payloads.of(ranks) * float(choice["bytes"]) / 1e3


def pyplot() -> Any:
    """Return matplotlib's module for pictures in files.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: a picture needs matplotlib; pip install 'dllama-mpi[plot]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def figure(width: float = 9, height: float = 5.5, columns: int = 1) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, or the axes of several pictures beside each other.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    return pyplot().subplots(1, columns, figsize=(width, height), layout="constrained")


def save(drawn: Any, path: str) -> None:
    """Write a figure as a PNG of few colours: a third of the bytes."""
    from PIL import Image  # a part of matplotlib's needs

    drawn.savefig(path, dpi=110)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(128)
    few.save(path, optimize=True)
