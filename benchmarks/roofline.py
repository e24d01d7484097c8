"""Draw what kernels.py measured as a roofline: multiply-adds a second over multiply-adds a byte read from memory."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from report import COLOURS, figure, save

INK = "#404040"
ARITHMETIC = (("int8_dot_gmac_per_s", "int8 dot products", "-"), ("f32_fma_gmac_per_s", "float32 multiply-adds", "--"))


def draw(report: dict[str, Any], path: str) -> None:
    """Draw a report of kernels.py; of attention, the greatest depth alone."""
    found, limits = report["results"], report["ceilings"]
    deepest = max(f["depth"] for f in found)
    chosen = [f for f in found if f["kernel"] == "matmul" or f["depth"] == deepest]
    drawn, axes = figure(8, 4.8)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds per byte read from memory", ylabel="GMAC/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    draw_roof(axes, chosen, limits)
    draw_points(axes, chosen)
    axes.set_title(f"{report['instruction_set']}, {limits['threads']} threads", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.grid(alpha=0.2)
    save(drawn, path)


def draw_roof(axes: Any, chosen: list[dict[str, Any]], limits: dict[str, Any]) -> None:
    """Draw the ceilings of memory, the median and how far it changed, and of arithmetic."""
    low, high = (edge(f["mac_per_byte"] for f in chosen) for edge in (min, max))
    x = np.geomspace(low / 1.5, high * 1.5, 400)
    rates = [f["read_limit_gb_per_s"] for f in chosen]
    memory, slow, fast = statistics.median(rates), min(rates), max(rates)
    axes.fill_between(x, *(np.minimum(limits[ARITHMETIC[0][0]], r * x) for r in (slow, fast)), color=INK, alpha=0.12,
                      linewidth=0)  # fmt: skip
    for key, name, style in ARITHMETIC:
        axes.plot(x, np.minimum(limits[key], memory * x), style, color=INK, linewidth=1.2, zorder=1)
        axes.text(x[-1], limits[key] * 1.07, f"{name} {limits[key]:.0f} GMAC/s", ha="right", fontsize=8, color=INK)
    middle = (low * limits["int8_dot_gmac_per_s"] / memory) ** 0.5
    name = f"memory {memory:.0f} GB/s\n({slow:.0f} to {fast:.0f} meanwhile)"
    axes.text(middle / 1.1, fast * middle, name, ha="right", fontsize=8, color=INK)


def draw_points(axes: Any, chosen: list[dict[str, Any]]) -> None:
    """Draw a line for each kernel and format: a format has its colour, a kernel its marker."""
    formats = list(dict.fromkeys(f["format"] for f in chosen))
    for kernel, name in dict.fromkeys((f["kernel"], f["format"]) for f in chosen):
        points = [f for f in chosen if (f["kernel"], f["format"]) == (kernel, name)]
        colour = COLOURS[formats.index(name)]
        tokens = "1 and " if len(points) == 2 else f"{points[0]['tokens']} to "
        where = f" over {points[0]['depth']} positions, {name}" if points[0]["depth"] else f", {name}"
        style = {"marker": "o"} if kernel == "matmul" else {"marker": "D", "markerfacecolor": "white", "linestyle": ""}
        axes.plot(
            [f["mac_per_byte"] for f in points],
            [f["gmac_per_s"] for f in points],
            color=colour,
            label=f"{kernel}{where}: {tokens}{points[-1]['tokens']} tokens",
            markersize=5,
            linewidth=1.2,
            **style,
        )


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, metavar="KERNELS.json", help="what kernels.py wrote with --json")
    parser.add_argument("picture", metavar="ROOFLINE.png", help="the picture to write")
    args = parser.parse_args()
    draw(json.loads(args.report.read_text(encoding="utf-8")), args.picture)


if __name__ == "__main__":
    main()
