"""Run by mpiexec: prompts whose halves are exchanged while the other is computed; prints whether all bits agree.

usage: overlap_job.py ALGORITHM PAYLOAD MODEL
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

import numpy as np

from dllama_mpi import LLM
from dllama_mpi.parallel.collective import overlap


def main() -> None:
    sync, payload, model = sys.argv[1:]
    options: dict[str, Any] = {
        "nthreads": 1,
        "max_seq_len": 128,
        "sync": sync,
        "buffer_float_type": payload,
        "prefill_chunk": 80,
    }
    apart = LLM(model, **options)
    ids = np.random.default_rng(0).integers(min(256, apart.config.vocab_size), size=125).tolist()
    with (
        patch.object(overlap, "_LEAST_MICROSECONDS", 0.0),
        patch.object(overlap, "_share", lambda transport, overlap, rows: 0.5),
    ):
        together = LLM(model, **options)
    parts = [len(llm.group.parts(80)) - 1 for llm in (apart, together)]
    same = True
    for _ in range(5):
        one, other = apart.logits(ids), together.logits(ids)
        same = same and (one is None or other is None or np.array_equal(one, other))
    if apart.is_root:
        print(json.dumps({"same": same, "parts": together.group.parts(80).tolist(), "counts": parts}))


if __name__ == "__main__":
    main()
