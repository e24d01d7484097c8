"""Run by every rank: load a model, and report what memory that took.

usage: memory_job.py MODEL. Rank 0 prints a JSON list, a rank an entry, in MB: weights; anonymous, the most of anonymous
memory beyond them and what there was before; mapped, the most of files' pages beyond what there was before.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from dllama_mpi import LLM
from dllama_mpi.parallel.group import connect


def taken() -> tuple[int, int]:
    """Return this process's anonymous memory and pages of files, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
    return found["RssAnon"], found["RssFile"]


def main() -> None:
    group, ended = connect(), threading.Event()
    before, most = taken(), [0, 0]

    def watch() -> None:
        while not ended.wait(0.002):
            most[:] = map(max, most, taken())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        llm = LLM(sys.argv[1], group=group, nthreads=1, max_seq_len=256, quiet=True)
    finally:
        ended.set()
        watching.join()
    weights = llm._model._weights.nbytes
    figures = (weights, most[0] - before[0] - weights, most[1] - before[1])
    every = group.allgather(dict(zip(("weights", "anonymous", "mapped"), (n >> 20 for n in figures), strict=True)))
    if group.is_root:
        print(json.dumps(every))


if __name__ == "__main__":
    main()
