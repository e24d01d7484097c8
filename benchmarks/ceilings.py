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
    names = list(found[0])
    rows = [[str(f["threads"]), *(f"{f[name]:.1f}" for name in names[1:])] for f in found]
    say_table(["threads", "memory GB/s", "int8 dot GMAC/s", "f32 FMA GMAC/s"], rows)
    finish({"benchmark": "ceilings", "instruction_set": runtime.ISA, "ceilings": found}, args.json)


if __name__ == "__main__":
    main()
