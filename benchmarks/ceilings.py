"""Measure the machine's ceilings: memory reads, int8 dot products and float32 multiply-adds a second, by threads.

python benchmarks/ceilings.py [--threads 1,2,4]
"""

from __future__ import annotations

import argparse

from report import ceilings, finish, say_table, whole_numbers

from dllama_mpi.kernels import runtime


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=whole_numbers, metavar="N,...", help="(default: 1, 2, 4, ... all)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args()
    most = runtime.most_threads()
    counts = args.threads or sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})
    found = [ceilings(threads) for threads in counts]
    names = ("read_gb_per_s", "int8_dot_gmac_per_s", "f32_fma_gmac_per_s")
    rows = [[str(f["threads"]), *(f"{f[n]:.1f}" for n in names), f"{f['others_cpu_share']:.0%}"] for f in found]
    say_table(["threads", "memory GB/s", "int8 dot GMAC/s", "f32 FMA GMAC/s", "others' CPU"], rows)
    finish({"benchmark": "ceilings", "instruction_set": runtime.ISA, "ceilings": found}, args.json)


if __name__ == "__main__":
    main()
