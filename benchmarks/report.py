"""What the benchmarks share: the machine's ceilings, tables, pictures, a last line of JSON with units in its keys."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dllama_mpi.cli.options import table
from dllama_mpi.kernels import probe, runtime

COLOURS = ("#1f4e79", "#c55a11", "#548235", "#7f6000", "#7030a0", "#808080")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --json and --plot."""
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw them as a picture (PNG; needs matplotlib)")


def whole_numbers(text: str) -> list[int]:
    """Read numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def ceilings(threads: int) -> dict[str, Any]:
    """Measure what this many threads can do at best."""
    runtime.set_threads(threads)
    return {
        "threads": threads,
        "read_gb_per_s": probe.read_bandwidth(threads) / 1e9,
        "int8_dot_gmac_per_s": probe.dot_rate(threads) / 1e9,
        "f32_fma_gmac_per_s": probe.fma_rate(threads) / 1e9,
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


def figure(width: float = 9, height: float = 5.5) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --plot needs matplotlib; pip install 'dllama-mpi[plot]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def save(drawn: Any, path: str) -> None:
    """Write a figure as a PNG."""
    drawn.savefig(path, dpi=120)
