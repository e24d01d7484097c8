"""Time every all-reduce algorithm by payload, message size and number of ranks.

mpiexec -n 4 python benchmarks/all_reduce.py
mpiexec -f hosts -n 4 python benchmarks/all_reduce.py --hidden 4096 --tokens 1,256 --plot all_reduce.png
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from report import COLOURS, add_output_options, figure, finish, save, say_table, whole_numbers

from dllama_mpi.parallel.collective.all_reduce import AllReduce
from dllama_mpi.parallel.collective.table import ALGORITHMS, PAYLOADS
from dllama_mpi.parallel.group import connect


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048, metavar="N", help="values a token (default: 2048)")
    parser.add_argument("--tokens", type=whole_numbers, default=[1, 8, 64, 256], metavar="N,...", help="of a message")
    parser.add_argument("--payloads", default=",".join(PAYLOADS), metavar="NAME,...")
    parser.add_argument("-r", "--repetitions", type=int, default=20, metavar="N")
    add_output_options(parser)
    return parser.parse_args()


def measure(comm: Any, hosts: list[str], payload: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the slowest rank's median time of each algorithm and message; the algorithms take turns."""
    reduce = AllReduce(comm, hosts, max(args.tokens), args.hidden, payload, "auto")
    found = []
    for tokens in args.tokens:
        names = [a.name for a in ALGORITHMS.values() if a.suits(reduce.transport.setting)]
        for name in names:
            sent = reduce.take_counts()[1]
            took = [reduce.transport.measure(name, tokens, max(1, args.repetitions // 4)) for _ in range(4)]
            sent = reduce.take_counts()[1] // (4 * (1 + max(1, args.repetitions // 4)))
            slowest = max(comm.allgather(float(np.median(took))))
            found.append(
                {
                    "ranks": comm.size,
                    "hosts": len(set(hosts)),
                    "payload": "f32" if name in ("shared", "mpi") else payload,
                    "tokens": tokens,
                    "algorithm": name,
                    "microseconds": slowest,
                    "sent_bytes": max(comm.allgather(sent)),
                }
            )
    return found


def draw(records: list[dict[str, Any]], path: str) -> None:
    """Draw time by size for the largest number of ranks."""
    most = max(record["ranks"] for record in records)
    drawn, axes = figure()
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        if r["ranks"] == most:
            lines.setdefault(f"{r['algorithm']}, {r['payload']}", []).append((r["tokens"], r["microseconds"]))
    for i, (name, points) in enumerate(lines.items()):
        style = "-" if i < len(COLOURS) else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", color=COLOURS[i % len(COLOURS)], label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a message", ylabel="microseconds", title=f"{most} ranks")
    axes.grid(alpha=0.25)
    axes.legend()
    save(drawn, path)


def main() -> None:
    """Print a table and a line of JSON, and draw a picture if asked."""
    args, group = options(), connect()
    if group.comm is None:
        raise SystemExit("error: one rank has nothing to exchange; start it with mpiexec -n 2 or more")
    records: list[dict[str, Any]] = []
    for size in range(2, group.size + 1):
        comm = group.comm.Split(0 if group.rank < size else 1)
        for payload in args.payloads.split(","):
            if group.rank < size:
                records += measure(comm, group.hosts[:size], payload, args)
        group.comm.Barrier()
    if not group.is_root:
        return
    records = list({(r["ranks"], r["payload"], r["tokens"], r["algorithm"]): r for r in records}.values())
    head = ["ranks", "payload", "tokens", "algorithm", "us", "kB sent a rank"]
    rows = [
        [str(r["ranks"]), r["payload"], str(r["tokens"]), r["algorithm"], f"{r['microseconds']:.1f}",
         f"{r['sent_bytes'] / 1e3:.1f}"]
        for r in records
    ]  # fmt: skip
    say_table(head, rows)
    if args.plot:
        draw(records, args.plot)
    finish({"benchmark": "all_reduce", "hidden": args.hidden, "records": records}, args.json)


if __name__ == "__main__":
    main()
