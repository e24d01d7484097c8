"""Results of `bench` as lines of JSON, and lines of JSON as a table, for bench_scaling.sbatch.

bench_lines.py NODES JOB NODELIST < RESULTS    the list that `bench --output json` prints, one line a test
bench_lines.py --table FILE                    tokens a second by number of nodes, and against the first of each test
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dllama_mpi.cli.options import table


def lines(nodes: str, job: str, nodelist: str) -> None:
    """Print the tests on standard input, each as a line that also says where it was measured."""
    for record in json.load(sys.stdin):
        print(json.dumps({"job": job, "nodes": int(nodes), "nodelist": nodelist, **record}))


def rows(path: Path) -> list[list[str]]:
    """Return the table's rows, in the order of the file."""
    first: dict[str, float] = {}
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        base = first.setdefault(record["test"], record["avg_ts"])
        numbers = [str(record[key]) for key in ("nodes", "n_ranks", "n_threads")]
        speed = [f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}", f"{record['avg_ts'] / base:.2f}"]
        found.append([record["test"], *numbers, *speed, f"{record['sync_share']:.1%}"])
    return sorted(found, key=lambda row: list(first).index(row[0]))


def main() -> None:
    """Do what the arguments say."""
    if sys.argv[1] == "--table":
        print(table(["test", "nodes", "ranks", "threads", "t/s", "speed-up", "sync"], rows(Path(sys.argv[2]))))
    else:
        lines(*sys.argv[1:4])


if __name__ == "__main__":
    main()
