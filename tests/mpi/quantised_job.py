"""Run by every rank: compare quantised tiny models over all ranks with the same on one; rank 0 prints a JSON object.

usage: quantised_job.py FOLDER WEIGHTS, the directory of a model that tests.tiny_models has written
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from dllama_mpi import LLM
from dllama_mpi.parallel.group import TensorParallelGroup

TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 140, 40)]


def main() -> None:
    folder, weights = sys.argv[1:]
    options: dict[str, Any] = {
        "weights": None if weights == "default" else weights,
        "nthreads": 1,
        "max_seq_len": 64,
        "kv_type": "f32",
    }
    together = LLM(folder, buffer_float_type="f32", **options)
    got = together.logits(TOKENS)
    if together.is_root:
        alone = LLM(folder, group=TensorParallelGroup(None), **options).logits(TOKENS)
        assert got is not None
        assert alone is not None
        formats = sorted({fmt.name for fmt in together.formats.values()})
        differences = np.abs(got - alone).max(axis=1).tolist()
        print(json.dumps({"differences": differences, "size": float(np.abs(alone).max()), "formats": formats}))


if __name__ == "__main__":
    main()
