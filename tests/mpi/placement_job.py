"""Run by every rank, each in a folder of its own that stands for a host's disk: load `model` there, say what came.

usage: placement_job.py OPTIONS [DISTURBANCE], options of LLM as JSON. Rank 0 prints a JSON object.

A disturbance happens on one rank: "sender fails", "writer fails" (after some pieces), "small disk" (no file may grow
past 10 kB), "table" (its cached table is damaged after loading).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from typing import Any, NoReturn
from unittest.mock import patch

from dllama_mpi import LLM, SamplingParams
from dllama_mpi.errors import ModelError
from dllama_mpi.parallel.group import connect
from dllama_mpi.weights import cache, files, slices
from tests.mpi.convert_job import small_disk

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def fail_after(calls: int, real: Any) -> Any:
    """Return a function that raises a ModelError when it is called again after so many calls."""
    left = iter(range(calls))

    def disturbed(*args: Any) -> Any:
        if next(left, None) is None:
            fail()
        return real(*args)

    return disturbed


def fail() -> NoReturn:
    """Raise what a broken disk does."""
    raise ModelError("the disk is broken")


def main() -> None:
    options, how = json.loads(sys.argv[1]), (sys.argv[2:] or [""])[0]
    group = connect()
    with contextlib.ExitStack() as stack:
        if how == "sender fails" and group.is_root:
            stack.enter_context(patch.object(slices, "read_piece", fail_after(9, files.read_piece)))
        if how == "writer fails" and group.rank == 1:
            stack.enter_context(patch.object(cache.SliceWriter, "write", fail_after(9, cache.SliceWriter.write)))
        if how == "small disk" and group.rank == 1:
            stack.enter_context(small_disk())
        llm = LLM("model", group=group, nthreads=1, max_seq_len=64, quiet=False, **options)
    if how == "table" and group.rank == 1:
        llm._model._weights.table.data.view("u1")[:] ^= 1
    logits = llm.logits(TOKENS)
    result = llm.generate(TOKENS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    if logits is None or result is None:
        return
    report = {
        "origins": [origin.how for origin in llm.origins],
        "received": [origin.received for origin in llm.origins],
        "in_memory": [origin.in_memory for origin in llm.origins],
        "logits": hashlib.sha256(logits.tobytes()).hexdigest(),
        "last": logits[-1].tolist(),
        "tokens": result.token_ids,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
