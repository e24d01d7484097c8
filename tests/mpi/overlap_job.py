"""Run by mpiexec: prompts whose halves are exchanged while the other is computed; prints whether all bits agree."""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

import numpy as np

from dllama_mpi import LLM
from dllama_mpi.parallel.collective import all_reduce as allreduce


def main() -> None:
    sync, payload = sys.argv[1:]
    ids = np.random.default_rng(0).integers(256, size=230).tolist()
    options = {"nthreads": 1, "max_seq_len": 512, "sync": sync, "buffer_float_type": payload, "prefill_chunk": 100}
    apart = LLM("demo", **options)
    with (
        patch.object(allreduce, "_OVERLAP_MICROSECONDS", 0.0),
        patch.object(allreduce.AllReduce, "_overlap_share", lambda reduce, overlap: 0.5),
    ):
        together = LLM("demo", **options)
    parts = [len(llm.group.parts(100)) - 1 for llm in (apart, together)]
    same = True
    for _ in range(5):
        one, other = apart.logits(ids), together.logits(ids)
        same = same and (one is None or np.array_equal(one, other))
    if apart.is_root:
        print(json.dumps({"same": same, "parts": together.group.parts(100).tolist(), "counts": parts}))


if __name__ == "__main__":
    main()
